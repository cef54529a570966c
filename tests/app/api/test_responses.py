"""`/v1/responses` through the real openai SDK: what reaches the worker, what comes back, and what
is refused."""

import asyncio
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from runtime.protocol import ChatMessage, Generate, Tool, ToolCall
from tests.app.api.conftest import ORGANIZATION, Box

EIGHT_WORDS = "w0 w1 w2 w3 w4 w5 w6 w7 "
PARAMETERS = {"type": "object", "properties": {"b": {}, "a": {}}}
TOOL: Any = {"type": "function", "name": "look_up", "parameters": PARAMETERS, "strict": True}


def last_generate(box: Box) -> Generate:
    return [each for each in box.workers["tiny"].received if isinstance(each, Generate)][-1]


async def test_a_response_and_its_receipt(box: Box, client: openai.AsyncOpenAI) -> None:
    for _ in range(2):
        raw = await client.responses.with_raw_response.create(
            model="tiny",
            input="hello there",
            instructions="be brief",
            metadata={"run": "7"},
            temperature=0.5,
            service_tier="priority",
        )
    response = raw.parse()
    assert response.id.startswith("resp_")
    assert response.object == "response"
    assert response.status == "completed"
    assert response.output_text == EIGHT_WORDS
    (message,) = response.output
    assert message.type == "message"
    assert (message.role, message.status) == ("assistant", "completed")
    assert response.metadata == {"run": "7"}
    assert response.instructions == "be brief"
    assert response.temperature == 0.5
    assert response.service_tier == "priority"
    assert response.model_extra is not None
    assert response.model_extra["store"] is False
    assert response.usage is not None
    assert response.usage.input_tokens == 6
    assert response.usage.input_tokens_details.cached_tokens == 5
    assert (response.usage.output_tokens, response.usage.total_tokens) == (8, 14)
    assert last_generate(box).messages == [
        ChatMessage(role="system", content="be brief"),
        ChatMessage(role="user", content="hello there"),
    ]
    receipt = await box.receipt(raw.headers["x-request-id"])
    quantities = {line["dimension"]: line["quantity"] for line in receipt["lines"]}
    assert quantities["cached_input"] == 5
    assert (quantities["input"], quantities["output"]) == (1, 8)
    assert receipt["outcome"] == "completed"


