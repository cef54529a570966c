"""The link, against a worker played by the test over a socket pair."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from app.core.clock import monotonic_ns
from app.core.errors import AppError, RateLimited, RuntimeFailure, TooLarge, Unavailable
from app.deployments import link as link_module
from app.deployments.delivery import MAX_UNDELIVERED
from app.deployments.launchers.base import LaunchError
from app.deployments.link import ReplicaLink
from app.deployments.metered import Counts
from runtime.protocol import (
    LENGTH,
    MAX_FRAME_BYTES,
    Cancel,
    ChatMessage,
    Drain,
    Failed,
    Fatal,
    Generate,
    Manifest,
    Predict,
    Predicted,
    Prepared,
    Ready,
    SamplingParams,
    SequenceOutput,
    Serve,
    Start,
    Stats,
    Step,
    Tensor,
    ToWorker,
    WireError,
    encode_frame,
)
from tests.app.deployments.conftest import until
from tests.app.deployments.fake_process import DECODER, TENSOR


class Worker:
    """The other end, driven by the test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def receive(self) -> Any:
        (length,) = LENGTH.unpack(await self._reader.readexactly(4))
        return msgspec.msgpack.decode(await self._reader.readexactly(length), type=ToWorker)

    def send(self, *messages: Any) -> None:
        self.writer.write(b"".join(encode_frame(message) for message in messages))

    async def prepare(self, num_prompt_tokens: int = 3, max_tokens: int = 16) -> str:
        message = await self.receive()
        assert isinstance(message, Generate)
        self.send(
            Prepared(
                request_id=message.request_id,
                num_prompt_tokens=num_prompt_tokens,
                max_tokens=max_tokens,
            )
        )
        return message.request_id

    async def is_closed(self) -> bool:
        return await self._reader.read(1) == b""


class Ledger:
    """Stands for the journal: what was committed, in order; may be slow or refuse."""

    def __init__(self) -> None:
        self.outputs: list[SequenceOutput] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: AppError | None = None
        self.sizes: list[int] = []  # how many outputs each commit held

    async def commit(self, outputs: list[SequenceOutput]) -> None:
        self.sizes.append(len(outputs))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.outputs += outputs


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


class Pair:
    """A link and the worker at its other end."""

    def __init__(self, link: ReplicaLink, worker: Worker) -> None:
        self.link = link
        self.worker = worker

    async def get_ready(self, manifest: Manifest = DECODER) -> "Pair":
        serving = asyncio.create_task(self.link.serve(Serve(artifact_dir="/a"), 5))
        assert isinstance(await self.worker.receive(), Serve)
        self.worker.send(Ready(manifest=manifest, memory_bytes=1))
        await serving
        return self

    async def started(self, request: Generate) -> AsyncIterator[list[SequenceOutput]]:
        preparing = asyncio.create_task(self.link.prepare(request))
        await self.worker.prepare(max_tokens=request.sampling.max_tokens)
        await preparing
        self.link.start(request.request_id)
        outputs = self.link.outputs(request.request_id)
        assert await self.worker.receive() == Start(request_id=request.request_id)
        return outputs


@pytest.fixture
async def connect(ledger: Ledger) -> AsyncIterator[Any]:
    pairs: list[Pair] = []

    async def connect(**options: Any) -> Pair:
        ours, theirs = socket.socketpair()
        link = ReplicaLink(ledger.commit, **options)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: link.stream, sock=ours)
        pair = Pair(link, Worker(*await asyncio.open_unix_connection(sock=theirs)))
        pairs.append(pair)
        return pair

    yield connect
    for pair in pairs:
        pair.link.close("the test is over")
        pair.worker.writer.close()
        await pair.link._delivering


@pytest.fixture
async def pair(connect: Any) -> Pair:
    return await (await connect(manifest=DECODER)).get_ready()


@pytest.fixture
async def tensor_pair(connect: Any) -> Pair:
    return await (await connect(manifest=TENSOR)).get_ready(TENSOR)


def generate(request_id: str = "r1", **values: Any) -> Generate:
    sampling = SamplingParams(max_tokens=values.pop("max_tokens", 16))
    if not {"text", "token_ids", "messages"} & set(values):
        values["token_ids"] = [1, 2, 3]
    return Generate(request_id=request_id, sampling=sampling, cache_salt=b"s", **values)


def predict(request_id: str = "p1") -> Predict:
    return Predict(request_id=request_id, inputs=[tensor()])


