"""Members, invitations and the recommended model over HTTP, over the whole application."""

from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest
from litestar import Litestar

from app.settings import Settings
from tests.app.console.samples import add_model
from tests.app.whole_app import URL, Tenant, add_tenant, client, form_token, running


class Place(msgspec.Struct):
    application: Litestar
    http: httpx.AsyncClient
    operator: Tenant
    customer: Tenant


@pytest.fixture
async def place(settings: Settings) -> AsyncIterator[Place]:
    async with running(settings, has_clerk=False) as application, client(application) as http:
        operator = await add_tenant(application, "operators", is_operator=True)
        customer = await add_tenant(application, "acme")
        yield Place(application, http, operator, customer)


async def join(place: Place, url: str, email: str) -> httpx.Response:
    """Follows a link as somebody without a session."""
    path = url[url.index("/console/") :]
    async with client(place.application) as stranger:
        page = await stranger.get(path)
        assert page.status_code == 200, page.text
        form = {"csrf_token": form_token(page.text), "email": email, "password": "four words here"}
        return await stranger.post(path, data=form, headers={"Origin": URL})


async def test_members_come_change_and_go(place: Place) -> None:
    http, headers = place.http, place.customer.bearer
    body = {"role": "viewer", "note": "Bob", "hours": 2}
    made = await http.post("/api/members/invitations", headers=headers, json=body)
    assert made.status_code == 201, made.text
    listed = (await http.get("/api/members/invitations", headers=headers)).json()["invitations"]
    assert listed == [{name: made.json()[name] for name in listed[0]}]
    assert "url" not in listed[0]
    assert (await join(place, made.json()["url"], "bob@acme.example")).status_code == 303
    members = (await http.get("/api/members", headers=headers)).json()["members"]
    assert [(each["email"], each["role"]) for each in members] == [
        ("acme@example.com", "owner"),
        ("bob@acme.example", "viewer"),
    ]
    owner, bob = members
    path = f"/api/members/{bob['user_id']}"
    changed = await http.patch(path, headers=headers, json={"role": "admin"})
    assert changed.json()["role"] == "admin"
    for method, target, sent, status, code in (
        ("PATCH", path, {"role": "owner"}, 403, "owner_only"),
        ("PATCH", path, {"role": "emperor"}, 400, "invalid_value"),
        ("DELETE", f"/api/members/{owner['user_id']}", None, 403, "owner_only"),
        ("DELETE", "/api/members/user_none", None, 404, "not_found"),
        ("POST", "/api/members/invitations", {"role": "owner"}, 403, "owner_only"),
        ("POST", "/api/members/invitations", {"hours": 10**9}, 400, "invalid_value"),
    ):
        refused = await http.request(method, target, headers=headers, json=sent)
        assert (refused.status_code, refused.json()["error"]["code"]) == (status, code), target
    assert (await http.delete(path, headers=headers)).status_code == 204
    assert len((await http.get("/api/members", headers=headers)).json()["members"]) == 1


async def test_a_revoked_link_is_over(place: Place) -> None:
    http, headers = place.http, place.customer.bearer
    made = (await http.post("/api/members/invitations", headers=headers, json={})).json()
    path = f"/api/members/invitations/{made['id']}"
    assert (await http.delete(path, headers=place.operator.bearer)).status_code == 404
    assert (await http.delete(path, headers=headers)).status_code == 204
    assert (await http.delete(path, headers=headers)).status_code == 404
    page = await http.get(made["url"][made["url"].index("/console/") :])
    assert page.status_code == 403


