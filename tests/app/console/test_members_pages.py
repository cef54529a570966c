"""The pages Members and Your account, and the page behind an invitation."""

import re
from collections.abc import AsyncIterator

import httpx
import pytest
from litestar.testing import AsyncTestClient
from sqlalchemy import select, update

from app.console import live
from app.organizations.people import create_person, hashed
from app.organizations.service import create_organization
from app.organizations.tables import ApiKey, Invitation, Membership, User
from tests.app.console.conftest import EMAIL, ORIGIN, PASSWORD, Console
from tests.app.console.samples import add_model, organization_id

HERE = "/console/members"
BOB = "bob@example.com"


def link_in(page: str) -> str:
    found = re.search(r'id="link" readonly value="([^"]+)"', page)
    assert found, page
    assert found[1].startswith(ORIGIN)
    return found[1].removeprefix(ORIGIN)


async def invited(owned: Console, role: str, note: str = "") -> str:
    made = await owned.post(HERE, f"{HERE}/invitations", role=role, hours="24", note=note)
    assert made.status == 200, made.text
    return link_in(made.text)


async def joined(owned: Console, role: str, email: str = BOB) -> Console:
    """Somebody else's browser, after they followed a link."""
    link = await invited(owned, role)
    client = AsyncTestClient(owned.client.app)
    client.follow_redirects = False
    other = Console(
        client, owned.database, owned.storage, owned.builder, owned.optimiser, owned.setup_token
    )
    done = await other.post(link, link, email=email, password=PASSWORD)
    assert done.status == 303, done.text
    return other


async def user_id(console: Console, email: str) -> str:
    async with console.database.read() as session:
        found = await session.scalar(select(User.id).where(User.email == email))
    assert found is not None
    return found


async def test_a_link_is_shown_once_and_lets_one_person_in(owned: Console) -> None:
    made = await owned.post(
        HERE, f"{HERE}/invitations", role="viewer", hours="72", note="Bob of sales"
    )
    link = link_in(made.text)
    listed = (await owned.client.get(HERE)).text
    assert "Bob of sales" in listed
    assert link.rsplit("/", 1)[1] not in listed
    owned.client.cookies.clear()
    page = await owned.client.get(link)
    assert "You are invited as viewer" in page.text
    for email, password, said in (
        (BOB, "short", "at least 10 characters"),
        (EMAIL, "not the password", "not its password"),
    ):
        refused = await owned.post(link, link, email=email, password=password)
        assert refused.status == 400
        assert said in refused.text
    done = await owned.post(link, link, email=BOB, password=PASSWORD)
    assert done.status == 303
    assert BOB in (await owned.client.get(HERE)).text
    again = await owned.client.get(link)
    assert again.status_code == 403
    assert "was used, was revoked, or has ended" in again.text


async def test_a_form_that_arrives_after_its_sender_was_removed_does_nothing(
    owned: Console,
) -> None:
    bob = await joined(owned, "admin")
    token = await bob.csrf_token("/console/account")
    bob_id = await user_id(owned, BOB)

    async def trickle() -> AsyncIterator[bytes]:
        yield b"name=back+door&sco"
        gone = await owned.post(HERE, f"{HERE}/{bob_id}/remove")
        assert gone.status == 303
        yield b"pe=admin&period=month"

    headers = {
        "Origin": ORIGIN,
        "X-CSRF-Token": token,
        "Cookie": "; ".join(f"{name}={value}" for name, value in bob.client.cookies.items()),
        "Content-Type": "application/x-www-form-urlencoded",
    }
    transport = httpx.ASGITransport(owned.client.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url=ORIGIN) as client:
        late = await client.post("/console/keys", content=trickle(), headers=headers)
    assert (late.status_code, late.headers["location"]) == (303, "/console/sign-in")
    async with owned.database.read() as session:
        assert await session.scalar(select(ApiKey.id).where(ApiKey.name == "back door")) is None


async def test_a_revoked_link_leads_nowhere(owned: Console) -> None:
    link = await invited(owned, "member", "Eve")
    async with owned.database.read() as session:
        invitation_id = await session.scalar(select(Invitation.id))
    done = await owned.post(HERE, f"{HERE}/invitations/{invitation_id}/revoke")
    assert done.location == f"{HERE}?notice=invitation-revoked"
    assert (await owned.client.get(link)).status_code == 403
    assert "Eve" not in (await owned.client.get(HERE)).text