def tensor(rows: int = 1, **values: Any) -> Tensor:
    fields = {"name": "x", "dtype": "float32", "shape": [rows, 2], "data": b"\0" * 8 * rows}
    return Tensor(**{**fields, **values})


def predicted(request_id: str = "p1", **values: Any) -> Predicted:
    fields = {"outputs": [tensor()], "device_ns": 1, "batch_rows": 1, "queue_ns": 0}
    return Predicted(request_id=request_id, **{**fields, **values})


def output(request_id: str = "r1", **values: Any) -> SequenceOutput:
    fields = {
        "choice": 0,
        "token_ids": [7],
        "text": "a",
        "num_cached_tokens": 0,
        "device_ns": 1,
    }
    return SequenceOutput(request_id=request_id, **{**fields, **values})


async def collect(outputs: AsyncIterator[list[SequenceOutput]]) -> list[list[SequenceOutput]]:
    return [step async for step in outputs]


# --- getting ready ----------------------------------------------------------------------


async def test_a_worker_that_gives_up_says_why(connect: Any) -> None:
    pair = await connect()
    serving = asyncio.create_task(pair.link.serve(Serve(artifact_dir="/a"), 5))
    error = WireError(type="server_error", message="The weights are damaged.", code="damaged")
    pair.worker.send(Fatal(error=error))
    with pytest.raises(LaunchError, match="weights are damaged"):
        await serving
    assert pair.link.gave_up


async def test_a_worker_that_never_gets_ready(connect: Any) -> None:
    pair = await connect()
    with pytest.raises(LaunchError, match="did not get ready within 0 seconds"):
        await pair.link.serve(Serve(artifact_dir="/a"), 0.05)
    assert pair.link.closed


async def test_a_worker_serves_what_its_build_made(connect: Any) -> None:
    pair = await connect(manifest=DECODER)
    with pytest.raises(LaunchError, match="something else than its build made"):
        await pair.get_ready(TENSOR)


async def test_a_worker_that_answers_before_it_is_ready(connect: Any) -> None:
    pair = await connect()
    serving = asyncio.create_task(pair.link.serve(Serve(artifact_dir="/a"), 5))
    pair.worker.send(Step(outputs=[output()]))
    with pytest.raises(LaunchError, match="before it was ready"):
        await serving


# --- generation -------------------------------------------------------------------------


async def test_outputs_come_step_by_step_and_in_order(pair: Pair, ledger: Ledger) -> None:
    outputs = await pair.started(generate())
    steps = [output(text="a"), output(text="b"), output(text="c", finish_reason="stop")]
    for step in steps:
        pair.worker.send(Step(outputs=[step]))
    assert await collect(outputs) == [[step] for step in steps]
    assert ledger.outputs == steps
    assert pair.link.num_outstanding == 0


async def test_nothing_is_handed_out_before_it_is_durable(pair: Pair, ledger: Ledger) -> None:
    outputs = await pair.started(generate())
    ledger.gate.clear()
    pair.worker.send(Step(outputs=[output()]), Step(outputs=[output(finish_reason="stop")]))
    first = asyncio.ensure_future(anext(outputs))
    await asyncio.sleep(0.05)
    assert not first.done()
    assert pair.link.num_outstanding == 1
    ledger.gate.set()
    assert await first == [output()]
    assert await collect(outputs) == [[output(finish_reason="stop")]]


async def test_a_wait_may_be_cut_short_without_losing_outputs(pair: Pair) -> None:
    outputs = await pair.started(generate())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(outputs), 0.01)
    pair.worker.send(Step(outputs=[output(finish_reason="stop")]))
    assert await collect(outputs) == [[output(finish_reason="stop")]]


async def test_requests_share_steps_and_choices_end_one_by_one(pair: Pair) -> None:
    first = await pair.started(generate("r1", num_choices=2))
    second = await pair.started(generate("r2"))
    step = [
        output("r1", finish_reason="stop"),
        output("r2", finish_reason="length"),
        output("r1", choice=1),
    ]
    pair.worker.send(Step(outputs=step), Step(outputs=[output(choice=1, finish_reason="stop")]))
    assert await collect(second) == [[step[1]]]
    assert await collect(first) == [[step[0], step[2]], [output(choice=1, finish_reason="stop")]]


