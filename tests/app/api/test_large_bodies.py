"""Large bodies: how many values they may hold, and that nobody else waits for them."""

import asyncio
import json
import threading
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api import large_bodies, predict_bodies
from app.api.bodies import BOOK_BYTES, SMALL_BODY_BYTES
from app.api.large_bodies import LONG_DIGITS, TEXTS, NumbersDecoder, Size, check_size
from app.api.openai_types import MAX_MESSAGES
from app.api.threads import LARGE_BODY_BYTES, convert
from app.billing.price_changes import MAX_ITEMS
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
TEXT = st.text(alphabet='a\\"{}[],:é1eE.')
JSON = st.recursive(
    TEXT | st.integers() | st.sampled_from((1e-320, -1.5e300, 1e22, 0.25)) | st.booleans(),
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


def num_keys(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return (len(value) if isinstance(value, dict) else 0) + sum(map(num_keys, inner))


def num_exponents(value: Any) -> int:
    if isinstance(value, float):
        return "e" in repr(value)
    if not isinstance(value, dict | list):
        return 0
    return sum(map(num_exponents, value.values() if isinstance(value, dict) else value))


def is_refused(body: bytes, limit: Size, window_bytes: int = 1_000_000) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_bodies, "WINDOW_BYTES", window_bytes)
        try:
            check_size(body, limit)
        except InvalidRequest:
            return True
    return False


@given(value=JSON, is_ascii=st.booleans(), window_bytes=st.integers(1, 40))
def test_values_are_counted_and_letters_of_texts_are_not(
    value: Any, is_ascii: bool, window_bytes: int
) -> None:
    body = json.dumps(value, ensure_ascii=is_ascii).encode()
    size = Size(num_containers(value), num_keys(value), num_commas(value), num_exponents(value))
    assert not is_refused(body, size, window_bytes)
    for name, most in size._asdict().items():
        # A window may end within a number.
        is_whole = name != "num_slow"
        less = size._replace(**{name: most - 1})
        assert is_refused(body, less, window_bytes if is_whole else 1_000_000)


@given(st.binary(), st.integers(0, 3))
def test_what_is_no_json_is_left_to_the_decoder(body: bytes, limit: int) -> None:
    is_refused(body, Size(limit, limit, limit, limit))


LONG = ["9" * LONG_DIGITS + ".5", "-0." + "0" * LONG_DIGITS + "7"]


@pytest.mark.parametrize("number", ["1e5", "1E5", "1.5e-320", "0e+1", "-9.0e308", *LONG])
def test_a_slow_number_may_be_written_in_many_ways(number: str) -> None:
    body = f'[true, false, {number}, "1e5", {{"E1e": 0}}]'.encode()
    assert not is_refused(body, Size(9, 9, 9, 1))
    assert is_refused(body, Size(9, 9, 9, 0))


def test_slow_numbers_are_read_by_python() -> None:
    """Any of float64, exactly; many of them in a tenth of the decoder's own time."""
    decoder: NumbersDecoder[Any] = NumbersDecoder(Any)
    for count in (TEXTS.num_slow, TEXTS.num_slow + 1):
        numbers = [5e-324, -1.7976931348623157e308, 1e23, 0.1, 3] * count
        assert decoder.decode(json.dumps(numbers).encode()) == numbers
    long = b"[" + b"9" * LONG_DIGITS + b".5]"
    assert decoder.decode(long) == [float("9" * LONG_DIGITS)]
    used: list[str] = []

    def patient(text: str) -> float:
        used.append(text)
        return float(text)

    with pytest.MonkeyPatch.context() as patch:
        hooked = msgspec.json.Decoder(Any, float_hook=patient)
        patch.setattr(decoder, "_patient", hooked)
        decoder.decode(b"[" + b"1e9," * (TEXTS.num_slow - 1) + b"1e9]")
        assert not used
        decoder.decode(b"[" + b"1e9," * TEXTS.num_slow + b"1e9]")
    assert len(used) == TEXTS.num_slow + 1


MANY = {
    "slow": "[" + "1e-320," * 2_001 + "1]",
    "lists": "[" + "[]," * 2_001 + "1]",
    "keys": json.dumps({str(number): 1 for number in range(2_001)}),
    "numbers": "[" + "0," * 3_001 + "0]",
}


@pytest.mark.parametrize("many", MANY)
@pytest.mark.parametrize("route", ["predict", "infer", "form", "parts"])
async def test_what_holds_numbers_is_bounded_too(
    box: Box, monkeypatch: pytest.MonkeyPatch, route: str, many: str
) -> None:
    limit, text = Size(2_000, 2_000, 3_000, 2_000), MANY[many]
    monkeypatch.setattr(large_bodies, "NUMBERS", limit)
    monkeypatch.setattr(predict_bodies, "NUMBERS", limit)
    async with box.http() as http:
        if route == "predict":
            answer = await http.post("/models/doubler/predict", content=f'{{"inputs": {text}}}')
        elif route == "infer":
            body = f'{{"inputs": [{{"name": "x", "data": {text}}}]}}'
            answer = await http.post("/v2/models/doubler/infer", content=body)
        else:
            files = {"x": (None, text), "k": (None, text)}
            if route == "parts":  # each of which is below the limit
                limit = Size(4_000, 4_000, 6_000, 4_000)
                monkeypatch.setattr(predict_bodies, "NUMBERS", limit)
            answer = await http.post("/models/doubler/predict", files=files)
    assert answer.status_code == 400
    assert "too many values" in answer.text


async def test_parts_of_no_input_are_not_decoded(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict_bodies, "decode_lists", lambda *_: pytest.fail("decoded"))
    async with box.http() as http:
        files = {"x": (None, "[[1, 2]]"), "other": (None, "[1]")}
        answer = await http.post("/models/doubler/predict", files=files)
    assert (answer.status_code, "inputs.other is not an input" in answer.text) == (400, True)


async def test_a_body_for_no_model_is_small_and_bounded(box: Box) -> None:
    slow = "[" + "1e-320," * TEXTS.num_slow + "1e-320]"
    item = {"model": "*", "dimension": "input", "price_nano": 10**9, "unit_scale": 10**6}
    book = json.dumps({"items": [item] * MAX_ITEMS})  # long, if no good one
    async with box.http() as http:
        for path, most in (
            ("/api/prices", BOOK_BYTES),
            ("/api/prices/preview", BOOK_BYTES),
            ("/v2/repository/index", SMALL_BODY_BYTES),
        ):
            answers = [
                await http.post(path, content='{"items": %s}' % slow),  # noqa: UP031
                await http.post(path, content=b" " * (most + 1)),
            ]
            assert [answer.status_code for answer in answers] == [400, 413]
            assert "too many values" in answers[0].text
            assert f"at most {most:,} bytes" in answers[1].text
        answer = await http.post("/api/prices", content=book)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "items[1].dimension")


def test_counting_ends_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many values follow."""
    plus, num_looks = Size.plus, 0

    def counted(size: Size, text: bytes) -> Size:
        nonlocal num_looks
        num_looks += 1
        return plus(size, text)

    monkeypatch.setattr(Size, "plus", counted)
    body = json.dumps([{"role": "user"}] * 10_000).encode()
    assert is_refused(body, Size(100, 10**9, 10**9, 0), window_bytes=1000)
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
    limit = TEXTS._replace(num_commas=1_000)
    monkeypatch.setattr(large_bodies, "TEXTS", limit)
    body = ROUTES[path] | {"user": "a" * LARGE_BODY_BYTES, "more": [1] * 1001}
    async with box.http() as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "too_many_values"
    assert "300,000 keys, 1,000 values in all, and 1,000 numbers" in answer.text


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