async def test_a_limit_makes_it_incomplete(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(model="tiny", input="a", max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "w0 w1 "
    assert response.max_output_tokens == 2


async def test_a_stream_has_openai_s_events_in_openai_s_order(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(model="tiny", input="a", stream=True)
    events = [event async for event in stream]
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 8,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == EIGHT_WORDS
    assert last.response.usage is not None
    assert last.response.usage.output_tokens == 8
    cut = await client.responses.create(model="tiny", input="a", stream=True, max_output_tokens=1)
    assert [event.type async for event in cut][-1] == "response.incomplete"


async def test_the_sdk_s_helper_accepts_streams_of_calls(
    box: Box, client: openai.AsyncOpenAI
) -> None:
    async with client.responses.stream(
        model="tiny", input="a", tools=[TOOL], tool_choice="required"
    ) as stream:
        types = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert types[-9:] == [
        *(
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
        )
        * 2,
        "response.completed",
    ]
    message, first, second = final.output
    assert message.type == "message"
    assert final.output_text == "w0 "
    assert first.type == second.type == "function_call"
    assert (first.call_id, second.call_id) == ("call_1", "call_2")
    assert first.name == "look_up"
    assert first.arguments == '{"at": 1}'
    whole = await client.responses.create(
        model="tiny", input="a", tools=[TOOL], tool_choice={"type": "function", "name": "look_up"}
    )
    assert [item.type for item in whole.output] == ["message", "function_call", "function_call"]
    generate = last_generate(box)
    assert generate.tool_choice == "function:look_up"
    assert generate.tools == [
        Tool(name="look_up", parameters='{"type":"object","properties":{"b":{},"a":{}}}')
    ]
    assert whole.tools[0].to_dict()["parameters"] == PARAMETERS


async def test_what_was_answered_can_be_sent_again(box: Box, client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(
        model="tiny", input="a", tools=[TOOL], tool_choice="required"
    )
    items: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        *first.output,
        {"type": "function_call_output", "call_id": "call_1", "output": "42"},
        {
            "type": "function_call_output",
            "call_id": "call_2",
            "output": [{"type": "input_text", "text": "43"}],
        },
    ]
    await client.responses.create(model="tiny", input=items, parallel_tool_calls=False)
    assert last_generate(box).messages == [
        ChatMessage(role="system", content="be brief"),
        ChatMessage(role="user", content="a"),
        ChatMessage(
            role="assistant",
            content="w0 ",
            tool_calls=[
                ToolCall(id=f"call_{at}", name="look_up", arguments=f'{{"at": {at}}}')
                for at in (1, 2)
            ],
        ),
        ChatMessage(role="tool", content="42", tool_call_id="call_1"),
        ChatMessage(role="tool", content="43", tool_call_id="call_2"),
    ]
    assert not last_generate(box).allows_several_calls


class Place(BaseModel):
    x: int


async def test_a_format_reaches_the_worker(box: Box, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(ValueError, match="Place"):  # the scripted worker answers no JSON
        await client.responses.parse(model="tiny", input="a", text_format=Place)
    assert '"x":{"title":"X","type":"integer"}' in (last_generate(box).json_schema or "")
    response = await client.responses.create(
        model="tiny", input="a", text={"format": {"type": "json_object"}, "verbosity": "low"}
    )
    assert last_generate(box).json_schema == "{}"
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == "json_object"


async def test_logprobs(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(
        model="tiny",
        input="a",
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        max_output_tokens=2,
    )
    (message,) = response.output
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert [entry.token for entry in part.logprobs] == ["w0 ", "w1 "]
    assert len(part.logprobs[0].top_logprobs) == 2


async def test_input_tokens_are_counted_for_nothing(box: Box, client: openai.AsyncOpenAI) -> None:
    counted = await client.responses.input_tokens.count(model="tiny", input="one two three")
    assert counted.input_tokens == 4
    assert box.fleet.targets["tiny"].link.num_outstanding == 0
    async with box.http() as http:
        assert (await http.get("/api/usage")).json()["rows"] == []


async def test_a_failing_stream_raises(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(model="tiny", input="fail@3", stream=True)
    texts: list[str] = []

    async def read() -> None:
        async for event in stream:
            if event.type == "response.output_text.delta":
                texts.append(event.delta)

    with pytest.raises(openai.APIError, match="ran out of memory"):
        await read()
    assert texts == ["w0 ", "w1 ", "w2 "]


async def test_the_synchronous_sdk_works_too(box: Box) -> None:
    def ask() -> str:
        with openai.OpenAI(base_url=f"{box.url}/v1", api_key=box.keys[ORGANIZATION]) as client:
            return client.responses.create(model="tiny", input="a").output_text

    assert await asyncio.to_thread(ask) == EIGHT_WORDS


def message(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": list(parts)} | fields]}


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    (message({"type": "input_image", "image_url": "x"}), "input[0].content[0].type"),
    (message({"type": "input_text"}), "input[0].content[0].text"),
    (message(role=None), "input[0].role"),
    (message(role="tool"), "input[0].role"),
    (message(content=None), "input[0].content"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"input": "please refuse"}, "prompt"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"n": 2}, "n"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "f", "parameters": 5}]}, "tools[0].parameters"),
    ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"text": {"format": {"type": "xml"}}}, "text.format"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": 5}}}, "text.format"),
    ({"metadata": {"x": 5}}, "metadata[...]"),
    ({"service_tier": "gold"}, "service_tier"),
]


async def test_bad_parameters_are_named(box: Box) -> None:
    async with box.http() as http:
        for change, param in ERRORS:
            response = await http.post(
                "/v1/responses", json={"model": "tiny", "input": "a"} | change
            )
            assert response.status_code == 400, (change, response.text)
            error = response.json()["error"]
            assert error["param"] == param, (change, error)
            assert error["type"] == "invalid_request_error"


async def test_no_answer_is_kept(box: Box, client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(model="tiny", input="a", store=True)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(response.id)
    async with httpx.AsyncClient(base_url=box.url) as stranger:
        answer = await stranger.post("/v1/responses", json={"model": "tiny", "input": "a"})
    assert answer.status_code == 401
