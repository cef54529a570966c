"""The items of a response, from a worker's outputs and back as what is sent: calls and their
tokens' logprobs make no messages of their own."""

from typing import Any

import msgspec
import pytest

from app.api import responses_input
from app.api.responses_events import Event
from app.api.responses_input import messages_of
from app.api.responses_output import ResponseItems
from app.api.responses_types import OutputMessage, ResponsesRequest
from runtime.protocol import ChatMessage, SequenceOutput, TokenLogprob, ToolCall

CALL = ToolCall(id="call_1", name="f", arguments="{}")
TOLD = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}
SILENCE = {"role": "assistant", "content": [{"type": "output_text", "text": ""}]}


def output(text: str, *calls: ToolCall, token: str = "", **fields: Any) -> SequenceOutput:
    entry = TokenLogprob(token_id=1, text=token, logprob=-0.5, top=[])
    return SequenceOutput(
        request_id="r",
        choice=0,
        token_ids=[1],
        text=text,
        num_cached_tokens=0,
        device_ns=0,
        logprobs=[entry],
        tool_calls=list(calls),
        **fields,
    )


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        # Tokens of a call have logprobs, and so has the token that ends the answer.
        ([output(""), output("", CALL), output("", finish_reason="tool_calls")], ["f"]),
        ([output(""), output("", CALL, finish_reason="tool_calls")], ["f"]),
        (
            [output("a"), output(""), output("", CALL), output("", CALL), output("b"), output("")],
            [("a", 1), "f", "f", ("b", 2)],
        ),
        # Of a letter of two tokens, the text comes with the second.
        ([output("", token="\ufffd"), output("é"), output("")], [("é", 3)]),
        ([output("")], [("", 1)]),
    ],
)
def test_a_message_begins_with_text(outputs: list[SequenceOutput], expected: list[Any]) -> None:
    items, events = ResponseItems("resp_1"), list[Event]()
    if outputs[-1].finish_reason is None:
        outputs = [*outputs[:-1], msgspec.structs.replace(outputs[-1], finish_reason="stop")]
    for each in outputs:
        events += items.add(each)
    told: list[Any] = [
        (item.content[0].text, len(item.content[0].logprobs))
        if isinstance(item, OutputMessage)
        else item.name
        for item in items.items
    ]
    assert told == expected
    kinds = [event.__struct_config__.tag for event in events]
    assert kinds.count("response.output_item.added") == len(expected)
    assert kinds.count("response.output_item.done") == len(expected)
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_message_without_a_word_parts_no_calls() -> None:
    items = [SILENCE, TOLD, SILENCE, TOLD | {"call_id": "call_2"}, SILENCE]
    result = {"type": "function_call_output", "call_id": "call_1", "output": "42"}
    body = {"model": "m", "input": [{"role": "user", "content": "a"}, *items, result]}
    second = ToolCall(id="call_2", name="f", arguments="{}")
    assert messages_of(msgspec.convert(body, ResponsesRequest)) == [
        ChatMessage(role="user", content="a"),
        ChatMessage(role="assistant", content="", tool_calls=[CALL, second]),
        ChatMessage(role="tool", content="42", tool_call_id="call_1"),
    ]


def test_calls_of_one_answer_are_gathered_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: one message is made for them, and one list."""
    num_made, num_calls = 0, 1000

    def made(**fields: Any) -> ChatMessage:
        nonlocal num_made
        num_made += 1
        return ChatMessage(**fields)

    monkeypatch.setattr(responses_input, "ChatMessage", made)
    calls = [TOLD | {"call_id": f"call_{number}"} for number in range(num_calls)]
    body = {"model": "m", "input": [{"role": "user", "content": "a"}, *calls]}
    messages = messages_of(msgspec.convert(body, ResponsesRequest))
    assert num_made == len(messages) == 2
    assert [call.id for call in messages[1].tool_calls] == [each["call_id"] for each in calls]
