"""Embeddings through the openai SDK and plain HTTP: shapes, refusals, and what they cost."""

import asyncio
import base64
import struct
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from app.billing.service import set_spending_limit
from app.metering.journal import read_unsettled
from runtime.protocol import Embed
from tests.app.api.conftest import ORGANIZATION, Box
from tests.app.api.scripted_worker import EMBEDDER

TOKEN_NANO = 100  # ten cents per million
REQUEST_NANO = 100


@pytest.fixture
async def box(box: Box) -> Box:
    await box.connect("vectors", EMBEDDER)
    return box


@pytest.fixture
async def http(box: Box) -> AsyncIterator[httpx.AsyncClient]:
    async with box.http() as http:
        yield http


async def embed(http: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await http.post("/v1/embeddings", json={"model": "vectors", **body})


async def test_the_openai_sdk_gets_vectors_and_usage(box: Box, client: openai.AsyncOpenAI) -> None:
    """It asks for base64 unless told otherwise."""
    for options in ({}, {"encoding_format": "float"}):
        answer = await client.embeddings.create(
            model="vectors", input=["one two", "three"], **options
        )
        assert [item.embedding for item in answer.data] == [[3, 4, 0, 0], [3, 4, 1, 0]]
        assert [item.index for item in answer.data] == [0, 1]
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (7, 7)
        assert (answer.model, answer.object, answer.data[0].object) == (
            "vectors",
            "list",
            "embedding",
        )


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ("one two", [4]),
        (["one two"], [4]),
        (["one", "one two three"], [3, 5]),
        ([5, 6, 7], [3]),
        ([[5, 6, 7], [8]], [3, 1]),
    ],
)
async def test_every_form_of_input(
    box: Box, http: httpx.AsyncClient, given: Any, counts: list[int]
) -> None:
    response = await embed(http, input=given)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert len(answer["data"]) == len(counts)
    assert answer["usage"] == {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
    receipt = await box.receipt(response.headers["x-request-id"])
    assert receipt["amount_nano"] == sum(counts) * TOKEN_NANO + REQUEST_NANO
    assert (receipt["outcome"], receipt["route"]) == ("completed", "/v1/embeddings")
    (sent,) = [m for m in box.workers["vectors"].received if isinstance(m, Embed)]
    assert sent.fairness_key == ORGANIZATION


async def test_base64_is_little_endian_float32(http: httpx.AsyncClient) -> None:
    answer = (await embed(http, input="x", encoding_format="base64")).json()
    data = base64.b64decode(answer["data"][0]["embedding"])
    assert struct.unpack("<4f", data) == (3, 4, 0, 0)


async def test_declared_dimensions_are_cut_and_of_length_one(http: httpx.AsyncClient) -> None:
    answer = (await embed(http, input="x", dimensions=2)).json()
    assert answer["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    answer = (await embed(http, input="x", dimensions=4)).json()
    assert answer["data"][0]["embedding"] == [3, 4, 0, 0]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({}, "input", "required"),
    ({"input": []}, "input", "empty"),
    ({"input": ""}, "input", "input[0] is empty"),
    ({"input": ["a", ""]}, "input", "input[1] is empty"),
    ({"input": [[1], []]}, "input", "input[1] is empty"),
    ({"input": ["a", 1]}, "input", "a list of texts"),
    ({"input": [1, [2]]}, "input", "a list of texts"),
    ({"input": [-1]}, "input", "0 or more"),
    ({"input": [1.5]}, "input[0]", "expected"),
    ({"input": {"a": 1}}, "input", "expected"),
    ({"input": ["x"] * 2049}, "input", "2048"),
    ({"input": ["a", "one two three four five six seven"]}, "input", "input[1] has 9 tokens"),
    ({"input": "x", "encoding_format": "hex"}, "encoding_format", "hex"),
    ({"input": "x", "dimensions": 0}, "dimensions", "1"),
    ({"input": "x", "dimensions": 3}, "dimensions", "cut to 2"),
    ({"input": "x", "dimensions": 5}, "dimensions", "have 4 numbers"),
]


@pytest.mark.parametrize(("body", "param", "words"), WRONG)
async def test_what_is_wrong_is_named_and_free(
    box: Box, http: httpx.AsyncClient, body: dict[str, Any], param: str, words: str
) -> None:
    response = await embed(http, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], words in error["message"]) == (param, True), error
    assert (await http.get("/api/usage")).json()["rows"] == []