async def test_steps_that_wait_for_the_journal_share_its_next_record(
    pair: Pair, ledger: Ledger
) -> None:
    first, second = await pair.started(generate("r1")), await pair.started(generate("r2"))
    broke = WireError(type="server_error", message="broke", code="broke", status=500)
    ledger.gate.clear()
    pair.worker.send(Step(outputs=[output("r1")]))
    await until(lambda: ledger.sizes == [1])
    pair.worker.send(
        *[Step(outputs=[output("r1"), output("r2")]) for _ in range(10)],
        Failed(request_id="r2", error=broke),
        *[Step(outputs=[output("r1")]) for _ in range(4)],
        Step(outputs=[output("r1", finish_reason="stop")]),
        Stats(requests=1),
    )
    await until(lambda: pair.link.stats.requests == 1)
    ledger.gate.set()
    assert [len(step) for step in await collect(first)] == [1] * 16
    assert ledger.sizes == [1, 20, 5]  # nothing passes the failure
    for _ in range(10):
        assert await anext(second) == [output("r2")]
    with pytest.raises(RuntimeFailure, match="broke"):
        await anext(second)


async def test_a_shared_record_is_bounded_and_fails_as_one(pair: Pair, ledger: Ledger) -> None:
    outputs = [await pair.started(generate(f"r{n}", max_tokens=400)) for n in range(2)]
    ledger.gate.clear()
    pair.worker.send(Step(outputs=[output("r0")]))
    await until(lambda: ledger.sizes == [1])
    steps = [Step(outputs=[output(f"r{n % 2}")]) for n in range(2 * MAX_UNDELIVERED)]
    pair.worker.send(*steps, Stats(requests=1))
    await until(lambda: pair.link.stats.requests == 1)
    ledger.gate.set()
    await until(lambda: len(ledger.sizes) == 3)
    assert ledger.sizes == [1, MAX_UNDELIVERED, MAX_UNDELIVERED]
    ledger.error = Unavailable("no disk", code="journal_unavailable")
    pair.worker.send(*steps[:4])
    for each in outputs:
        with pytest.raises(AppError, match="no disk"):
            await collect(each)
    cancels = [await pair.worker.receive() for _ in outputs]
    assert {cancel.request_id for cancel in cancels} == {"r0", "r1"}


async def test_what_is_not_durable_is_not_delivered(pair: Pair, ledger: Ledger) -> None:
    outputs = await pair.started(generate())
    ledger.error = Unavailable("no disk", code="journal_unavailable")
    pair.worker.send(Step(outputs=[output()]))
    with pytest.raises(AppError, match="no disk") as failure:
        await collect(outputs)
    assert (failure.value.status, failure.value.code) == (503, "journal_unavailable")
    assert await pair.worker.receive() == Cancel(request_id="r1")
    # What the worker sends until it has read that is no breach.
    pair.worker.send(Step(outputs=[output()]), Stats(requests=5))
    await until(lambda: pair.link.stats.requests == 5)
    assert not pair.link.closed


async def test_a_refusal_is_typed_and_harmless(pair: Pair) -> None:
    preparing = asyncio.create_task(pair.link.prepare(generate()))
    await pair.worker.receive()
    error = WireError(
        type="invalid_request_error", message="too\x1b[2J long", code="long", param="n", status=999
    )
    pair.worker.send(Failed(request_id="r1", error=error))
    with pytest.raises(RuntimeFailure, match=r"^too long$") as failure:
        await preparing
    assert (failure.value.status, failure.value.param) == (500, "n")
    assert pair.link.num_outstanding == 0


async def test_a_failure_comes_after_the_outputs_before_it(pair: Pair) -> None:
    outputs = await pair.started(generate())
    error = WireError(type="server_error", message="broke", code="broke", status=500)
    pair.worker.send(Step(outputs=[output()]), Failed(request_id="r1", error=error))
    assert await anext(outputs) == [output()]
    with pytest.raises(RuntimeFailure, match="broke"):
        await anext(outputs)


async def test_cancelling_a_running_request_delivers_its_end(pair: Pair) -> None:
    outputs = await pair.started(generate())
    pair.link.cancel("r1")
    assert await pair.worker.receive() == Cancel(request_id="r1")
    pair.worker.send(Step(outputs=[output(finish_reason="abort")]))
    assert (await collect(outputs))[-1][-1].finish_reason == "abort"
    pair.link.cancel("r1")
    pair.link.cancel("unknown")


