"""What the operator's keys give others, and what they may not while they have a limit."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import pytest

from app.core import clock
from app.settings import Settings
from tests.app.conftest import ADMIN_KEY
from tests.app.whole_app import client, running

OPERATOR = {"Authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture
async def http(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with running(settings, has_clerk=False) as application, client(application) as http:
        yield http


async def key_with(http: httpx.AsyncClient, *scopes: str, **fields: Any) -> dict[str, str]:
    body = {"name": "ci", "scopes": scopes, **fields}
    made = (await http.post("/api/keys", headers=OPERATOR, json=body)).json()
    return {"Authorization": f"Bearer {made['secret']}"}


async def test_an_organizations_first_key_may_do_no_more_than_the_key_that_made_it(
    http: httpx.AsyncClient,
) -> None:
    every = ("admin", "read", "write", "inference")
    body = {"name": "acme"}
    few = await http.post("/api/organizations", headers=await key_with(http, "admin"), json=body)
    assert (few.status_code, few.json()["error"]["code"]) == (403, "missing_scope")
    tomorrow = (clock.now() + timedelta(days=1)).isoformat()
    headers = await key_with(http, *every, expires_at=tomorrow)
    made = (await http.post("/api/organizations", headers=headers, json=body)).json()
    first = {"Authorization": f"Bearer {made['secret']}"}
    (shown,) = (await http.get("/api/keys", headers=first)).json()["keys"]
    mine = (await http.get("/api/keys", headers=OPERATOR)).json()["keys"]
    assert shown["expires_at"] in {key["expires_at"] for key in mine}
    assert set(shown["scopes"]) == set(every)
