"""Set-up, sign-in and sign-out, and what keeps strangers and other sites out."""

import re

import msgspec
import pytest
from litestar import Litestar
from litestar.datastructures import State
from litestar.testing import AsyncTestClient

from app import console as console_pages
from app.core.database import Database
from app.organizations.service import bootstrap
from app.organizations.signins import SignIns
from app.settings import Settings
from tests.app.console.conftest import EMAIL, ORIGIN, PASSWORD, Console

PAGES = ("/console/models", "/console/upload", "/console/keys", "/console/usage")


async def test_the_set_up_link_works_once(console: Console) -> None:
    path = f"/console/setup/{console.setup_token}"
    weak = await console.post(path, path, email=EMAIL, password="short")
    assert weak.status == 400
    assert "at least 10 characters" in weak.text
    await console.set_up()
    again = await console.client.get(path)
    assert again.status_code == 403
    assert "was used" in again.text


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_asks_for_a_sign_in_and_comes_back(console: Console, path: str) -> None:
    sent_away = await console.client.get(f"{path}?days=7")
    assert sent_away.status_code == 303
    assert sent_away.headers["location"] == f"/console/sign-in?next={path}%3Fdays%3D7"


async def test_signing_in_makes_a_new_session_and_ignores_a_planted_one(owned: Console) -> None:
    old = owned.client.cookies["tapeout_session"]
    owned.client.cookies.delete("tapeout_session")
    form = "/console/sign-in?next=/console/usage"
    owned.client.cookies.set("tapeout_session", "planted-by-someone-else")
    done = await owned.post(form, "/console/sign-in", email=EMAIL, password=PASSWORD,
                            next="/console/usage")  # fmt: skip
    assert (done.status, done.location) == (303, "/console/usage")
    jar = owned.client.cookies.jar
    sessions = {cookie.value for cookie in jar if cookie.name == "tapeout_session"}
    assert len(sessions - {old, "planted-by-someone-else"}) == 1


async def test_the_session_cookie_is_out_of_reach_of_scripts(console: Console) -> None:
    path = f"/console/setup/{console.setup_token}"
    data = {"csrf_token": await console.csrf_token(path), "email": EMAIL, "password": PASSWORD}
    done = await console.client.post(path, data=data, headers={"Origin": ORIGIN})
    cookie = next(c for c in done.headers.get_list("set-cookie") if "tapeout_session" in c)
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert "Path=/" in cookie
    assert "Secure" not in cookie  # plain http on this box


async def test_on_https_the_cookie_is_bound_to_the_host(
    database: Database, settings: Settings
) -> None:
    secure = msgspec.structs.replace(settings, public_url="https://box.example.com")
    token = await bootstrap(database, secure)
    state = State(
        {
            "settings": secure,
            "database": database,
            "sign_ins": SignIns(database, secure.session_days),
        }
    )
    application = Litestar([console_pages.router], state=state, openapi_config=None)
    async with AsyncTestClient(application, base_url="https://testserver.local") as client:
        client.follow_redirects = False
        form = await client.get(f"/console/setup/{token}")
        csrf = re.search(r'name="csrf_token" value="([^"]+)"', form.text)
        assert csrf
        done = await client.post(
            f"/console/setup/{token}",
            data={"csrf_token": csrf[1], "email": EMAIL, "password": PASSWORD},
            headers={"Origin": "https://box.example.com"},  # the proxy changed the Host
        )
    assert done.status_code == 303
    cookies = done.headers.get_list("set-cookie")
    assert any(c.startswith("__Host-tapeout_session=") and "Secure" in c for c in cookies)


async def test_a_wrong_password_says_nothing_about_the_address(owned: Console) -> None:
    owned.client.cookies.clear()
    for email in (EMAIL, "nobody@example.com"):
        refused = await owned.post(
            "/console/sign-in", "/console/sign-in", email=email, password="wrong wrong wrong"
        )
        assert refused.status == 401
        assert "The e-mail address or the password is wrong." in refused.text


async def test_an_address_that_no_database_holds_is_no_fault(owned: Console) -> None:
    owned.client.cookies.clear()
    form = "/console/sign-in"
    refused = await owned.post(form, form, email="a\0@example.com", password="wrong wrong wrong")
    assert refused.status in (400, 401)  # PostgreSQL refuses the value, SQLite finds nobody


async def test_strangers_send_only_small_forms(owned: Console) -> None:
    page = "/console/sign-in"
    owned.client.cookies.clear()
    data = f"csrf_token={await owned.csrf_token(page)}&password=x&email={'a' * 20_000}".encode()
    headers = {"Origin": ORIGIN, "Content-Type": "application/x-www-form-urlencoded"}
    refused = await owned.client.post(page, content=data, headers=headers)
    assert refused.status_code == 413


async def test_signing_out_ends_the_session_in_the_box(owned: Console) -> None:
    token = owned.client.cookies["tapeout_session"]
    done = await owned.post("/console/models", "/console/sign-out")
    assert done.location.startswith("/console/sign-in")
    owned.client.cookies.clear()
    owned.client.cookies.set("tapeout_session", token)
    assert (await owned.client.get("/console/models")).status_code == 303


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": f"{ORIGIN}.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {},
    ],
)
async def test_a_form_of_another_site_is_refused(owned: Console, headers: dict[str, str]) -> None:
    data = {"csrf_token": await owned.csrf_token("/console/keys"), "name": "x", "scope": "read"}
    refused = await owned.client.post("/console/keys", data=data, headers=headers)
    assert refused.status_code == 403
    assert "not sent from a page of this console" in refused.text


@pytest.mark.parametrize("token", ["", "wrong", "ü"])
async def test_a_form_without_the_sessions_token_is_refused(owned: Console, token: str) -> None:
    data = {"csrf_token": token, "name": "x", "scope": "read"}
    refused = await owned.client.post("/console/keys", data=data, headers={"Origin": ORIGIN})
    assert refused.status_code == 403
    assert "out of date" in refused.text


async def test_a_sign_in_form_needs_its_own_cookie(owned: Console) -> None:
    owned.client.cookies.clear()
    data = {"csrf_token": "made-up", "email": EMAIL, "password": PASSWORD}
    refused = await owned.client.post("/console/sign-in", data=data, headers={"Origin": ORIGIN})
    assert refused.status_code == 403


@pytest.mark.parametrize(
    "target",
    ["https://evil.example/", "//evil.example/console/", "/console/\\evil", "javascript:alert(1)"],
)
async def test_signing_in_never_leads_to_another_site(owned: Console, target: str) -> None:
    owned.client.cookies.clear()
    done = await owned.post(
        "/console/sign-in", "/console/sign-in", email=EMAIL, password=PASSWORD, next=target
    )
    assert (done.status, done.location) == (303, "/console/overview")


async def test_every_page_forbids_what_is_not_its_own(owned: Console) -> None:
    for path in (*PAGES, "/console/models/nothing"):
        answer = await owned.client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["cache-control"] == "no-store"
        for forbidden in ("<style", " style=", "onclick=", "<script>", "http://www", "https://"):
            assert forbidden not in answer.text, (path, forbidden)
