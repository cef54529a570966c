"""`/v1/messages` through the real anthropic SDK: what reaches the worker, what comes back, and what
is refused."""

from typing import Any

import anthropic
import pytest
from pydantic import BaseModel

from app.billing.service import set_spending_limit
from runtime.protocol import ChatMessage, Generate, Tool, ToolCall
from tests.app.api.conftest import ORGANIZATION, Box

EIGHT_WORDS = "w0 w1 w2 w3 w4 w5 w6 w7 "
HELLO: Any = [{"role": "user", "content": "hello there"}]
SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}
TOOL: Any = {"name": "look_up", "description": "Looks.", "input_schema": SCHEMA}


@pytest.fixture
async def claude(box: Box) -> Any:
    async with sdk(box) as client:
        yield client


def sdk(box: Box, key: str = ORGANIZATION) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=box.url, api_key=box.keys.get(key, key), max_retries=0)


def last_generate(box: Box) -> Generate:
    return [each for each in box.workers["tiny"].received if isinstance(each, Generate)][-1]


async def test_a_message_and_its_receipt(box: Box, claude: anthropic.AsyncAnthropic) -> None:
    for _ in range(2):
        message = await claude.messages.create(
            model="tiny",
            max_tokens=100,
            messages=HELLO,
            system=[{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
            metadata={"user_id": "u"},
            extra_body={"temperature": 0, "top_k": 5},
        )
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", "tiny")
    (block,) = message.content
    assert block.type == "text"
    assert block.text == EIGHT_WORDS
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    # Four words and the two roles; all but one were seen before.
    assert message.usage.input_tokens == 1
    assert message.usage.cache_read_input_tokens == 5
    assert message.usage.cache_creation_input_tokens == 0
    assert message.usage.output_tokens == 8
    generate = last_generate(box)
    assert generate.messages == [
        ChatMessage(role="system", content="be brief"),
        ChatMessage(role="user", content="hello there"),
    ]
    assert (generate.sampling.temperature, generate.sampling.top_k) == (0.0, 5)
    assert message._request_id is not None
    receipt = await box.receipt(message._request_id)
    quantities = {line["dimension"]: line["quantity"] for line in receipt["lines"]}
    assert quantities["cached_input"] == 5
    assert (quantities["input"], quantities["output"]) == (1, 8)


async def test_why_a_message_ended(box: Box, claude: anthropic.AsyncAnthropic) -> None:
    async def ended(**fields: Any) -> tuple[str | None, str | None, str]:
        wanted: dict[str, Any] = {"max_tokens": 100, "messages": HELLO} | fields
        message = await claude.messages.create(model="tiny", **wanted)
        text = "".join(block.text for block in message.content if block.type == "text")
        return message.stop_reason, message.stop_sequence, text

    assert await ended(max_tokens=2) == ("max_tokens", None, "w0 w1 ")
    assert await ended(stop_sequences=["zz", "w2"]) == ("stop_sequence", "w2", "w0 w1 ")
    assert await ended(stop_sequences=["w0"]) == ("stop_sequence", "w0", "")
    full = await ended(max_tokens=1000, extra_body={"ignore_eos": True})
    assert full[0] == "model_context_window_exceeded"


async def test_a_stream_has_anthropic_s_events_in_order(
    box: Box, claude: anthropic.AsyncAnthropic
) -> None:
    stream = await claude.messages.create(model="tiny", max_tokens=2, messages=HELLO, stream=True)
    events = [event async for event in stream]
    assert [event.type for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    first, last = events[0], events[-2]
    assert first.type == "message_start"
    assert (first.message.usage.input_tokens, first.message.content) == (3, [])
    assert last.type == "message_delta"
    assert (last.delta.stop_reason, last.usage.output_tokens) == ("max_tokens", 2)
    async with claude.messages.stream(
        model="tiny",
        max_tokens=100,
        messages=HELLO,
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    ) as helper:
        text = "".join([text async for text in helper.text_stream])
        final = await helper.get_final_message()
    assert text == "w0 "
    assert final.stop_reason == "tool_use"
    assert [block.type for block in final.content] == ["text", "tool_use", "tool_use"]
    used = final.content[2]
    assert used.type == "tool_use"
    assert (used.id, used.name, used.input) == ("call_2", "look_up", {"at": 2})
    assert final.usage.output_tokens == 3
    assert final.usage.cache_read_input_tokens == 2
    assert not last_generate(box).allows_several_calls


async def test_tools_and_their_results(box: Box, claude: anthropic.AsyncAnthropic) -> None:
    first = await claude.messages.create(
        model="tiny",
        max_tokens=9,
        messages=HELLO,
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "look_up"},
    )
    assert last_generate(box).tool_choice == "function:look_up"
    assert last_generate(box).tools == [
        Tool(
            name="look_up",
            description="Looks.",
            parameters='{"type":"object","properties":{"b":{},"a":{}}}',
        )
    ]
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": "call_1", "content": "42"},
        {
            "type": "tool_result",
            "tool_use_id": "call_2",
            "content": [{"type": "text", "text": "43"}],
        },
        {"type": "text", "text": "and now?"},
    ]
    thought: Any = {"type": "thinking", "thinking": "hm", "signature": "x"}
    await claude.messages.create(
        model="tiny",
        max_tokens=9,
        messages=[
            *HELLO,
            {"role": "assistant", "content": [thought, *first.content]},
            {"role": "user", "content": results},
        ],
    )
    assert (last_generate(box).messages or [])[1:] == [
        ChatMessage(
            role="assistant",
            content="w0 ",
            tool_calls=[
                ToolCall(id=f"call_{at}", name="look_up", arguments=f'{{"at":{at}}}')
                for at in (1, 2)
            ],
        ),
        ChatMessage(role="tool", content="42", tool_call_id="call_1"),
        ChatMessage(role="tool", content="43", tool_call_id="call_2"),
        ChatMessage(role="user", content="and now?"),
    ]


async def test_what_a_tool_says_of_its_failure_is_told(
    box: Box, claude: anthropic.AsyncAnthropic
) -> None:
    def result(call_id: str, **fields: Any) -> Any:
        return {"type": "tool_result", "tool_use_id": call_id} | fields

    uses: Any = [USE | {"id": call_id} for call_id in "abc"]
    results: Any = [
        result("a", is_error=True, content="no such file"),
        result("b", is_error=True),
        result("c", is_error=False, content="42"),
    ]
    await claude.messages.create(
        model="tiny",
        max_tokens=9,
        messages=[
            *HELLO,
            {"role": "assistant", "content": uses},
            {"role": "user", "content": results},
        ],
    )
    told = [message.content for message in (last_generate(box).messages or [])[2:]]
    assert told == ["Error: no such file", "Error", "42"]


async def test_thoughts_alone_are_no_message(box: Box, claude: anthropic.AsyncAnthropic) -> None:
    thought: Any = {"type": "thinking", "thinking": "hm", "signature": "x"}
    messages: Any = [*HELLO, {"role": "assistant", "content": [thought]}, *HELLO]
    await claude.messages.create(model="tiny", max_tokens=9, messages=messages)
    assert last_generate(box).messages == [ChatMessage(role="user", content="hello there")] * 2


class Place(BaseModel):
    x: int


async def test_a_format_reaches_the_worker(box: Box, claude: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(ValueError, match="Place"):  # the scripted worker answers no JSON
        await claude.messages.parse(model="tiny", max_tokens=9, messages=HELLO, output_format=Place)
    assert '"x":{"type":"integer"' in (last_generate(box).json_schema or "").replace(
        '"title":"X",', ""
    )


async def test_tokens_are_counted_for_nothing(box: Box, claude: anthropic.AsyncAnthropic) -> None:
    for messages in (claude.messages, claude.beta.messages):
        counted = await messages.count_tokens(model="tiny", messages=HELLO, system="be brief")
        assert counted.input_tokens == 6
    assert box.fleet.targets["tiny"].link.num_outstanding == 0
    async with box.http() as http:
        assert (await http.get("/api/usage")).json()["rows"] == []


async def test_errors_arrive_as_the_sdk_s_classes(
    box: Box, claude: anthropic.AsyncAnthropic
) -> None:
    async def ask(client: anthropic.AsyncAnthropic = claude, **fields: Any) -> Any:
        wanted: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "messages": HELLO} | fields
        return await client.messages.create(**wanted)

    async with sdk(box, "tp-wrong") as stranger, sdk(box, "read") as reader:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            await ask(stranger)
        assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
        with pytest.raises(anthropic.PermissionDeniedError):
            await ask(reader)
    with pytest.raises(anthropic.NotFoundError) as missing:
        await ask(model="absent")
    assert missing.value.type == "not_found_error"
    assert missing.value.request_id is not None
    assert missing.value.request_id.startswith("req_")
    with pytest.raises(anthropic.BadRequestError) as bad:
        await ask(max_tokens=0)
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(anthropic.BadRequestError, match="/predict"):
        await ask(model="doubler")
    with pytest.raises(anthropic.NotFoundError):
        await claude.messages.batches.list()
    async with box.database.write() as session:
        await set_spending_limit(session, ORGANIZATION, 0, "usd")
    with pytest.raises(anthropic.APIStatusError) as poor:
        await ask()
    assert (poor.value.status_code, poor.value.type) == (402, "billing_error")


async def test_a_full_replica_and_a_failing_one(box: Box, claude: anthropic.AsyncAnthropic) -> None:
    async def ask(words: str) -> str:
        content: Any = [{"role": "user", "content": words}]
        async with claude.messages.stream(model="tiny", max_tokens=9, messages=content) as stream:
            return "".join([text async for text in stream.text_stream])

    link = box.fleet.targets["tiny"].link
    most, link._max_outstanding = link._max_outstanding, 0
    with pytest.raises(anthropic.RateLimitError):
        await ask("a")
    link._max_outstanding = most
    with pytest.raises(anthropic.APIError, match="ran out of memory"):
        await ask("fail@3")
    with pytest.raises(anthropic.InternalServerError):
        await claude.messages.create(
            model="tiny", max_tokens=9, messages=[{"role": "user", "content": "die@1"}]
        )


def said(*blocks: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


USE = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "so"}]}, "messages"),
    (said({"type": "image"}), "messages[0].content[0].type"),
    (said({"type": "text"}), "messages[0].content[0].text"),
    (said(USE), "messages[0].content[0].type"),
    (said(USE | {"input": 5}, role="assistant"), "messages[0].content[0].input"),
    (said(USE | {"id": None}, role="assistant"), "messages[0].content[0].id"),
    (said({"type": "tool_result"}), "messages[0].content[0].tool_use_id"),
    ({"max_tokens": None}, "max_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"system": [{"type": "image"}]}, "system[0].type"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "maybe"}}, "tool_choice.type"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
    ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"container": "c"}, "container"),
    ({"inference_geo": "eu"}, "inference_geo"),
    ({"speed": "fast"}, "speed"),
    ({"n": 2}, "n"),
]


