"""Answers that cannot be told as their API has it, or not in time: what the caller gets, and who
pays."""

import asyncio
import json
from typing import Any

import pytest

from app.api import embeddings, inference_v2, predict_answers, settling
from app.api.messages import MessagesDialect
from app.billing.rating import Settlement
from app.core.errors import Unavailable
from app.metering.journal import read_unsettled
from app.metering.records import FinishRecord
from runtime.protocol import Cancel, Generate, Message, SequenceOutput, ToolCall
from tests.app.api.conftest import Box
from tests.app.api.scripted_worker import EMBEDDER, ScriptedWorker
from tests.app.api.test_faults import event_of, quantity, until

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
    assert (receipt["outcome"], receipt["finish_reason"]) == ("failed", "unanswered")
    assert receipt["amount_nano"] == 0
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


def broken(*_: object, **__: object) -> Any:
    raise ZeroDivisionError


def broken_at_the_last(self: MessagesDialect, outputs: list[SequenceOutput]) -> Any:
    if any("w7" in output.text for output in outputs):
        raise ZeroDivisionError
    return []


@pytest.mark.parametrize(
    ("method", "replacement", "is_stream"),
    [
        ("answer", broken, False),
        ("opening", broken, True),
        ("closing", broken, True),
        ("events", broken_at_the_last, True),
    ],
)
async def test_what_ran_to_its_end_is_free_where_no_answer_can_be_made_of_it(
    box: Box, monkeypatch: pytest.MonkeyPatch, method: str, replacement: Any, is_stream: bool
) -> None:
    monkeypatch.setattr(MessagesDialect, method, replacement)
    async with box.http() as http:
        response = await http.post("/v1/messages", json=MESSAGE | {"stream": is_stream})
    told = response.json() if response.status_code == 500 else events_of(response.text)[-1]
    assert (told["type"], told["error"]["code"]) == ("error", "internal_error")
    receipt = await event_of(box, response.headers["request-id"])
    assert (receipt["outcome"], receipt["finish_reason"]) == ("failed", "unanswered")
    assert receipt["amount_nano"] == 0
    assert 0 < quantity(receipt, "output") <= 8  # still on record


PREDICT = "/models/doubler/predict"
INFER = "/v2/models/doubler/infer"
EMBED = "/v1/embeddings"
BODIES: dict[str, dict[str, Any]] = {
    PREDICT: {"inputs": {"x": [[1.0, 2.0]], "k": [1]}},
    INFER: {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]},
            {"name": "k", "datatype": "INT64", "shape": [1], "data": [1]},
        ]
    },
    EMBED: {"model": "emb", "input": "hello"},
}


@pytest.mark.parametrize(
    ("path", "module", "name"),
    [
        (PREDICT, predict_answers, "labels_of"),
        (INFER, inference_v2, "infer_answer"),
        (INFER, inference_v2, "packed"),
        (EMBED, embeddings, "_encoded"),
    ],
)
async def test_a_run_is_free_where_no_answer_can_be_made_of_it(
    box: Box, monkeypatch: pytest.MonkeyPatch, path: str, module: Any, name: str
) -> None:
    await box.connect("emb", EMBEDDER)
    monkeypatch.setattr(module, name, broken)
    monkeypatch.setattr(inference_v2, "MIN_PACKED_BYTES", 1)
    async with box.http() as http:
        response = await http.post(path, json=BODIES[path], headers={"accept-encoding": "gzip"})
    assert response.status_code == 500
    receipt = await event_of(box, response.headers["x-request-id"])
    assert (receipt["outcome"], receipt["finish_reason"]) == ("failed", "unanswered")
    assert receipt["amount_nano"] == 0
    assert quantity(receipt, "device_ms") > 0


