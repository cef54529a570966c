"""Bodies that take their time: who sends one is asked again once it is there, on every route that
models are asked at; and one that is given up takes its connection with it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from app.api import bodies
from app.core import clock
from app.organizations.keys import create_key, revoke_key
from app.organizations.principal import Principal
from app.organizations.tables import ApiKey
from app.settings import Settings
from runtime.protocol import Embed, Generate, Predict
from tests.app.api.conftest import ORGANIZATION, Box
from tests.app.api.scripted_worker import EMBEDDER
from tests.app.test_tenancy import ROUTES
from tests.app.whole_app import URL, add_tenant, client, running

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
BODIES: dict[str, Any] = {
    "/v1/completions": {"model": "tiny", "prompt": "a b"},
    "/v1/chat/completions": CHAT,
    "/v1/messages": CHAT | {"max_tokens": 4},
    "/v1/messages/count_tokens": CHAT,
    "/v1/responses": {"model": "tiny", "input": "a"},
    "/v1/responses/input_tokens": {"model": "tiny", "input": "a"},
    "/v1/embeddings": {"model": "vectors", "input": "a"},
    "/models/doubler/predict": {"inputs": {"x": [[1.5, 2.0]], "k": [7]}},
    "/v2/models/doubler/infer": {"inputs": []},
    "/v2/repository/index": {"ready": True},
}
REFUSED = {  # whatever is sent
    "/v2/cudasharedmemory/{rest}",
    "/v2/logging",
    "/v2/models/{name}/trace/setting",
    "/v2/repository/models/{name}/load",
    "/v2/repository/models/{name}/unload",
    "/v2/systemsharedmemory/{rest}",
    "/v2/trace/setting",
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("change", ["revoked", "expired", "without scopes"])
async def test_a_key_that_ends_while_the_body_comes_asks_nothing(
    box: Box, monkeypatch: pytest.MonkeyPatch, path: str, change: str
) -> None:
    async with box.database.write() as session:
        key, secret = await create_key(session, ORGANIZATION, "leaked", frozenset({"inference"}))

    authenticate, is_known = box.key_ring.authenticate, asyncio.Event()

    async def watched(secret: str) -> Principal:
        principal = await authenticate(secret)
        is_known.set()
        return principal

    monkeypatch.setattr(box.key_ring, "authenticate", watched)

    async def end_key() -> None:
        async with box.database.write() as session:
            if change == "revoked":
                await revoke_key(session, ORGANIZATION, key.id)
                return
            value: dict[str, Any] = (
                {"expires_at": clock.now()} if change == "expired" else {"scopes": ["write"]}
            )
            await session.execute(update(ApiKey).where(ApiKey.id == key.id).values(**value))

    async def slowly() -> AsyncIterator[bytes]:
        content = httpx.Request("POST", "http://x", json=BODIES[path]).content
        yield content[:5]
        await is_known.wait()
        await end_key()
        later_ns = clock.monotonic_ns() + 2 * 10**9
        monkeypatch.setattr(clock, "monotonic_ns", lambda: later_ns)
        yield content[5:]

    if "vectors" not in box.workers:
        await box.connect("vectors", EMBEDDER)
    async with httpx.AsyncClient(base_url=box.url) as http:
        headers = {"Authorization": f"Bearer {secret}"}
        late = await http.post(path, content=slowly(), headers=headers)
    assert late.status_code == (403 if change == "without scopes" else 401), late.text
    assert not any(
        isinstance(message, Generate | Predict | Embed)
        for worker in box.workers.values()
        for message in worker.received
    )


def test_no_route_of_models_is_left_out() -> None:
    asked = {path.replace("doubler", "{name}") for path in BODIES}
    posted = {
        route.removeprefix("POST ").replace("/versions/{version}", "")
        for route in ROUTES
        if route.startswith(("POST /v1/", "POST /v2/", "POST /models/"))
    }
    assert posted - asked == REFUSED


async def test_a_key_that_lasts_is_looked_up_once(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second look costs the database nothing."""
    look_up, num_reads = box.key_ring._read_waiting, 0

    async def counted() -> None:
        nonlocal num_reads
        num_reads += 1
        await look_up()

    monkeypatch.setattr(box.key_ring, "_read_waiting", counted)
    async with box.http() as http:
        for _ in range(3):
            answer = await http.post("/v1/completions", json=BODIES["/v1/completions"])
            assert answer.status_code == 200
    assert num_reads == 1


@pytest.mark.parametrize("path", ["/v2/repository/index", "/v1/completions"])
async def test_a_body_that_is_given_up_ends_its_connection(
    box: Box, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Though its sender goes on."""
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.05)
    monkeypatch.setattr(bodies, "STALL_SECONDS", 0.05)
    host, port = httpx.URL(box.url).host, httpx.URL(box.url).port
    reader, writer = await asyncio.open_connection(host, port)

    async def send() -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: box\r\nContent-Length: 200000\r\n"
        writer.write(f"{head}Authorization: Bearer {box.keys[ORGANIZATION]}\r\n\r\n".encode())
        while True:
            writer.write(b" ")
            await asyncio.sleep(0.02)

    sending = asyncio.create_task(send())
    try:
        async with asyncio.timeout(5):
            answer = await reader.read()  # to the end of the connection
    finally:
        sending.cancel()
        await asyncio.wait([sending])
        writer.close()
    head = answer.partition(b"\r\n\r\n")[0].lower()
    assert head.startswith(b"http/1.1 408")
    assert b"\r\nconnection: close" in head


async def test_a_form_that_is_given_up_ends_its_connection(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.05)

    async def silence() -> AsyncIterator[bytes]:
        yield b"a=1"
        await asyncio.Event().wait()

    async with running(settings, has_clerk=False) as application, client(application) as http:
        tenant = await add_tenant(application, "slow")
        http.cookies.update(tenant.cookies)
        form = {"Origin": URL, "Content-Type": "application/x-www-form-urlencoded"}
        answer = await http.post("/console/account/password", headers=form, content=silence())
    assert (answer.status_code, answer.headers["connection"]) == (408, "close")