async def test_the_operator_recommends_a_model(place: Place) -> None:
    http, path = place.http, "/api/default-model"
    async with place.application.state.database.write() as session:
        await add_model(session, "digits", owner="operators")
    for headers in (place.operator.bearer, place.customer.bearer):
        missing = await http.get(path, headers=headers)
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "no_default_model")
    body = {"model": "digits", "note": "reads digits best"}
    refused = await http.put(path, headers=place.customer.bearer, json=body)
    assert refused.json()["error"]["code"] == "operator_only"
    chosen = await http.put(path, headers=place.operator.bearer, json=body)
    assert (chosen.json()["model"], chosen.json()["is_public"]) == ("digits", False)
    # Not published: others can no more call it than see it.
    assert (await http.get(path, headers=place.customer.bearer)).status_code == 404
    published = await http.patch(
        "/api/endpoints/digits", headers=place.operator.bearer, json={"is_public": True}
    )
    assert published.json()["is_default"] is True
    limit = {"name": "ci", "scopes": ["admin", "write"], "limit_nano": 10**9}
    key = (await http.post("/api/keys", headers=place.operator.bearer, json=limit)).json()
    limited = {"Authorization": f"Bearer {key['secret']}"}
    refused = await http.patch("/api/endpoints/digits", headers=limited, json={"is_default": False})
    assert refused.json()["error"]["code"] == "key_limited"
    shown = (await http.get(path, headers=place.customer.bearer)).json()
    assert (shown["model"], shown["note"]) == ("digits", "reads digits best")
    assert (await http.delete(path, headers=place.operator.bearer)).status_code == 204
    assert (await http.get(path, headers=place.operator.bearer)).status_code == 404


async def test_a_key_with_a_limit_does_nothing_that_would_lift_it(place: Place) -> None:
    http = place.http
    body = {"name": "ci", "scopes": ["admin", "read"], "limit_nano": 10**9}
    made = (await http.post("/api/keys", headers=place.customer.bearer, json=body)).json()
    headers = {"Authorization": f"Bearer {made['secret']}"}
    before = (await http.get("/api/budgets", headers=headers)).json()
    (limit,) = before["budgets"]
    raised = {"scope": "key", "subject": made["id"], "period": "month", "limit_nano": 10**12}
    for method, path, json in (
        ("POST", "/api/keys", {"name": "more"}),
        ("PUT", "/api/budgets", raised),
        ("DELETE", f"/api/budgets/{limit['id']}", None),
        ("POST", "/api/members/invitations", {"role": "admin"}),
        ("PATCH", "/api/members/user_x", {"role": "admin"}),
    ):
        refused = await http.request(method, path, headers=headers, json=json)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "key_limited"), path
    assert (await http.get("/api/budgets", headers=headers)).json() == before


async def test_a_limit_ends_the_links_that_its_key_made(place: Place) -> None:
    http, owner = place.http, place.customer
    mine = (await http.post("/api/members/invitations", headers=owner.bearer, json={})).json()
    http.cookies.update(owner.cookies)
    form = {"headers": {"Origin": URL, "X-CSRF-Token": owner.csrf_token}}
    limit = {"limit": "5", "period": "day"}
    of_key = {"scope": "key", "period": "day", "limit_nano": 10**9}
    for method, path, sent in (
        ("PUT", "/api/budgets", {"headers": owner.bearer, "json": of_key}),
        ("POST", "/console/keys/{id}/limit", form | {"data": limit}),
        ("POST", "/console/billing/budgets", form | {"data": limit}),
    ):
        body = {"name": "ci", "scopes": ["admin", "read", "write", "inference"]}
        key = (await http.post("/api/keys", headers=owner.bearer, json=body)).json()
        headers = {"Authorization": f"Bearer {key['secret']}"}
        body = {"role": "admin"}
        made = await http.post("/api/members/invitations", headers=headers, json=body)
        assert made.status_code == 201
        of_key["subject"], limit["of"] = key["id"], f"key:{key['id']}"
        done = await http.request(method, path.format(id=key["id"]), **sent)
        assert done.status_code in (200, 303), done.text
        link = made.json()["url"]
        assert (await http.get(link[link.index("/console/") :])).status_code == 403, path
    listed = (await http.get("/api/members/invitations", headers=owner.bearer)).json()
    assert [each["id"] for each in listed["invitations"]] == [mine["id"]]