async def test_bad_parameters_are_named(box: Box) -> None:
    async with box.http() as http:
        for change, param in ERRORS:
            body = {"model": "tiny", "max_tokens": 9, "messages": HELLO} | change
            response = await http.post("/v1/messages", json=body)
            assert response.status_code == 400, (change, response.text)
            assert response.json()["type"] == "error"
            error = response.json()["error"]
            assert error["param"] == param, (change, error)
            assert error["type"] == "invalid_request_error"


async def test_what_is_kept_as_it_was_sent_is_utf_8(box: Box) -> None:
    use = '"messages": [{"role": "assistant", "content": [%s]}, {"role": "user", "content": "a"}]'
    use %= '{"type": "tool_use", "id": "t", "name": "f", "input": {"x": "%s"}}'
    tool = '"messages": [{"role": "user", "content": "a"}], "tools": [%s]'
    tool %= '{"name": "f", "input_schema": {"x": "%s"}}'
    async with box.http() as http:
        for fields, param in (
            (use, "messages[0].content[0].input"),
            (tool, "tools[0].input_schema"),
        ):
            body = b'{"model": "tiny", "max_tokens": 9, ' + (fields % "?").encode() + b"}"
            response = await http.post("/v1/messages", content=body)
            assert response.status_code == 200, response.text
            response = await http.post("/v1/messages", content=body.replace(b"?", b"\xff"))
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"] == param
