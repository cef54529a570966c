"""Large bodies: how many values they may hold, and that nobody else waits for them."""

import asyncio
import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api import large_bodies
from app.api.large_bodies import check_size
from app.api.openai_types import MAX_MESSAGES
from app.api.threads import LARGE_BODY_BYTES, convert
from app.core.errors import InvalidRequest
from tests.app.api.conftest import Box
from tests.app.api.scripted_worker import EMBEDDER

MESSAGE = {"role": "user", "content": "a"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [MESSAGE]}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "a"},
    "/v1/chat/completions": CHAT,
    "/v1/messages": CHAT | {"max_tokens": 4},
    "/v1/messages/count_tokens": CHAT,
    "/v1/responses": {"model": "tiny", "input": [MESSAGE]},
    "/v1/responses/input_tokens": {"model": "tiny", "input": [MESSAGE]},
    "/v1/embeddings": {"model": "vectors", "input": "a"},
}
TEXT = st.text(alphabet='a\\"{}[],é')
JSON = st.recursive(
    TEXT | st.integers(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=20,
)


def num_containers(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + sum(map(num_containers, inner))


def num_commas(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    inner = list(value.values() if isinstance(value, dict) else value)
    return max(0, len(inner) - 1) + sum(map(num_commas, inner))


def is_refused(
    body: bytes, max_containers: int, max_values: int, window_bytes: int = 1_000_000
) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_bodies, "WINDOW_BYTES", window_bytes)
        patch.setattr(large_bodies, "MAX_CONTAINERS", max_containers)
        patch.setattr(large_bodies, "MAX_VALUES", max_values)
        try:
            check_size(body)
        except InvalidRequest:
            return True
    return False


@given(value=JSON, is_ascii=st.booleans(), window_bytes=st.integers(1, 40))
def test_values_are_counted_and_letters_of_texts_are_not(
    value: Any, is_ascii: bool, window_bytes: int
) -> None:
    body = json.dumps(value, ensure_ascii=is_ascii).encode()
    containers, commas = num_containers(value), num_commas(value)
    assert not is_refused(body, containers, commas, window_bytes)
    assert is_refused(body, containers - 1, commas, window_bytes)
    assert is_refused(body, containers, commas - 1, window_bytes)


@given(st.binary(), st.integers(0, 3))
def test_what_is_no_json_is_left_to_the_decoder(body: bytes, limit: int) -> None:
    is_refused(body, limit, limit)


def test_counting_ends_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many values follow."""
    is_small, num_looks = large_bodies._is_small, 0

    def counted(num_containers: int, num_commas: int) -> bool:
        nonlocal num_looks
        num_looks += 1
        return is_small(num_containers, num_commas)

    monkeypatch.setattr(large_bodies, "_is_small", counted)
    body = json.dumps([{"role": "user"}] * 10_000).encode()
    assert is_refused(body, 100, 10**9, window_bytes=1000)
    assert num_looks <= 4


@pytest.mark.parametrize("path", ROUTES)
async def test_a_large_body_is_decoded_and_converted_in_a_thread(
    box: Box, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    await box.connect("vectors", EMBEDDER)
    threads: list[threading.Thread] = []
    decode = large_bodies.decode

    def watched(decoder: Any, body: bytes) -> Any:
        threads.append(threading.current_thread())
        return decode(decoder, body)

    monkeypatch.setattr(large_bodies, "decode", watched)
    text = "a" * LARGE_BODY_BYTES
    async with box.http() as http:
        await http.post(path, json=ROUTES[path])
        await http.post(path, json=ROUTES[path] | {"user": text})
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


@pytest.mark.parametrize("path", ROUTES)
async def test_a_body_of_too_many_values_is_refused(
    box: Box, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(large_bodies, "MAX_VALUES", 1000)
    body = ROUTES[path] | {"user": "a" * LARGE_BODY_BYTES, "more": [1] * 1001}
    async with box.http() as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "too_many_values"
    assert "at most 100,000 objects and lists, and 1,000 values" in answer.text


@pytest.mark.parametrize("path", [path for path in ROUTES if str(MESSAGE) in str(ROUTES[path])])
async def test_more_messages_than_a_request_may_have(box: Box, path: str) -> None:
    name = "messages" if "messages" in ROUTES[path] else "input"
    body = ROUTES[path] | {name: [MESSAGE] * (MAX_MESSAGES + 1)}
    async with box.http() as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], "10000" in error["message"]) == (name, True)


async def test_large_bodies_wait_for_no_files(no_threads: None) -> None:
    async with asyncio.timeout(10):
        assert await convert(10**6, threading.current_thread) is not threading.main_thread()