async def test_cancelling_before_the_start_forgets_at_once(pair: Pair) -> None:
    preparing = asyncio.create_task(pair.link.prepare(generate()))
    assert isinstance(await pair.worker.receive(), Generate)
    preparing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await preparing
    assert pair.link.num_outstanding == 0
    assert await pair.worker.receive() == Cancel(request_id="r1")
    late = Prepared(request_id="r1", num_prompt_tokens=1, max_tokens=1)
    pair.worker.send(late, Stats(requests=1))
    await until(lambda: pair.link.stats.requests == 1)
    assert not pair.link.closed


@pytest.mark.parametrize("seconds", [0.05])
async def test_a_worker_that_hangs_is_given_up(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(link_module, "CANCEL_SECONDS", seconds)
    outputs = await pair.started(generate())
    pair.link.cancel("r1")
    with pytest.raises(RuntimeFailure) as failure:
        await collect(outputs)
    assert failure.value.code == "worker_lost"


async def test_a_tensor_worker_that_hangs_is_given_up(
    tensor_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "CANCEL_SECONDS", 0.05)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(tensor_pair.link.predict(predict()), 0.01)
    assert "cancelled request" in await asyncio.wait_for(tensor_pair.link.wait_closed(), 5)


async def test_a_cancel_after_the_end_expects_nothing_of_an_idle_worker(
    pair: Pair, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "CANCEL_SECONDS", 0.05)
    outputs = await pair.started(generate())
    ledger.gate.clear()
    last = output(finish_reason="stop")
    pair.worker.send(Step(outputs=[last]), Stats(requests=1))
    await until(lambda: pair.link.stats.requests == 1)
    pair.link.cancel("r1")  # while the journal writes
    ledger.gate.set()
    assert await collect(outputs) == [[last]]
    await asyncio.sleep(0.2)
    assert not pair.link.closed


# --- claims -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        generate(token_ids=[1, 2, 3]),
        generate(text="ab"),
        generate(messages=[ChatMessage(role="user", content="hi")]),
    ],
    ids=["ids", "text", "messages"],
)
async def test_more_prompt_tokens_than_bytes_are_refused_but_stop_nobody(
    pair: Pair, request_: Generate
) -> None:
    preparing = asyncio.create_task(pair.link.prepare(request_))
    await pair.worker.prepare(num_prompt_tokens=100)
    with pytest.raises(RuntimeFailure, match="cannot have") as failure:
        await preparing
    assert (failure.value.status, failure.value.code) == (500, "implausible_token_count")
    assert await pair.worker.receive() == Cancel(request_id="r1")
    assert not pair.link.closed


async def test_more_tokens_than_asked_for_are_refused(pair: Pair) -> None:
    preparing = asyncio.create_task(pair.link.prepare(generate()))
    await pair.worker.prepare(max_tokens=17)
    with pytest.raises(RuntimeFailure, match="cannot have"):
        await preparing


@pytest.mark.parametrize(
    "lie",
    [
        output("nobody"),
        output(choice=1),
        output(token_ids=[1] * 17),
        output(token_ids=[1000]),
        output(token_ids=[-1]),
        output(num_cached_tokens=4),
        output(num_cached_tokens=-1),
        output(device_ns=10**12),
        output(device_ns=-1),
        output(text="x" * 100_000),
        output(finish_reason="stop", stop_string="of nobody"),
    ],
    ids=lambda lie: msgspec.json.encode(lie).decode()[:60],
)
async def test_a_worker_that_lies_is_stopped(
    pair: Pair, ledger: Ledger, lie: SequenceOutput
) -> None:
    outputs = await pair.started(generate())
    pair.worker.send(Step(outputs=[lie]))
    with pytest.raises(RuntimeFailure) as failure:
        await collect(outputs)
    assert (failure.value.status, failure.value.code) == (503, "worker_untrusted")
    assert pair.link.closed
    assert not ledger.outputs  # what is not believed is not metered
    assert await pair.worker.is_closed()


async def test_output_after_the_end_is_a_lie_until_it_is_old(pair: Pair) -> None:
    await pair.started(generate())
    pair.worker.send(Step(outputs=[output(finish_reason="stop"), output()]))
    assert "finished or unknown" in await pair.link.wait_closed()


async def test_output_without_end_is_a_lie(pair: Pair) -> None:
    await pair.started(generate())
    pair.worker.send(*[Step(outputs=[output(token_ids=[], text="")] * 100) for _ in range(20)])
    assert "without end" in await pair.link.wait_closed()


