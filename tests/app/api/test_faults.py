"""Everything that ends a request other than its last token, and who pays for it."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import func, select

from app.api import relay
from app.billing.tables import Hold
from app.core.database import Database
from app.metering.segments import Segment
from app.metering.tables import UsageEvent
from app.settings import Settings
from runtime.protocol import Cancel, Generate, Message, Predict, Start
from tests.app.api.conftest import Box


async def event_of(box: Box, request_id: str) -> dict[str, Any]:
    """The receipt, once the request has ended."""
    for _ in range(200):
        async with box.http() as http:
            response = await http.get(f"/v1/receipts/{request_id}")
        if response.status_code == 200:
            return response.json()
        await asyncio.sleep(0.02)
    raise AssertionError("never settled")


async def num_holds(box: Box) -> int:
    async with box.database.read() as session:
        return await session.scalar(select(func.count()).select_from(Hold)) or 0


def quantity(receipt: dict[str, Any], dimension: str) -> int:
    return sum(ln["quantity"] for ln in receipt["lines"] if ln["dimension"] == dimension)


async def stream_until(
    box: Box, prompt: str, num_events: int, **fields: Any
) -> tuple[str, list[str]]:
    """Reads so many events of a stream, then hangs up."""
    lines: list[str] = []
    async with (
        box.http() as http,
        http.stream(
            "POST",
            "/v1/completions",
            json={"model": "tiny", "prompt": prompt, "stream": True, "max_tokens": 200} | fields,
            timeout=10,
        ) as response,
    ):
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            lines += [line] if line else []
            if len(lines) == num_events:
                break
    return response.headers["x-request-id"], lines


async def test_a_client_that_leaves_a_stream_pays_until_the_cancel(box: Box) -> None:
    request_id, _ = await stream_until(box, "slow@5 please", 4, ignore_eos=True)
    receipt = await event_of(box, request_id)
    assert receipt["outcome"] == "cancelled"
    assert 4 <= quantity(receipt, "output") < 200
    assert receipt["amount_nano"] == 2 * 100 + quantity(receipt, "output") * 400 + 100
    assert any(isinstance(m, Cancel) for m in box.workers["tiny"].received)
    assert await num_holds(box) == 0


async def test_a_client_that_leaves_before_the_answer_is_a_cancel_too(box: Box) -> None:
    body = {"model": "tiny", "prompt": "slow@10", "max_tokens": 200, "ignore_eos": True}
    async with box.http() as http:
        call = asyncio.create_task(http.post("/v1/completions", json=body))
        await until(worker_got(box, "tiny", Start))
        await asyncio.sleep(0.2)  # of the 2 s that 200 slow tokens take
        call.cancel()
        await asyncio.wait([call])
    async with box.database.read() as session:
        for _ in range(200):
            event = await session.scalar(select(UsageEvent))
            if event is not None:
                break
            await session.rollback()
            await asyncio.sleep(0.02)
    assert event is not None
    receipt = await event_of(box, event.request_id)
    assert receipt["outcome"] == "cancelled"
    assert 0 < quantity(receipt, "output") < 100
    assert receipt["amount_nano"] > 0


async def test_a_failure_in_a_stream_is_its_last_event_and_free(
    box: Box, client: openai.AsyncOpenAI
) -> None:
    stream = await client.completions.create(model="tiny", prompt="fail@3 please", stream=True)
    texts: list[str] = []
    with pytest.raises(openai.APIError) as caught:  # noqa: PT012 - raised while it is read
        async for chunk in stream:
            texts.append(chunk.choices[0].text)
    assert texts == ["w0 ", "w1 ", "w2 "]
    assert "ran out of memory" in caught.value.message
    assert caught.value.code == "oom"
    receipt = await event_of(box, stream.response.headers["x-request-id"])
    assert (receipt["outcome"], receipt["finish_reason"]) == ("failed", "oom")
    assert receipt["amount_nano"] == 0
    assert quantity(receipt, "output") == 3
    assert {line["disposition"] for line in receipt["lines"]} == {"waived", "free"}


async def test_a_failure_without_a_stream_has_its_status(
    box: Box, client: openai.AsyncOpenAI
) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        await client.completions.create(model="tiny", prompt="fail@3 please")
    assert caught.value.status_code == 500
    assert caught.value.request_id is not None
    assert (await event_of(box, caught.value.request_id))["amount_nano"] == 0


HELD_TO_JSON: Any = {"type": "json_object"}


@pytest.mark.parametrize("num_choices", [1, 2])
async def test_a_schema_that_goes_too_far_is_the_callers_to_pay_for(
    box: Box, client: openai.AsyncOpenAI, num_choices: int
) -> None:
    stream = await client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "refuse@3"}],
        response_format=HELD_TO_JSON,
        n=num_choices,
        stream=True,
    )
    texts: list[str] = []
    with pytest.raises(openai.APIError) as caught:  # noqa: PT012 - raised while it is read
        async for chunk in stream:
            texts += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(texts).count("w2") == num_choices
    assert "unseen" not in "".join(texts)
    assert caught.value.code == "grammar_too_complex"
    receipt = await event_of(box, stream.response.headers["x-request-id"])
    assert (receipt["outcome"], receipt["finish_reason"]) == ("cancelled", "grammar_too_complex")
    assert quantity(receipt, "output") == 3 * num_choices
    assert receipt["amount_nano"] == 2 * 100 + 3 * num_choices * 400 + 100
    assert await num_holds(box) == 0


async def test_an_answer_that_never_came_is_free_and_not_to_be_tried_again(
    box: Box, client: openai.AsyncOpenAI
) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "refuse@3"}],
            response_format=HELD_TO_JSON,
        )
    assert caught.value.code == "grammar_too_complex"
    assert "retry-after" not in caught.value.response.headers
    assert caught.value.request_id is not None
    receipt = await event_of(box, caught.value.request_id)
    assert (receipt["outcome"], receipt["finish_reason"]) == ("failed", "grammar_too_complex")
    assert receipt["amount_nano"] == 0


async def test_a_worker_cannot_blame_a_schema_that_is_not_there(
    box: Box, client: openai.AsyncOpenAI
) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        await client.completions.create(model="tiny", prompt="refuse@3")
    assert caught.value.code == "worker_untrusted"


@pytest.mark.parametrize(
    ("prompt", "code"),
    [("die@2", "worker_lost"), ("lie@2", "worker_untrusted"), ("abort@2", "worker_aborted")],
)
async def test_a_worker_that_goes_or_lies_costs_nothing(
    box: Box, client: openai.AsyncOpenAI, prompt: str, code: str
) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        await client.completions.create(model="tiny", prompt=prompt)
    assert caught.value.status_code == 503
    assert caught.value.code == code
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.request_id is not None
    receipt = await event_of(box, caught.value.request_id)
    assert receipt["outcome"] == "failed"
    assert receipt["amount_nano"] == 0
    assert await num_holds(box) == 0


async def test_the_deadline_ends_a_request(settings: Settings, database: Database) -> None:
    box = Box(settings, database)
    box.timeout_seconds = 0.3
    await box.start()
    async with box.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="tiny", prompt="hang@3")
        assert caught.value.status_code == 504
        assert caught.value.code == "timeout"
        assert caught.value.request_id is not None
        receipt = await event_of(box, caught.value.request_id)
        assert (receipt["outcome"], receipt["finish_reason"]) == ("failed", "timeout")
        assert receipt["amount_nano"] == 0

        stream = await client.completions.create(model="tiny", prompt="hang@3 a", stream=True)
        with pytest.raises(openai.APIError, match="did not finish within"):
            [chunk async for chunk in stream]
        receipt = await event_of(box, stream.response.headers["x-request-id"])
        assert (receipt["outcome"], receipt["finish_reason"]) == ("cancelled", "timeout")
        assert quantity(receipt, "output") == 3
        assert receipt["amount_nano"] == 2 * 100 + 3 * 400 + 100
    await box.stop()


async def test_tokens_that_cannot_be_recorded_are_not_delivered(
    box: Box, client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Segment) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Segment, "sync", full)
    with pytest.raises(openai.InternalServerError) as caught:
        await client.completions.create(model="tiny", prompt="a")
    assert caught.value.status_code == 503
    assert caught.value.code == "journal_unavailable"
    monkeypatch.undo()
    answer = await client.completions.create(model="tiny", prompt="a")
    assert answer.choices[0].finish_reason == "stop"


async def test_no_token_leaves_before_its_record_is_durable(
    box: Box, client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk stalls: nothing arrives. It recovers: everything does."""
    gate = asyncio.Event()
    delivery = box.fleet.targets["tiny"].link._delivery
    commit = delivery._commit

    async def stalled(outputs: Any) -> None:
        await gate.wait()
        await commit(outputs)

    monkeypatch.setattr(delivery, "_commit", stalled)
    answer = asyncio.create_task(client.completions.create(model="tiny", prompt="a"))
    done, _ = await asyncio.wait([answer], timeout=0.2)
    assert not done
    gate.set()
    assert (await answer).usage is not None


