"""Completions and chat through the real openai SDK, streamed and not, and what they cost."""

import asyncio
from typing import Any

import httpx
import msgspec
import openai
import pytest

from app.billing.service import set_spending_limit
from runtime.protocol import Generate
from tests.app.api.conftest import ORGANIZATION, OTHER, Box

HELLO: Any = [{"role": "user", "content": "hello there"}]
EIGHT_WORDS = "w0 w1 w2 w3 w4 w5 w6 w7 "


def lines_of(receipt: dict[str, Any]) -> dict[str, int]:
    return {line["dimension"]: line["quantity"] for line in receipt["lines"]}


async def test_a_completion_and_its_receipt(box: Box, client: openai.AsyncOpenAI) -> None:
    raw = await client.completions.with_raw_response.create(model="tiny", prompt="one two three")
    completion = raw.parse()
    assert completion.object == "text_completion"
    assert completion.id.startswith("cmpl-")
    assert completion.choices[0].text == EIGHT_WORDS
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 3
    assert completion.usage.completion_tokens == 8
    assert completion.usage.total_tokens == 11

    receipt = await box.receipt(raw.headers["x-request-id"])
    assert lines_of(receipt) == {"input": 3, "output": 8, "request": 1, "device_ms": 1}
    # 3 x 100 + 8 x 400 + 100 nano-dollars
    assert receipt["amount_nano"] == 3_600
    assert receipt["outcome"] == "completed"
    assert receipt["model"] == "tiny"
    assert receipt["version"] == 3
    assert receipt["price_book"]["sha256"] == box.prices.active.sha256
    assert receipt["first_token_ns"] <= receipt["duration_ns"]


async def test_the_second_time_the_prompt_is_cached(box: Box, client: openai.AsyncOpenAI) -> None:
    for _ in range(2):
        raw = await client.chat.completions.with_raw_response.create(model="tiny", messages=HELLO)
    usage = raw.parse().usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1 == 2
    receipt = await box.receipt(raw.headers["x-request-id"])
    assert lines_of(receipt)["cached_input"] == 2
    assert lines_of(receipt)["input"] == 1


async def test_other_organizations_share_nothing(box: Box) -> None:
    async with box.client(OTHER) as other, box.client() as ours:
        for client in (ours, other):
            answer = await client.chat.completions.create(model="tiny", messages=HELLO)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            assert answer.usage.prompt_tokens_details.cached_tokens == 0
        raw = await ours.chat.completions.with_raw_response.create(model="tiny", messages=HELLO)
    async with box.http(OTHER) as http:
        response = await http.get(f"/v1/receipts/{raw.headers['x-request-id']}")
    assert response.status_code == 404


async def test_a_chat_completion(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
        ],
        max_tokens=5,
        n=2,
        service_tier="priority",
    )
    assert answer.object == "chat.completion"
    assert answer.service_tier == "priority"
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.message.role == "assistant"
        assert choice.message.content == "w0 w1 w2 w3 w4 "
        assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10


async def test_a_chat_stream_has_openai_s_shape(box: Box) -> None:
    async with (
        box.http() as http,
        http.stream(
            "POST",
            "/v1/chat/completions",
            json={
                "model": "tiny",
                "messages": HELLO,
                "max_tokens": 2,
                "stream": True,
                "stream_options": {"include_usage": True},
                "unknown": {"is": "ignored"},
            },
        ) as response,
    ):
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        request_id = response.headers["x-request-id"]
        text = (await response.aread()).decode()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [msgspec.json.decode(event.removeprefix("data: ")) for event in events[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [
        (choice["delta"], choice["finish_reason"]) for c in chunks for choice in c["choices"]
    ] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "w0 "}, None),
        ({"content": "w1 "}, None),
        ({}, "length"),
    ]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    assert lines_of(await box.receipt(request_id))["output"] == 2


async def test_streams_through_the_sdk(client: openai.AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}, n=2
    )
    texts, usage = {0: "", 1: ""}, None
    async for chunk in chat:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: EIGHT_WORDS, 1: EIGHT_WORDS}
    assert usage is not None
    assert usage.completion_tokens == 16

    stream = await client.completions.create(model="tiny", prompt="a b", stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == EIGHT_WORDS
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


async def test_the_synchronous_sdk_works_too(box: Box) -> None:
    def ask() -> str | None:
        with openai.OpenAI(base_url=f"{box.url}/v1", api_key=box.keys[ORGANIZATION]) as client:
            stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(ask) == EIGHT_WORDS


async def test_token_ids_echo_and_extras_reach_the_worker(
    box: Box, client: openai.AsyncOpenAI
) -> None:
    await client.completions.create(
        model="tiny",
        prompt=[5, 6, 7],
        max_tokens=3,
        temperature=0,
        top_p=0,
        seed=7,
        stop=["\n", "end"],
        presence_penalty=0.5,
        logit_bias={"17": -100},
        extra_body={"ignore_eos": True, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2},
    )
    answer = await client.completions.create(model="tiny", prompt="a b ", echo=True)
    assert answer.choices[0].text == "a b " + EIGHT_WORDS
    generate = next(m for m in box.workers["tiny"].received if isinstance(m, Generate))
    sampling = generate.sampling
    assert generate.token_ids == [5, 6, 7]
    assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (0.0, 7, 3)
    assert 0 < sampling.top_p < 1e-5
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (0, 0.1, 1.2)
    assert sampling.stop == ["\n", "end"]
    assert sampling.logit_bias == {17: -100.0}
    assert sampling.ignore_eos
    assert len(generate.cache_salt) == 32  # derived: the tenant's own salt stays here


async def test_logprobs(client: openai.AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=2
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == ["w0 ", "w1 "]
    assert logprobs.content[0].bytes == list(b"w0 ")
    assert [top.logprob for top in logprobs.content[0].top_logprobs] == [-0.5, -9999.0]

    plain = await client.completions.create(model="tiny", prompt="a", logprobs=1, max_tokens=3)
    entries = plain.choices[0].logprobs
    assert entries is not None
    assert entries.tokens == ["w0 ", "w1 ", "w2 "]
    assert entries.text_offset == [0, 3, 6]
    assert entries.top_logprobs == [{"w0 ": -0.5}, {"w1 ": -0.5}, {"w2 ": -0.5}]


async def test_a_refusal_can_be_sent_again(box: Box) -> None:
    refusals: list[dict[str, Any]] = [
        {"content": None, "refusal": "I cannot."},
        {"content": [{"type": "refusal", "refusal": "I cannot."}]},
    ]
    async with box.http() as http:
        for refusal in refusals:
            said = {"role": "assistant"} | refusal
            messages = [{"role": "user", "content": "a"}, said, {"role": "user", "content": "b"}]
            body = {"model": "tiny", "messages": messages}
            response = await http.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            received = [m for m in box.workers["tiny"].received if isinstance(m, Generate)]
            told = [message.content for message in received[-1].messages or []]
            assert told == ["a", "I cannot.", "b"]


CHAT_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"min_p": 2}, "min_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ""}, "stop"),
    ({"seed": 2**64}, "seed"),
    ({"service_tier": "gold"}, "service_tier"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": "yes"}, "stream"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type",
    ),
    ({"functions": [{}]}, "functions"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"model": 5}, "model"),
]


