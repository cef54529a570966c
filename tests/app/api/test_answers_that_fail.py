"""Answers that cannot be told as their API has it: what the caller gets, and who pays."""

import json
from typing import Any

import pytest

from app.api.messages import MessagesDialect
from runtime.protocol import Generate, SequenceOutput, ToolCall
from tests.app.api.conftest import Box
from tests.app.api.scripted_worker import ScriptedWorker
from tests.app.api.test_faults import event_of

DEEP = '{"x":' + "[" * 3000 + "]" * 3000 + "}"
EXACT = '{"id": 123456789012345678901234567890, "f": 0.1000000000000000055511151231257827}'
MESSAGE: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 200,
    "messages": [{"role": "user", "content": "hello there"}],
}
FORCED: dict[str, Any] = {
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "any"},
}


def events_of(body: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: ")]


def calls_with(worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch, arguments: str) -> None:
    def call_tools(generate: Generate, num_cached: int) -> None:
        calls = [ToolCall(id="call_1", name="f", arguments=arguments)]
        worker._step(generate, [1], "", num_cached, "tool_calls", calls)

    monkeypatch.setattr(worker, "_call_tools", call_tools)


@pytest.mark.parametrize("arguments", [DEEP, EXACT, "not JSON"])
async def test_arguments_of_any_kind_are_answered(
    box: Box, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    calls_with(box.workers["tiny"], monkeypatch, arguments)
    async with box.http() as http:
        whole = await http.post("/v1/messages", json=MESSAGE | FORCED)
        stream = await http.post("/v1/messages", json=MESSAGE | FORCED | {"stream": True})
    assert whole.status_code == 200
    if arguments == EXACT:  # as the model wrote it, to the last digit
        assert f'"input":{EXACT}' in whole.text
    else:
        assert whole.json()["content"][0]["input"] == {"arguments": arguments}
    events = events_of(stream.text)
    assert [event["type"] for event in events][-1] == "message_stop"
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert deltas == [{"type": "input_json_delta", "partial_json": arguments}]


async def test_a_stream_that_cannot_go_on_is_ended_and_free(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = MessagesDialect.events

    def fail_at_the_third(self: MessagesDialect, outputs: list[SequenceOutput]) -> Any:
        if any("w2" in output.text for output in outputs):
            raise RecursionError("maximum recursion depth exceeded while deserializing an object")
        return events(self, outputs)

    monkeypatch.setattr(MessagesDialect, "events", fail_at_the_third)
    slow = {"messages": [{"role": "user", "content": "slow@10"}], "ignore_eos": True}
    async with box.http() as http:
        response = await http.post("/v1/messages", json=MESSAGE | slow | {"stream": True})
    last = events_of(response.text)[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    assert "Something went wrong inside the box" in last["error"]["message"]
    receipt = await event_of(box, response.headers["request-id"])  # it stops first
    assert (receipt["outcome"], receipt["amount_nano"]) == ("failed", 0)
    # It ran on no further than to its cancel.
    assert box.fleet.targets["tiny"].link.num_outstanding == 0
    assert len(box.workers["tiny"]._cancelled) == 1


async def test_only_a_body_is_nested_too_deeply(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    async with box.http() as http:
        body = json.dumps(MESSAGE)[:-1] + ', "x": ' + "[" * 50_000 + "]" * 50_000 + "}"
        refused = await http.post("/v1/messages", content=body)

        def fail(self: MessagesDialect, outputs: list[SequenceOutput], usage: Any) -> Any:
            raise RecursionError("maximum recursion depth exceeded while deserializing an object")

        monkeypatch.setattr(MessagesDialect, "answer", fail)
        failed = await http.post("/v1/messages", json=MESSAGE)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_json")
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "internal_error")