async def test_a_viewer_looks_and_no_more(owned: Console) -> None:
    viewer = await joined(owned, "viewer")
    page = (await viewer.client.get(HERE)).text
    assert EMAIL in page
    for button in ("Remove", "Make a one-time link", "Change</button>", "/console/upload"):
        assert button not in page, button
    for path, status in (
        ("/console/models", 200),
        ("/console/usage", 200),
        ("/console/upload", 403),
        ("/console/keys", 403),
    ):
        assert (await viewer.client.get(path)).status_code == status, path


async def test_removal_is_felt_at_once(owned: Console) -> None:
    bob = await joined(owned, "member")
    id = await user_id(owned, BOB)
    page = await owned.client.get(f"{HERE}/{id}/remove")
    assert "goes on working until you" in page.text
    assert (await bob.client.get("/console/models")).status_code == 200
    done = await owned.post(HERE, f"{HERE}/{id}/remove")
    assert done.location == f"{HERE}?notice=removed"
    gone = await bob.client.get("/console/models")
    assert (gone.status_code, gone.headers["location"][:16]) == (303, "/console/sign-in")


async def test_an_open_page_ends_with_the_membership(
    owned: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(live, "SETTLE_SECONDS", 0)
    async with owned.database.write() as session:
        await add_model(session, "running", "building")
    bob = await joined(owned, "member")
    id = await user_id(owned, BOB)
    read = live.read_model

    async def read_and_remove(*arguments: object) -> object:
        view = await read(*arguments)  # type: ignore[arg-type]
        async with owned.database.write() as session:
            await session.execute(update(Membership).values(role="owner"))
            membership = await session.scalar(select(Membership).where(Membership.user_id == id))
            if membership is not None:
                await session.delete(membership)
        return view

    monkeypatch.setattr(live, "read_model", read_and_remove)
    # The stream ends by itself, or this would wait for ten minutes.
    answer = await bob.client.get("/console/models/running/versions/1/events")
    assert "event: done" in answer.text


async def test_roles_change_and_the_last_owner_stays(owned: Console) -> None:
    await joined(owned, "admin")
    bob, me = await user_id(owned, BOB), await user_id(owned, EMAIL)
    for path in (f"{HERE}/{me}/role", "/console/account/leave", f"{HERE}/{me}/remove"):
        refused = await owned.post(HERE, path, role="viewer")
        assert refused.status == 409, path
        assert "The last owner stays: make another member owner first." in refused.text
    done = await owned.post(HERE, f"{HERE}/{bob}/role", role="owner")
    assert done.location == f"{HERE}?notice=role"
    left = await owned.post("/console/account", "/console/account/leave")
    assert left.location == "/console/sign-in?notice=left"
    assert (await owned.client.get(HERE)).status_code == 303


async def test_going_to_another_organization(owned: Console) -> None:
    async with owned.database.write() as session:
        acme = await create_organization(session, "acme")
        session.add(
            Membership(
                id="member_acme",
                user_id=await user_id(owned, EMAIL),
                organization_id=acme.id,
                role="viewer",
                created_at=acme.created_at,
            )
        )
        other = await create_organization(session, "other")
        await create_person(session, other.id, "o@example.com", await hashed(PASSWORD), "owner")
    page = "/console/account"
    refused = await owned.post(page, f"{page}/organization", organization_id=other.id)
    assert refused.status == 403
    done = await owned.post(page, f"{page}/organization", organization_id=acme.id)
    assert done.status == 303
    text = (await owned.client.get(page)).text
    assert f"{EMAIL}, viewer of acme" in text
    async with owned.database.read() as session:
        home = await organization_id(session)
    assert (await owned.post(page, f"{page}/organization", organization_id=home)).status == 303


async def test_a_new_password_ends_other_sessions(owned: Console) -> None:
    page = "/console/account"
    cookies = dict(owned.client.cookies)
    owned.client.cookies.clear()
    done = await owned.post(
        "/console/sign-in", "/console/sign-in", email=EMAIL, password=PASSWORD, next=""
    )
    assert done.status == 303
    for old, new, said in (
        ("wrong", "another four words", "not your present password"),
        (PASSWORD, "short", "at least 10 characters"),
    ):
        refused = await owned.post(page, f"{page}/password", old=old, password=new)
        assert refused.status == 400
        assert said in refused.text
    done = await owned.post(page, f"{page}/password", old=PASSWORD, password="another four words")
    assert done.location == f"{page}?notice=password"
    assert (await owned.client.get(page)).status_code == 200
    owned.client.cookies.clear()
    owned.client.cookies.update(cookies)
    assert (await owned.client.get(page)).status_code == 303