async def test_bad_chat_parameters_are_named(box: Box) -> None:
    async with box.http() as http:
        for change, param in CHAT_ERRORS:
            body = {"model": "tiny", "messages": HELLO} | change
            response = await http.post("/v1/chat/completions", json=body)
            assert response.status_code == 400, change
            error = response.json()["error"]
            assert error["param"] == param, error
            assert error["type"] == "invalid_request_error"
            assert response.headers["x-request-id"].startswith("req_")


COMPLETION_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": [1, -1]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"suffix": "end"}, "suffix"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"best_of": 3}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"prompt": "please refuse"}, "prompt"),
]


async def test_bad_completion_parameters_are_named(box: Box) -> None:
    async with box.http() as http:
        for change, param in COMPLETION_ERRORS:
            body = {"model": "tiny", "prompt": "a"} | change
            response = await http.post("/v1/completions", json=body)
            assert response.status_code == 400, change
            assert response.json()["error"]["param"] == param, change


async def test_errors_arrive_as_the_sdk_s_classes(box: Box, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="absent", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="doubler", prompt="a")
    assert caught.value.code == "wrong_kind_of_model"
    assert "/models/doubler/predict" in caught.value.message
    assert caught.value.request_id is not None
    async with box.client("read") as reader:
        with pytest.raises(openai.PermissionDeniedError):
            await reader.completions.create(model="tiny", prompt="a")
    async with openai.AsyncOpenAI(base_url=f"{box.url}/v1", api_key="tp-wrong") as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.completions.create(model="tiny", prompt="a")
    async with box.http() as http:
        response = await http.post("/v1/completions", content=b"{nonsense")
        assert response.json()["error"]["code"] == "invalid_json"
        response = await http.post("/v1/completions", json={"prompt": "a"})
        assert response.json()["error"]["param"] == "model"
        assert (await http.get("/v1/completions")).status_code == 405


async def test_a_spent_limit_is_402_and_frees_the_replica(
    box: Box, client: openai.AsyncOpenAI
) -> None:
    async with box.database.write() as session:
        await set_spending_limit(session, ORGANIZATION, 10_000, "usd")
    with pytest.raises(openai.APIStatusError) as caught:
        await client.completions.create(model="tiny", prompt="a", max_tokens=100)
    assert caught.value.status_code == 402
    assert caught.value.code == "spending_limit_reached"
    assert caught.value.type == "insufficient_quota"
    assert "$0.000010000" in caught.value.message
    assert "$0.000030201 is missing" in caught.value.message
    answer = await client.completions.create(model="tiny", prompt="a", max_tokens=8)
    assert answer.choices[0].text == EIGHT_WORDS
    assert box.fleet.targets["tiny"].link.num_outstanding == 0


async def test_concurrent_requests_stay_within_the_limit(box: Box) -> None:
    """Each may cost 3,600 + 1 and does; 36,100 pay for ten."""
    async with box.database.write() as session:
        await set_spending_limit(session, ORGANIZATION, 33_100, "usd")
    async with box.client(http_client=httpx.AsyncClient(limits=httpx.Limits())) as client:
        answers = await asyncio.gather(
            *(
                client.completions.create(model="tiny", prompt="one word more", max_tokens=8)
                for _ in range(60)
            ),
            return_exceptions=True,
        )
    served = [answer for answer in answers if not isinstance(answer, BaseException)]
    refused = [answer for answer in answers if isinstance(answer, openai.APIStatusError)]
    assert len(served) + len(refused) == 60
    assert {error.status_code for error in refused} == {402}
    async with box.http() as http:
        usage = (await http.get("/api/usage")).json()
    assert usage["owed_nano"] == usage["total_nano"] <= 33_100
    assert usage["held_nano"] == 0
    assert usage["rows"][0]["requests"] == len(served) >= 9


async def test_models_are_listed_to_those_who_may_call_or_read(box: Box) -> None:
    async with box.client("read") as client:
        assert [model.id async for model in client.models.list()] == []
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("tiny")
