"""The memory of bodies that are on their way, of one organization and of another."""

import asyncio
import gzip
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from litestar.types import Empty
from litestar.utils.scope.state import ScopeState

from app.api import answering, large_bodies, predict_bodies
from app.api import arriving as arriving_bodies
from app.api.arriving import UNCOUNTED_BYTES, ArrivingBodies
from app.api.bodies import AnyRequest, holding_body
from app.core.errors import RateLimited
from tests.app.api.conftest import ORGANIZATION, OTHER, Box

PATHS = (
    ("/v1/completions", "application/json"),
    ("/v1/embeddings", "application/json"),
    ("/v1/messages", "application/json"),
    ("/v2/models/doubler/infer", "application/json"),
    ("/models/doubler/predict", "application/json"),
    ("/models/doubler/predict", "multipart/form-data; boundary=B"),
)
LARGE_BYTES = UNCOUNTED_BYTES + 60_000
BEGINNING = b'--B\r\nContent-Disposition: form-data; name="x"\r\n\r\n'


def test_what_has_arrived_or_was_refused_is_no_longer_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arriving_bodies, "UNCOUNTED_BYTES", 0)
    arriving = ArrivingBodies(1)
    arriving.max_bytes = 10
    with arriving.counting("a") as first:
        first(6)
        with arriving.counting("a") as second:
            second(4)
            with pytest.raises(RateLimited) as caught:
                second(1)
        assert caught.value.retry_after_seconds == 1
        assert arriving.held_bytes("a") == 6
        with arriving.counting("b") as others:
            others(10)
        first(4)
    assert arriving._held_bytes == {}


def test_what_makes_a_body_large_is_counted_alone() -> None:
    arriving = ArrivingBodies(1)
    with arriving.counting("a") as came:
        came(UNCOUNTED_BYTES - 1)
        assert arriving.held_bytes("a") == 0
        came(4)
        assert arriving.held_bytes("a") == 3
        came(4)
        assert arriving.held_bytes("a") == 7
    assert arriving._held_bytes == {}


@pytest.mark.parametrize(("path", "kind"), PATHS)
async def test_an_organization_sends_so_much_at_once(box: Box, path: str, kind: str) -> None:
    arriving: ArrivingBodies = box.app.state.arriving
    arriving.max_bytes = 100_000
    may_end = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield BEGINNING + b" " * LARGE_BYTES
        await may_end.wait()
        yield b" "

    def headers(key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {box.keys[key]}", "Content-Type": kind}

    async with httpx.AsyncClient(base_url=box.url, timeout=30) as http:
        held = asyncio.create_task(http.post(path, headers=headers(ORGANIZATION), content=slow()))
        while arriving.held_bytes(ORGANIZATION) < 60_000:
            assert not held.done(), held.result().text
            await asyncio.sleep(0.01)
        large = BEGINNING + b" " * LARGE_BYTES
        refused = await http.post(path, headers=headers(ORGANIZATION), content=large)
        others = await http.post(path, headers=headers(OTHER), content=large)
        small = await http.post(path, headers=headers(ORGANIZATION), content=BEGINNING + b" " * 99)
        may_end.set()
        assert (await held).status_code == 400
        again = await http.post(path, headers=headers(ORGANIZATION), content=large)
    assert (refused.status_code, others.status_code, again.status_code) == (429, 400, 400)
    assert small.status_code == 400
    assert refused.headers["retry-after"] == "1"
    assert "100,000 bytes" in refused.text
    assert arriving._held_bytes == {}


@pytest.mark.parametrize(
    ("path", "kind", "encoding"),
    [*((*sent, "") for sent in PATHS), *((*sent, "gzip") for sent in PATHS[3:5])],
)
async def test_a_body_is_counted_until_it_is_taken_apart(
    box: Box, monkeypatch: pytest.MonkeyPatch, path: str, kind: str, encoding: str
) -> None:
    """And as large as it was before it was packed."""
    arriving: ArrivingBodies = box.app.state.arriving
    may_go_on, waiting = threading.Event(), asyncio.Event()
    loop, take_apart = asyncio.get_running_loop(), large_bodies.check_size

    def slow(*args: Any) -> Any:
        loop.call_soon_threadsafe(waiting.set)
        assert may_go_on.wait(20)
        return take_apart(*args)

    for module in (large_bodies, predict_bodies):
        monkeypatch.setattr(module, "check_size", slow)
    large = BEGINNING + b" " * LARGE_BYTES + b"\r\n--B--\r\n"
    headers = {"Content-Type": kind} | ({"Content-Encoding": encoding} if encoding else {})
    async with box.http() as http:
        content = gzip.compress(large) if encoding else large
        sent = asyncio.create_task(http.post(path, headers=headers, content=content))
        async with asyncio.timeout(10):
            await waiting.wait()
        assert 60_000 < arriving.held_bytes(ORGANIZATION) < len(large)
        may_go_on.set()
        assert (await sent).status_code == 400
    assert arriving._held_bytes == {}


async def test_what_a_packed_body_comes_to_is_counted(box: Box) -> None:
    arriving: ArrivingBodies = box.app.state.arriving
    arriving.max_bytes = 100_000
    packed = gzip.compress(b" " * 10 * LARGE_BYTES)
    async with box.http() as http:
        for path in ("/models/doubler/predict", "/v2/models/doubler/infer"):
            answer = await http.post(path, headers={"Content-Encoding": "gzip"}, content=packed)
            assert (answer.status_code, "100,000 bytes" in answer.text) == (429, True)
    assert arriving._held_bytes == {}


async def test_a_request_keeps_no_body(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives as long as its answer, and then while its connection idles."""
    requests: list[AnyRequest] = []

    def watched(request: AnyRequest) -> Any:
        requests.append(request)
        return holding_body(request)

    monkeypatch.setattr(answering, "holding_body", watched)
    async with box.http() as http:
        body = {"model": "tiny", "prompt": "a"}
        assert (await http.post("/v1/completions", json=body)).status_code == 200
    (request,) = requests
    kept = ScopeState.from_scope(request.scope)
    assert (request._body, kept.body) == (Empty, Empty)