def deaf(worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cancel comes too late."""
    handle = worker._handle

    def handle_others(message: Message) -> None:
        if not isinstance(message, Cancel):
            handle(message)

    monkeypatch.setattr(worker, "_handle", handle_others)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_who_was_told_that_it_took_too_long_does_not_pay_for_an_answer(
    box: Box, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    """Even if the last token is made while the cancel is on its way; what a stream delivered, it
    pays for, as by any cancel."""
    deaf(box.workers["tiny"], monkeypatch)
    box.relay._timeout_seconds = 0.4
    body = {"model": "tiny", "prompt": "slow@100 please", "stream": is_stream}
    async with box.http() as http:
        response = await http.post("/v1/completions", json=body)
    error = events_of(response.text)[-1] if is_stream else response.json()
    assert error["error"]["code"] == "timeout"
    receipt = await event_of(box, response.headers["x-request-id"])
    outcome = "cancelled" if is_stream else "failed"
    assert (receipt["outcome"], receipt["finish_reason"]) == (outcome, "timeout")
    assert (receipt["amount_nano"] > 0) == is_stream
    assert quantity(receipt, "output") == 8


BREAKS: list[tuple[str, dict[str, Any], Any, str]] = [
    ("/v1/messages", MESSAGE, MessagesDialect, "answer"),
    ("/v1/messages", MESSAGE | {"stream": True}, MessagesDialect, "closing"),
    (PREDICT, BODIES[PREDICT], predict_answers, "labels_of"),
    (EMBED, BODIES[EMBED], embeddings, "_encoded"),
    ("/v1/completions", {"model": "tiny", "prompt": "slow@100 a"}, None, "timeout"),
    ("/v1/completions", {"model": "tiny", "prompt": "abort@3", "stream": True}, None, "abort"),
]


@pytest.mark.parametrize(("path", "body", "owner", "name"), BREAKS)
async def test_a_crash_charges_nothing_of_what_was_told_to_have_failed(
    box: Box,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
    owner: Any,
    name: str,
) -> None:
    """What the journal has when the caller hears of it recovers to what is settled."""
    await box.connect("emb", EMBEDDER)
    if owner is not None:
        monkeypatch.setattr(owner, name, broken)
    else:
        deaf(box.workers["tiny"], monkeypatch)
        box.relay._timeout_seconds = 0.4
    settled: list[Settlement] = []
    monkeypatch.setattr(box.accounts, "settle", settled.append)
    monkeypatch.setattr(box.journal, "note_finish", lambda record: None)  # it would come too late
    async with box.http() as http:
        await http.post(path, json=body)
    (told,) = read_unsettled(box.storage.journal_dir).usages
    assert told.outcome == "failed"
    await until(lambda: bool(settled))
    await box.journal.sync()
    (recovered,) = read_unsettled(box.storage.journal_dir).usages
    fields = ("outcome", "finish_reason", "input_tokens", "output_tokens", "device_ms")
    for field in fields:
        assert getattr(recovered, field) == getattr(settled[0].usage, field), field


@pytest.mark.parametrize("is_dead", [False, True])
async def test_a_failure_is_on_record_before_it_is_told(
    box: Box, monkeypatch: pytest.MonkeyPatch, is_dead: bool
) -> None:
    """But for a disk that does not get it done: nobody waits for that without end."""
    gate, finish = asyncio.Event(), box.journal.finish

    async def stalled(record: FinishRecord) -> None:
        await gate.wait()
        if is_dead:
            raise Unavailable("The disk is gone.")
        await finish(record)

    monkeypatch.setattr(box.journal, "finish", stalled)
    monkeypatch.setattr(MessagesDialect, "answer", broken)
    async with box.http() as http:
        for seconds, is_told in ((5.0, False), (0.05, True)):
            monkeypatch.setattr(settling, "TELL_SECONDS", seconds)
            gate.clear()
            call = asyncio.create_task(http.post("/v1/messages", json=MESSAGE))
            done, _ = await asyncio.wait([call], timeout=0.4)
            assert bool(done) == is_told
            gate.set()
            response = await call
            assert (response.status_code, response.json()["error"]["code"]) == (
                500,
                "internal_error",
            )
            receipt = await event_of(box, response.headers["request-id"])
            assert (receipt["outcome"], receipt["amount_nano"]) == ("failed", 0)