async def test_a_request_that_never_left_the_queue_pays_no_prompt(box: Box) -> None:
    body = {"model": "tiny", "prompt": "hang@0 a b c d"}
    await leave(box, "/v1/completions", body, once=worker_got(box, "tiny", Start))
    receipt = await event_of(box, await last_request_id(box))
    assert receipt["outcome"] == "cancelled"
    assert (quantity(receipt, "input"), receipt["amount_nano"]) == (0, 100)


async def last_request_id(box: Box) -> str:
    (generate,) = [m for m in box.workers["tiny"].received if isinstance(m, Generate)]
    return generate.request_id


async def leave(box: Box, path: str, body: dict[str, Any], once: Callable[[], bool]) -> None:
    """Asks, and hangs up before there is an answer, as soon as `once` holds."""
    async with box.http() as http:
        call = asyncio.create_task(http.post(path, json=body))
        await until(once)
        assert not call.done()
        call.cancel()
        await asyncio.wait([call])


def worker_got(box: Box, name: str, kind: type[Message]) -> Callable[[], bool]:
    received = box.workers[name].received
    return lambda: any(isinstance(message, kind) for message in received)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def num_events(box: Box) -> int:
    """Requests settled, once nothing is under way."""
    await until(lambda: not box.relay._running)
    await box.relay.settled()
    async with box.database.read() as session:
        return await session.scalar(select(func.count()).select_from(UsageEvent)) or 0


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_leaves_while_its_prompt_is_read_costs_nothing(
    box: Box, is_stream: bool
) -> None:
    body = {"model": "tiny", "prompt": "unready", "stream": is_stream}
    await leave(box, "/v1/completions", body, once=worker_got(box, "tiny", Generate))
    received = box.workers["tiny"].received
    await until(lambda: isinstance(received[-1], Cancel))
    assert (await num_events(box), await num_holds(box)) == (0, 0)
    assert box.fleet.targets["tiny"].link.num_outstanding == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "tiny", "prompt": "a"}),
        ("/models/doubler/predict", {"inputs": {"x": [[1, 2]], "k": [1]}}),
    ],
)
async def test_a_client_that_leaves_during_its_hold_costs_nothing(
    box: Box, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    asked, gate, hold = asyncio.Event(), asyncio.Event(), box.accounts.hold

    async def slow_hold(*args: Any, **options: Any) -> None:
        asked.set()
        await gate.wait()
        await hold(*args, **options)

    monkeypatch.setattr(box.accounts, "hold", slow_hold)
    await leave(box, path, body, once=asked.is_set)
    await asyncio.sleep(0.1)
    gate.set()
    assert (await num_events(box), await num_holds(box)) == (0, 0)
    for worker in box.workers.values():
        assert not any(isinstance(message, Start | Predict) for message in worker.received)


@pytest.mark.parametrize(
    ("k", "outcome", "amount_nano"), [(99, "cancelled", 100), (98, "completed", 656)]
)
async def test_a_client_that_leaves_a_prediction_pays_for_its_run_if_it_had_one(
    box: Box, k: int, outcome: str, amount_nano: int
) -> None:
    body = {"inputs": {"x": [[1, 2]], "k": [k]}}
    await leave(box, "/models/doubler/predict", body, once=worker_got(box, "doubler", Predict))
    received = box.workers["doubler"].received
    await until(lambda: isinstance(received[-1], Cancel))
    assert await num_events(box) == 1
    (predict,) = [message for message in received if isinstance(message, Predict)]
    receipt = await event_of(box, predict.request_id)
    assert (receipt["outcome"], receipt["amount_nano"]) == (outcome, amount_nano)
    assert await num_holds(box) == 0


SERVER = """
import asyncio, json, sys
from pathlib import Path
from app.core.database import Database
from app.settings import Settings
from tests.app.api.conftest import Box

async def main(data_dir, url):
    settings = Settings(data_dir=Path(data_dir), database_url=url)
    box = Box(settings, Database(settings.async_database_url))
    await box.start()
    box.accounts.settle = lambda settlement: None  # killed before any settlement
    await box.accounts.hold("req_unrecorded", "org_1", 5)
    print(json.dumps({"url": box.url, "keys": box.keys}), flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_kill_9_loses_nothing_delivered_and_charges_nothing_twice(
    settings: Settings, database: Database
) -> None:
    box = Box(settings, database)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SERVER,
        str(settings.data_dir),
        settings.database_url,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    doors = json.loads(await process.stdout.readline())
    box.url, box.keys = doors["url"], doors["keys"]
    async with box.client() as client:
        raw = await client.completions.with_raw_response.create(model="tiny", prompt="a b")
        finished = raw.headers["x-request-id"]
        stream = await client.completions.create(model="tiny", prompt="hang@3 x", stream=True)
        unfinished = stream.response.headers["x-request-id"]
        texts: list[str] = []
        with pytest.raises((httpx.HTTPError, openai.APIError)):  # noqa: PT012
            async for chunk in stream:
                texts.append(chunk.choices[0].text)
                if len(texts) == 3:
                    process.kill()
    await process.wait()
    assert await num_holds(box) == 3

    owed: list[int] = []
    for _ in range(2):
        for path in (settings.data_dir / "run").iterdir():
            path.unlink()
        await box.start()
        assert await num_holds(box) == 0
        receipt = await box.receipt(finished)
        assert (receipt["outcome"], receipt["amount_nano"]) == ("completed", 200 + 3_200 + 100)
        receipt = await box.receipt(unfinished)
        assert (receipt["outcome"], receipt["amount_nano"]) == ("lost", 0)
        assert quantity(receipt, "output") == 3
        async with box.http() as http:
            usage = (await http.get("/api/usage")).json()
        assert usage["held_nano"] == 0
        owed.append(usage["owed_nano"])
        await box.stop()
    assert owed == [3_500, 3_500]


async def test_a_database_that_does_not_answer_ends_in_503(
    box: Box, client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: Any, **options: Any) -> None:
        await asyncio.Event().wait()

    voided: list[str] = []
    monkeypatch.setattr(relay, "HOLD_SECONDS", 0.05)
    monkeypatch.setattr(box.accounts, "hold", never)
    monkeypatch.setattr(box.accounts, "void", voided.append)
    with pytest.raises(openai.InternalServerError) as caught:
        await client.completions.create(model="tiny", prompt="a")
    assert (caught.value.status_code, caught.value.code) == (503, "accounts_unavailable")
    assert voided == [caught.value.request_id]
    assert box.fleet.targets["tiny"].link.num_outstanding == 0
    async with box.http() as http:
        response = await http.post(
            "/models/doubler/predict", json={"inputs": {"x": [[1, 2]], "k": [1]}}
        )
    assert response.status_code == 503