async def test_device_time_of_all_requests_is_bounded_together(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = monotonic_ns()
    monkeypatch.setattr(link_module, "monotonic_ns", lambda: frozen)
    pair.link._ready_ns = frozen
    for number in range(8):
        await pair.started(generate(f"r{number}"))
    # Each share alone is possible, all of them at once on one device are not.
    step = [output(f"r{number}", device_ns=9_000_000) for number in range(8)]
    pair.worker.send(Step(outputs=step))
    assert "device time" in await pair.link.wait_closed()


@pytest.mark.parametrize(
    "lie",
    [
        predicted("nobody"),
        predicted(outputs=[]),
        predicted(outputs=[tensor(dtype="float64")]),
        predicted(outputs=[tensor(dtype="object")]),
        predicted(outputs=[tensor(shape=[1, 3])]),
        predicted(outputs=[tensor(data=b"short")]),
        predicted(outputs=[tensor(shape=[-1, 2])]),
        predicted(device_ns=10**12),
        predicted(device_ns=-1),
        predicted(batch_rows=0),
    ],
    ids=range(10),
)
async def test_a_tensor_worker_that_lies_is_stopped(tensor_pair: Pair, lie: Predicted) -> None:
    predicting = asyncio.create_task(tensor_pair.link.predict(predict()))
    await tensor_pair.worker.receive()
    tensor_pair.worker.send(lie)
    with pytest.raises(RuntimeFailure) as failure:
        await predicting
    assert failure.value.code == "worker_untrusted"


@pytest.mark.parametrize(
    "garbage",
    [
        LENGTH.pack(0),
        LENGTH.pack(MAX_FRAME_BYTES + 1),
        LENGTH.pack(4) + b"\xc1\xc1\xc1\xc1",
        LENGTH.pack(14) + msgspec.msgpack.encode({"type": "nothing"}),
        LENGTH.pack(5000) + b"\x91" * 5000,  # arrays within arrays
    ],
    ids=["empty", "too long", "not msgpack", "unknown type", "deep"],
)
async def test_garbage_ends_the_link_and_its_requests(pair: Pair, garbage: bytes) -> None:
    outputs = await pair.started(generate())
    preparing = asyncio.create_task(pair.link.prepare(generate("r2")))
    await pair.worker.receive()
    pair.worker.writer.write(garbage)
    for failing in (preparing, collect(outputs)):
        with pytest.raises(RuntimeFailure) as failure:
            await failing
        assert failure.value.status == 503


async def test_a_frame_that_is_too_long_is_refused_before_it_is_received(pair: Pair) -> None:
    pair.worker.writer.write(LENGTH.pack(MAX_FRAME_BYTES + 1))
    assert "invalid frame" in await pair.link.wait_closed()


# --- the end ----------------------------------------------------------------------------


async def test_a_worker_that_dies_fails_its_requests_at_once(pair: Pair) -> None:
    running = await pair.started(generate("r1"))
    pair.worker.send(Step(outputs=[output()]))
    assert await anext(running) == [output()]
    preparing = asyncio.create_task(pair.link.prepare(generate("r2")))
    await pair.worker.receive()
    pair.worker.writer.close()
    for failing in (preparing, anext(running)):
        with pytest.raises(RuntimeFailure) as failure:
            await failing
        assert (failure.value.status, failure.value.code) == (503, "worker_lost")
        assert failure.value.retry_after_seconds
    for late in (pair.link.prepare(generate("r3")), pair.link.predict(predict())):
        with pytest.raises(RuntimeFailure, match="closed its connection"):
            await late
    pair.link.start("r2")
    with pytest.raises(RuntimeFailure) as failure:
        await collect(pair.link.outputs("r2"))
    assert pair.link.num_outstanding == 0


async def test_outputs_that_arrived_before_the_death_are_delivered(
    pair: Pair, ledger: Ledger
) -> None:
    outputs = await pair.started(generate())
    ledger.gate.clear()
    pair.worker.send(Step(outputs=[output()]))
    pair.worker.writer.close()
    await pair.link.wait_closed()
    ledger.gate.set()
    assert await anext(outputs) == [output()]
    with pytest.raises(RuntimeFailure):
        await anext(outputs)


async def test_draining_lets_requests_finish_and_refuses_new_ones(pair: Pair) -> None:
    outputs = await pair.started(generate())
    draining = asyncio.create_task(pair.link.drain())
    await asyncio.sleep(0.01)
    with pytest.raises(Unavailable) as refusal:
        await pair.link.prepare(generate("r2"))
    assert refusal.value.retry_after_seconds
    pair.worker.send(Step(outputs=[output(finish_reason="stop")]))
    assert len(await collect(outputs)) == 1
    assert await pair.worker.receive() == Drain()
    pair.worker.writer.close()
    await draining


async def test_draining_still_takes_requests_for_a_while(pair: Pair) -> None:
    draining = asyncio.create_task(pair.link.drain(grace_seconds=0.2))
    await asyncio.sleep(0.01)
    outputs = await pair.started(generate())
    pair.worker.send(Step(outputs=[output(finish_reason="stop")]))
    assert len(await collect(outputs)) == 1
    assert await pair.worker.receive() == Drain()
    pair.worker.writer.close()
    await draining


# --- limits and back-pressure -----------------------------------------------------------


async def test_requests_are_bounded(connect: Any) -> None:
    pair = await (await connect(max_outstanding=1)).get_ready()
    await pair.started(generate())
    with pytest.raises(RateLimited):
        await pair.link.prepare(generate("r2"))


async def test_a_request_too_large_for_a_frame(tensor_pair: Pair) -> None:
    request = Predict(request_id="p1", inputs=[tensor(data=b"\0" * (MAX_FRAME_BYTES + 1))])
    with pytest.raises(TooLarge):
        await tensor_pair.link.predict(request)


async def test_a_worker_that_does_not_read_holds_requests_back(tensor_pair: Pair) -> None:
    tensor_pair.worker.writer.transport.pause_reading()
    large = [tensor(rows=100_000)]
    tasks = [
        asyncio.create_task(tensor_pair.link.predict(Predict(request_id=f"p{n}", inputs=large)))
        for n in range(20)
    ]
    await asyncio.sleep(0.1)
    transport = tensor_pair.link.stream._transport
    assert transport is not None
    sent = transport.get_write_buffer_size()
    assert not tensor_pair.link.stream._writable.is_set()
    more = asyncio.create_task(tensor_pair.link.predict(predict("late")))
    await asyncio.sleep(0.05)
    assert transport.get_write_buffer_size() == sent
    tensor_pair.worker.writer.transport.resume_reading()
    for _ in range(21):
        message = await tensor_pair.worker.receive()
        tensor_pair.worker.send(predicted(message.request_id))
    await asyncio.gather(*tasks, more)


async def test_what_is_cancelled_while_it_waits_is_never_sent(tensor_pair: Pair) -> None:
    stream = tensor_pair.link.stream
    stream.pause_writing()
    predicting = asyncio.create_task(tensor_pair.link.predict(predict()))
    await asyncio.sleep(0)
    tensor_pair.link.withdraw("p1")
    preparing = asyncio.create_task(tensor_pair.link.prepare(generate()))
    await asyncio.sleep(0)
    tensor_pair.link.cancel("r1")
    stream.resume_writing()
    for waiting in (predicting, preparing):
        with pytest.raises(RuntimeFailure, match="was cancelled"):
            await waiting
    assert tensor_pair.link.num_outstanding == 0
    assert await tensor_pair.worker.receive() == Cancel(request_id="r1")
    stream.send(Cancel(request_id="marker"))
    assert await tensor_pair.worker.receive() == Cancel(request_id="marker")


async def test_a_withdrawn_prediction_ends_as_its_worker_says(tensor_pair: Pair) -> None:
    cancelled = WireError(type="x", message="dropped", code="cancelled", status=499)
    dropped = asyncio.create_task(tensor_pair.link.predict(predict("p1")))
    running = asyncio.create_task(tensor_pair.link.predict(predict("p2")))
    for _ in range(2):
        await tensor_pair.worker.receive()
    for request_id in ("p1", "p2", "unknown"):
        tensor_pair.link.withdraw(request_id)
    for request_id in ("p1", "p2"):
        assert await tensor_pair.worker.receive() == Cancel(request_id=request_id)
    tensor_pair.worker.send(Failed(request_id="p1", error=cancelled), predicted("p2"))
    with pytest.raises(RuntimeFailure, match="dropped"):
        await dropped
    assert await running == predicted("p2")


async def test_a_slow_journal_holds_the_worker_back(pair: Pair, ledger: Ledger) -> None:
    outputs = await pair.started(generate(max_tokens=400))
    ledger.gate.clear()
    text = "x" * 1_900
    for _ in range(399):
        pair.worker.send(Step(outputs=[output(text=text)]))
    pair.worker.send(Step(outputs=[output(text=text, finish_reason="stop")]))
    await until(lambda: pair.link._delivery.num_waiting >= MAX_UNDELIVERED)
    await asyncio.sleep(0.1)
    waiting = pair.link._delivery.num_waiting
    assert waiting < 300
    assert pair.worker.writer.transport.get_write_buffer_size() > 0
    ledger.gate.set()
    assert len(await collect(outputs)) == 400


async def test_frames_of_one_turn_leave_in_one_write(tensor_pair: Pair) -> None:
    transport = tensor_pair.link.stream._transport
    assert transport is not None
    writes: list[bytes] = []
    original = transport.write
    tensor_pair.link.stream._transport = _Recording(transport, writes)  # type: ignore[assignment]
    tasks = [asyncio.create_task(tensor_pair.link.predict(predict(f"p{n}"))) for n in range(50)]
    for _ in range(50):
        message = await tensor_pair.worker.receive()
        tensor_pair.worker.send(predicted(message.request_id))
    await asyncio.gather(*tasks)
    assert len(writes) == 1
    assert original is not None


class _Recording:
    def __init__(self, transport: asyncio.Transport, writes: list[bytes]) -> None:
        self._transport = transport
        self._writes = writes

    def write(self, data: bytes) -> None:
        self._writes.append(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def test_a_large_answer_arrives_in_pieces(tensor_pair: Pair) -> None:
    predicting = asyncio.create_task(tensor_pair.link.predict(predict()))
    await tensor_pair.worker.receive()
    answer = predicted(outputs=[tensor(rows=1_000_000)])
    frames = encode_frame(Stats(requests=1)) + encode_frame(answer) + encode_frame(Stats(rows=2))
    tensor_pair.worker.writer.write(frames[:7])
    await asyncio.sleep(0.01)
    tensor_pair.worker.writer.write(frames[7:])
    assert await predicting == answer
    await until(lambda: tensor_pair.link.stats == Stats(rows=2))


# --- what is metered --------------------------------------------------------------------


async def test_what_is_delivered_is_metered_once(pair: Pair) -> None:
    outputs = await pair.started(generate(num_choices=2))
    pair.worker.send(
        Step(outputs=[output(num_cached_tokens=2, device_ns=5), output(choice=1, device_ns=4)]),
        Step(outputs=[output(num_cached_tokens=2, finish_reason="stop")]),
        Step(outputs=[output(choice=1, finish_reason="stop")]),
    )
    await collect(outputs)
    assert pair.link.metered.delivered == Counts(1, 3, 2, 4, 11)
    assert (pair.link.metered.undelivered, pair.link.metered.num_failed) == (Counts(), 0)


async def test_what_is_not_durable_is_metered_as_undelivered(pair: Pair, ledger: Ledger) -> None:
    outputs = await pair.started(generate())
    ledger.error = Unavailable("the disk is full", code="journal_unavailable")
    pair.worker.send(Step(outputs=[output(device_ns=5)]))
    with pytest.raises(RuntimeFailure, match="disk is full"):
        await collect(outputs)
    pair.worker.send(Step(outputs=[output(device_ns=6, finish_reason="abort")]))
    metered = pair.link.metered
    await until(lambda: metered.undelivered.device_ns == 11)
    assert metered.undelivered == Counts(1, 3, 0, 2, 11)
    assert (metered.delivered, metered.num_failed) == (Counts(), 1)


async def test_predictions_and_what_failed_in_vain_are_metered(tensor_pair: Pair) -> None:
    tasks = [asyncio.create_task(tensor_pair.link.predict(predict(f"p{n}"))) for n in range(3)]
    await asyncio.sleep(0.01)
    error = WireError("invalid_request_error", "It is too large.", "too_large", status=413)
    tensor_pair.worker.send(
        predicted("p0", device_ns=100),
        Failed(request_id="p1", error=error, device_ns=30),
        Failed(request_id="p2", error=error),
    )
    await asyncio.wait(tasks)
    metered = tensor_pair.link.metered
    assert metered.delivered == Counts(requests=1, device_ns=100)
    assert metered.undelivered == Counts(device_ns=30)
    assert metered.num_failed == 1
    assert [task.exception() is None for task in tasks] == [True, False, False]
