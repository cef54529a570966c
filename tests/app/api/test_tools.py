"""Tools and answer formats in OpenAI's shape: what reaches the worker, and what comes back."""

from typing import Any

import openai
import pytest

from runtime.protocol import Generate, Tool, ToolCall
from tests.app.api.conftest import Box

HELLO: Any = [{"role": "user", "content": "hello there"}]
PARAMETERS = {"type": "object", "properties": {"b": {}, "a": {}}}
TOOL: Any = {"type": "function", "function": {"name": "look_up", "parameters": PARAMETERS}}
PLAIN_TOOL: Any = {"type": "function", "function": {"name": "stop", "description": "Stops."}}


def last_generate(box: Box) -> Generate:
    return [each for each in box.workers["tiny"].received if isinstance(each, Generate)][-1]


async def test_a_schema_reaches_the_worker_as_it_was_sent(
    box: Box, client: openai.AsyncOpenAI
) -> None:
    formats: list[tuple[Any, str | None]] = [
        ({"type": "text"}, None),
        ({"type": "json_object"}, "{}"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "{}"),
    ]
    for strict in (True, False):
        schema = {"name": "x", "strict": strict, "schema": {"type": "object", "b": 1, "a": 2}}
        formats.append(
            ({"type": "json_schema", "json_schema": schema}, '{"type":"object","b":1,"a":2}')
        )
    for response_format, expected in formats:
        await client.chat.completions.create(
            model="tiny", messages=HELLO, response_format=response_format, max_tokens=1
        )
        assert last_generate(box).json_schema == expected


async def test_tools_and_choices_reach_the_worker(box: Box, client: openai.AsyncOpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "stop"}}
    for choice, expected in (
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        (named, "function:stop"),
    ):
        await client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            tools=[TOOL, PLAIN_TOOL],
            tool_choice=choice,
            parallel_tool_calls=choice != "none",
            max_tokens=8,
        )
        generate = last_generate(box)
        assert generate.tool_choice == expected
        assert generate.allows_several_calls == (choice != "none")
        assert generate.tools == [
            Tool(name="look_up", parameters='{"type":"object","properties":{"b":{},"a":{}}}'),
            Tool(name="stop", description="Stops."),
        ]


async def test_calls_come_back_in_openai_s_shape(box: Box, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="tiny", messages=HELLO, tools=[TOOL], tool_choice="required", n=2
    )
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "w0 "
        assert choice.message.tool_calls is not None
        assert [
            (call.id, call.type, call.function.name, call.function.arguments)
            for call in choice.message.tool_calls
            if call.type == "function"
        ] == [
            ("call_1", "function", "look_up", '{"at": 1}'),
            ("call_2", "function", "look_up", '{"at": 2}'),
        ]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    plain = await client.chat.completions.create(model="tiny", messages=HELLO, tools=[TOOL])
    assert plain.choices[0].message.tool_calls is None


async def test_calls_are_streamed_whole(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="tiny", messages=HELLO, tools=[TOOL], tool_choice="required", stream=True
    )
    deltas = [(chunk.choices[0].delta, chunk.choices[0].finish_reason) async for chunk in stream]
    assert "".join(delta.content or "" for delta, _ in deltas) == "w0 "
    calls = [call for delta, _ in deltas for call in delta.tool_calls or []]
    assert [call.index for call in calls] == [0, 1]
    assert [call.id for call in calls] == ["call_1", "call_2"]
    assert all(call.function and call.function.name == "look_up" for call in calls)
    assert deltas[-1][1] == "tool_calls"
    assert [reason for _, reason in deltas[:-1]] == [None] * (len(deltas) - 1)


async def test_calls_and_results_go_back_to_the_model(box: Box, client: openai.AsyncOpenAI) -> None:
    function = {"name": "look_up", "arguments": '{"a": 1}'}
    messages: Any = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "42"}]},
    ]
    await client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    _, called, result = last_generate(box).messages or []
    assert called.tool_calls == [ToolCall(id="call_1", name="look_up", arguments='{"a": 1}')]
    assert called.content == ""
    assert (result.role, result.content, result.tool_call_id) == ("tool", "42", "call_1")


def call(**fields: Any) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}} | fields


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}},
        "response_format",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"x": "y" * 70_000}},
            }
        },
        "response_format",
    ),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [TOOL] * 129}, "tools"),
    (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools[0].function.name",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": 5}}]},
        "tools[0].function.parameters",
    ),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "some"}, "tool_choice"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
    ),
    ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "tool_choice"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [call()]}]},
        "messages[0].tool_calls",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [call(type="custom")]}]},
        "messages[0].tool_calls[0].type",
    ),
]


@pytest.mark.parametrize(("change", "param"), ERRORS)
async def test_bad_tools_and_formats_are_named(
    box: Box, change: dict[str, Any], param: str
) -> None:
    async with box.http() as http:
        body = {"model": "tiny", "messages": HELLO} | change
        response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
