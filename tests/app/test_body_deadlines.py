"""How long the application waits for a body: every route that it has is sent one that never ends,
by somebody who may do everything."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable

import pytest
from litestar import Litestar

from app.api import bodies
from app.settings import Settings
from tests.app.tenancy_rules import NEUTRAL
from tests.app.test_tenancy import ROUTES
from tests.app.whole_app import URL, Tenant, add_tenant, client, running

FORM = "multipart/form-data; boundary=b"
BEGINNING = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n'
WAIT_SECONDS = 3.0  # by far longer than the deadline
SENDING = [route for route in ROUTES if not route.startswith(("GET", "HEAD"))]
FOR_MODELS = {f"POST /v1/{name}" for name in ("chat/completions", "completions", "embeddings")} | {
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /v1/responses",
    "POST /v1/responses/input_tokens",
}
WITH_FILES = {
    "POST /api/models/{name}/versions",
    "POST /console/models/{name}/playground",
}


async def trickle() -> AsyncIterator[bytes]:
    """A body that never ends."""
    yield BEGINNING
    while True:
        await asyncio.sleep(0.01)
        yield b"x"


async def silence() -> AsyncIterator[bytes]:
    """A body that goes no further."""
    yield BEGINNING
    await asyncio.Event().wait()


async def waits(
    application: Litestar,
    tenant: Tenant,
    route: str,
    media_type: str = FORM,
    body: Callable[[], AsyncIterator[bytes]] = trickle,
) -> bool:
    """Whether the route waits for the rest of such a body."""
    method, template = route.split(" ", 1)
    path = re.sub(r"\{(\w+)\}", lambda found: NEUTRAL.get(found[1], "none"), template)
    headers = {"Content-Type": media_type, "Origin": URL, "X-CSRF-Token": tenant.csrf_token}
    if not path.startswith("/console"):
        headers |= tenant.bearer
    async with client(application) as http:
        http.cookies.update(tenant.cookies)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await http.request(method, path, headers=headers, content=body())
        except TimeoutError:
            return True
    return False


@pytest.mark.parametrize("media_type", ["application/json", FORM])
async def test_no_body_holds_a_route_but_files_and_what_models_are_asked(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, media_type: str
) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.05)
    async with running(settings, has_clerk=False) as application:
        tenant = await add_tenant(application, "operators", is_operator=True)
        held = await asyncio.gather(
            *(waits(application, tenant, route, media_type) for route in SENDING)
        )
    may_wait = FOR_MODELS | (WITH_FILES if media_type == FORM else set())
    assert {route for route, is_held in zip(SENDING, held, strict=True) if is_held} == may_wait


@pytest.mark.parametrize("body", [silence, trickle])
async def test_files_and_what_models_are_asked_hold_no_route_once_next_to_nothing_comes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, body: Callable[[], AsyncIterator[bytes]]
) -> None:
    monkeypatch.setattr(bodies, "STALL_SECONDS", 0.05)
    async with running(settings, has_clerk=False) as application:
        tenant = await add_tenant(application, "operators", is_operator=True)
        for route in sorted(WITH_FILES):
            assert not await waits(application, tenant, route, body=body), route
        for route in sorted(FOR_MODELS):
            json = "application/json"
            assert not await waits(application, tenant, route, json, body=body), route