async def test_each_kind_of_model_names_the_route_for_it(http: httpx.AsyncClient) -> None:
    for route, body in (
        ("/v1/completions", {"model": "vectors", "prompt": "x"}),
        ("/models/vectors/predict", {"inputs": []}),
    ):
        error = (await http.post(route, json=body)).json()["error"]
        assert error["code"] == "wrong_kind_of_model"
        assert "/v1/embeddings" in error["message"]
    error = (await embed(http, model="tiny", input="x")).json()["error"]
    assert error["code"] == "wrong_kind_of_model"
    assert "decoder" in error["message"]


async def test_the_money_comes_first(box: Box, http: httpx.AsyncClient) -> None:
    """Four tokens and the request itself, and the nano by which rounding lines may exceed them."""
    async with box.database.write() as session:
        await set_spending_limit(session, ORGANIZATION, 500, "usd")
    response = await embed(http, input="one two")
    assert response.status_code == 402
    async with box.database.write() as session:
        await set_spending_limit(session, ORGANIZATION, 501, "usd")
    assert (await embed(http, input="one two")).status_code == 200


@pytest.mark.parametrize(
    ("text", "status", "code"),
    [
        ("fail", 500, "unlucky"),
        ("die", 503, "worker_lost"),
        ("lie", 503, "worker_untrusted"),
    ],
)
async def test_a_failure_is_recorded_and_free(
    box: Box, http: httpx.AsyncClient, text: str, status: int, code: str
) -> None:
    response = await embed(http, input=[text])
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    receipt = await box.receipt(response.headers["x-request-id"])
    assert (receipt["outcome"], receipt["amount_nano"]) == ("failed", 0)
    assert box.fleet.targets["vectors"].link.num_outstanding == 0


async def test_a_client_that_leaves_pays_for_what_ran(box: Box, http: httpx.AsyncClient) -> None:
    """The first of three texts, of three tokens, had run."""
    link = box.fleet.targets["vectors"].link
    with pytest.raises(httpx.TimeoutException):
        await http.post(
            "/v1/embeddings",
            json={"model": "vectors", "input": ["hang", "one two", "three"]},
            headers={"x-request-id": "left"},
            timeout=0.2,
        )
    while link.num_outstanding:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)
    await box.accounts.flush()
    (row,) = (await http.get("/api/usage")).json()["rows"]
    assert (row["requests"], row["input"]) == (1, 3)
    assert row["amount_nano"] == 3 * TOKEN_NANO + REQUEST_NANO


async def test_a_timeout_is_free_and_stops_the_work(box: Box) -> None:
    await box.stop()
    box.timeout_seconds = 0.2
    await box.start()
    await box.connect("vectors", EMBEDDER)
    async with box.http() as http:
        response = await embed(http, input=["hang"])
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    receipt = await box.receipt(response.headers["x-request-id"])
    assert (receipt["outcome"], receipt["amount_nano"]) == ("failed", 0)
    while box.fleet.targets["vectors"].link.num_outstanding:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def test_the_journal_alone_tells_what_an_answer_cost(
    box: Box, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a crash right after the answer leaves behind."""
    monkeypatch.setattr(box.accounts, "settle", lambda _: None)
    response = await embed(http, input=["one two"])
    assert response.status_code == 200
    usages = read_unsettled(box.storage.journal_dir).usages
    (usage,) = [u for u in usages if u.admitted.kind == "embedder"]
    assert (usage.outcome, usage.input_tokens, usage.output_tokens) == ("completed", 4, 0)
