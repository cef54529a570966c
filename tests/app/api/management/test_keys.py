"""Keys and the organization over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from litestar import Litestar

from app.api import bodies
from app.core import clock
from app.core.database import Database
from app.organizations.keys import ENVIRONMENT_KEY_ID, create_key
from app.organizations.principal import SCOPES
from tests.app.api.management.callers import Caller, make_caller
from tests.app.conftest import ADMIN_KEY


async def test_a_key_is_shown_once_and_works(client: httpx.AsyncClient, caller: Caller) -> None:
    body = {"name": "ci", "scopes": ["read"], "expires_at": "2099-01-01T00:00:00+02:00"}
    response = await client.post("/api/keys", headers=caller.headers, json=body)
    assert response.status_code == 201
    made = response.json()
    assert made["secret"].startswith("tp-")
    assert made["expires_at"].startswith("2098-12-31T22:00:00")
    listed = await client.get("/api/keys", headers=caller.headers)
    (entry,) = [key for key in listed.json()["keys"] if key["id"] == made["id"]]
    assert "secret" not in entry
    assert entry == {name: value for name, value in made.items() if name != "secret"}
    headers = {"x-api-key": made["secret"]}
    assert (await client.get("/api/models", headers=headers)).status_code == 200
    assert (await client.get("/api/keys", headers=headers)).status_code == 403


async def test_defaults_are_the_least(client: httpx.AsyncClient, caller: Caller) -> None:
    response = await client.post("/api/keys", headers=caller.headers, json={"name": "ci"})
    assert response.json()["scopes"] == ["inference"]
    assert response.json()["expires_at"] is None


async def test_revoking(
    client: httpx.AsyncClient, caller: Caller, app: Litestar, operator: dict[str, str]
) -> None:
    made = (await client.post("/api/keys", headers=caller.headers, json={"name": "ci"})).json()
    for _ in range(2):
        response = await client.delete(f"/api/keys/{made['id']}", headers=caller.headers)
        assert response.status_code == 204
    keys = (await client.get("/api/keys", headers=caller.headers)).json()["keys"]
    assert [key["revoked_at"] is not None for key in keys if key["id"] == made["id"]] == [True]
    headers = {"Authorization": f"Bearer {made['secret']}"}
    assert (await client.get("/api/models", headers=headers)).status_code == 401
    response = await client.delete(f"/api/keys/{ENVIRONMENT_KEY_ID}", headers=operator)
    assert response.json()["error"]["code"] == "environment_key"


async def test_a_request_that_arrives_after_its_key_was_revoked_does_nothing(
    client: httpx.AsyncClient, database: Database, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with database.write() as session:
        key, secret = await create_key(session, caller.organization_id, "leaked", SCOPES)

    async def trickle() -> AsyncIterator[bytes]:
        yield b'{"name": "child", '
        await client.delete(f"/api/keys/{key.id}", headers=caller.headers)
        later_ns = clock.monotonic_ns() + 2 * 10**9
        monkeypatch.setattr(clock, "monotonic_ns", lambda: later_ns)
        yield b'"scopes": ["admin"]}'

    for path in ("/api/keys", "/api/models/digits/versions"):
        headers = {"Authorization": f"Bearer {secret}"}
        late = await client.post(path, content=trickle(), headers=headers)
        assert late.status_code == 401
    listed = await client.get("/api/keys", headers=caller.headers)
    assert "child" not in listed.text


async def test_a_body_that_never_ends_is_given_up(
    client: httpx.AsyncClient, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.05)

    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    refused = await client.post("/api/keys", content=trickle(), headers=caller.headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (408, "request_timeout")


@pytest.mark.parametrize("media_type", ["application/json", "multipart/form-data; boundary=b"])
async def test_nothing_is_received_of_who_may_not_send_it(
    client: httpx.AsyncClient, database: Database, caller: Caller, media_type: str
) -> None:
    reader = await make_caller(database, caller.organization_id, frozenset({"read"}))
    received: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        received.append(b"--b--")
        yield b"--b--"

    headers = reader.headers | {"Content-Type": media_type}
    for path in ("/api/keys", "/api/models/digits/versions"):
        refused = await client.post(path, content=body(), headers=headers)
        assert refused.status_code == 403
    assert not received


async def test_nobody_gives_away_more_than_they_have(
    client: httpx.AsyncClient, database: Database, caller: Caller
) -> None:
    limited = await make_caller(database, caller.organization_id, frozenset({"admin", "read"}))
    body = {"name": "more", "scopes": ["read", "write"]}
    response = await client.post("/api/keys", headers=limited.headers, json=body)
    assert response.status_code == 403
    assert "'write'" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": 5}, "name"),
        ({"name": "x", "scopes": []}, "scopes"),
        ({"name": "x", "scopes": ["root"]}, "scopes"),
        ({"name": "x", "expires_at": "soon"}, "expires_at"),
        ({"name": "x", "expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
        ({"name": "x", "expires_at": "2099-01-01T00:00:00"}, "expires_at"),
        ({"name": "x", "expires_at": "9999-12-31T23:59:59-23:59"}, "expires_at"),
        ({"name": "x", "organization_id": "org_1"}, None),
        ([], None),
    ],
)
async def test_invalid_bodies(
    client: httpx.AsyncClient, caller: Caller, body: Any, param: str | None
) -> None:
    response = await client.post("/api/keys", headers=caller.headers, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    assert param is None or param in error["message"]


OPERATOR = {"Authorization": f"Bearer {ADMIN_KEY}"}


async def test_organization(client: httpx.AsyncClient, caller: Caller) -> None:
    state = (await client.get("/api/organization", headers=caller.headers)).json()
    assert state == {
        "id": caller.organization_id,
        "name": "acme",
        "is_operator": False,
        "currency": "usd",
        "owed_nano": 0,
        "held_nano": 0,
        "spending_limit": None,
        "spending_limit_nano": None,
    }


async def test_only_the_operator_sets_how_much_it_may_owe(
    client: httpx.AsyncClient, caller: Caller
) -> None:
    """No other organization sets its own limit: that is what it is trusted with."""
    refused = await client.patch(
        "/api/organization", headers=caller.headers, json={"spending_limit": None}
    )
    assert refused.json()["error"]["code"] == "operator_only"
    for text, shown in (("12.50", "12.50"), ("0.000000001", "0.000000001"), ("7", "7.00")):
        response = await client.patch(
            "/api/organization", headers=OPERATOR, json={"spending_limit": text}
        )
        assert response.json()["spending_limit"] == shown
        again = await client.get("/api/organization", headers=OPERATOR)
        assert again.json() == response.json()
    response = await client.patch(
        "/api/organization", headers=OPERATOR, json={"spending_limit": None}
    )
    assert response.json()["spending_limit"] is None


@pytest.mark.parametrize("limit", ["-1", "much", "1.0000000001", "9" * 30, 5, ""])
async def test_bad_limits(client: httpx.AsyncClient, limit: Any) -> None:
    response = await client.patch(
        "/api/organization", headers=OPERATOR, json={"spending_limit": limit}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "spending_limit"


async def test_a_key_is_made_with_a_limit(client: httpx.AsyncClient, caller: Caller) -> None:
    body = {"name": "ci", "limit_nano": 5_000_000_000, "limit_period": "day"}
    made = (await client.post("/api/keys", headers=caller.headers, json=body)).json()
    (limit,) = made["limits"]
    assert (limit["period"], limit["limit_nano"], limit["spent_nano"]) == ("day", 5_000_000_000, 0)
    listed = (await client.get("/api/keys", headers=caller.headers)).json()["keys"]
    assert [key["limits"] for key in listed if key["id"] == made["id"]] == [[limit]]
    for wrong in ({"limit_nano": -1}, {"limit_nano": 5, "limit_period": "year"}):
        response = await client.post(
            "/api/keys", headers=caller.headers, json={"name": "wrong", **wrong}
        )
        assert response.status_code == 400
    listed = (await client.get("/api/keys", headers=caller.headers)).json()["keys"]
    assert "wrong" not in [key["name"] for key in listed]


async def test_an_expired_key_is_told_so(
    client: httpx.AsyncClient, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"name": "ci", "scopes": ["read"], "expires_at": "2099-01-01T00:00:00Z"}
    made = (await client.post("/api/keys", headers=caller.headers, json=body)).json()
    headers = {"Authorization": f"Bearer {made['secret']}"}
    assert (await client.get("/api/models", headers=headers)).status_code == 200
    at = datetime(2099, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(clock, "now", lambda: at)
    response = await client.get("/api/models", headers=headers)
    assert response.status_code == 401
    error = response.json()["error"]
    assert error["code"] == "expired_api_key"
    assert error["message"].startswith("This API key expired at 2099-01-01 00:00 UTC.")
