"""A tensor program's requests over a stream, with programs that do what each test needs."""

import asyncio
import io
import threading

import pytest
import torch
from PIL import Image

from runtime.batching import tensors
from runtime.protocol import (
    Cancel,
    Drain,
    Failed,
    Fatal,
    Generate,
    ImageInput,
    Predict,
    Predicted,
    SamplingParams,
    Schema,
    Serve,
    Tensor,
    TensorSpec,
    frames,
)
from runtime.server import memory
from runtime.server.tensor import TensorServer
from tests.runtime.server.stream import Stream

SCHEMA = Schema(
    inputs=[TensorSpec(name="x", dtype="float32", shape=[None, 2])],
    outputs=[TensorSpec(name="y", dtype="float32", shape=[None, 2])],
    is_batched=True,
)


def predict(request_id: str, *values: float) -> Predict:
    data = torch.tensor(values, dtype=torch.float32).numpy().tobytes()
    shape = [len(values) // 2, 2]
    tensor = Tensor(name="x", dtype="float32", shape=shape, data=data)
    return Predict(request_id=request_id, inputs=[tensor])


class Program:
    """Doubles its input, once it may; raises on negative numbers."""

    def __init__(self) -> None:
        self.may_run = threading.Event()
        self.may_run.set()
        self.has_begun = threading.Event()
        self.num_rows: list[int] = []

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        self.has_begun.set()
        self.may_run.wait(10)
        (x,) = inputs
        self.num_rows.append(x.shape[0])
        if bool((x < 0).any()):
            raise RuntimeError("negative")
        return [x * 2]


def serve(program: Program, **options: object) -> TensorServer:
    config = Serve(artifact_dir="/", **options)  # type: ignore[arg-type]
    return TensorServer(program.run, SCHEMA, config)


async def test_rows_of_several_requests_share_a_run() -> None:
    program = Program()
    async with Stream(serve(program)) as peer:
        program.may_run.clear()
        peer.send(*(predict(f"r{i}", i, i) for i in range(6)))
        program.may_run.set()
        answers = [await peer.expect(Predicted) for _ in range(6)]
        for answer in answers:
            value = 2.0 * int(answer.request_id[1:])
            assert answer.outputs[0].data == torch.tensor([value, value]).numpy().tobytes()
        assert sum(program.num_rows) == 6
        assert max(program.num_rows) > 1


async def test_a_failing_request_fails_alone() -> None:
    async with Stream(serve(Program())) as peer:
        peer.send(predict("good", 1, 1), predict("bad", -1, 1), predict("wrong", 1, 2, 3, 4, 5))
        failed = {}
        while len(failed) < 2:
            message = await peer.receive()
            if hasattr(message, "error"):
                failed[message.request_id] = message.error.status  # type: ignore[union-attr]
        assert failed == {"bad": 422, "wrong": 400}
        if not any(isinstance(each, Predicted) for each in peer.received):
            await peer.expect(Predicted)


async def test_cancel_drops_what_waits_and_lets_a_run_be_answered() -> None:
    program = Program()
    program.may_run.clear()
    server = serve(program, max_batch_rows=1)
    async with Stream(server) as peer:
        peer.send(predict("running", 1, 1), predict("waiting", 2, 2))
        # In one write with its request: the request has not had its first turn yet.
        peer.send(predict("at once", 3, 3), Cancel(request_id="at once"))
        await peer.expect_failed("at once", "cancelled", 499)
        peer.send(Cancel(request_id="waiting"), Cancel(request_id="running"))
        await peer.expect_failed("waiting", "cancelled", 499)
        assert server.num_requests == 1
        program.may_run.set()
        assert (await peer.expect(Predicted)).request_id == "running"
        assert server.num_requests == 0
        peer.send(predict("after", 4, 4))
        assert (await peer.expect(Predicted)).request_id == "after"
        assert len(program.num_rows) == 2  # what was cancelled while it waited never ran


async def test_more_than_may_wait_are_refused() -> None:
    program = Program()
    program.may_run.clear()
    async with Stream(serve(program, max_waiting=2)) as peer:
        peer.send(*(predict(f"r{i}", i, i) for i in range(3)))
        await peer.expect_failed("r2", "queue_full", 429)
        program.may_run.set()
        for _ in range(2):
            await peer.expect(Predicted)


async def test_a_refusal_says_when_what_waits_is_served() -> None:
    program = Program()
    program.may_run.clear()
    config = Serve(artifact_dir="/", max_waiting=5, max_batch_rows=1)
    server = TensorServer(program.run, SCHEMA, config, measured={1: 2000.0})
    async with Stream(server) as peer:
        peer.send(*(predict(f"r{i}", i, i) for i in range(6)))
        failed = await peer.expect(Failed)
        assert failed.error.retry_after_seconds == 8.0  # one of the five runs
        program.may_run.set()
        for _ in range(5):
            await peer.expect(Predicted)


async def test_stats_tell_the_occupancy_of_runs() -> None:
    program = Program()
    program.may_run.clear()
    server = serve(program)
    async with Stream(server) as peer:
        peer.send(predict("first", 1, 1), *(predict(f"r{i}", i, i) for i in range(3)))
        await asyncio.to_thread(program.has_begun.wait, 10)
        program.may_run.set()
        for _ in range(4):
            await peer.expect(Predicted)
        stats = server.stats()
        assert stats.runs_by_rows == {1: 1, 4: 1}  # three rows count as up to four
        assert (stats.requests, stats.runs, stats.rows) == (4, 2, 4)
        assert stats.queue_ns > 0


async def test_waiting_inputs_may_hold_so_much_memory_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "MAX_WAITING_BYTES", 40)  # two of 8 bytes, each held twice
    program = Program()
    program.may_run.clear()
    server = serve(program, max_batch_rows=1)
    async with Stream(server) as peer:
        peer.send(*(predict(f"r{i}", i, i) for i in range(3)))
        await peer.expect_failed("r2", "queue_full", 429)
        peer.send(Cancel(request_id="r1"), predict("r3", 3, 3))
        await peer.expect_failed("r1", "cancelled", 499)
        program.may_run.set()
        answered = {(await peer.expect(Predicted)).request_id for _ in range(2)}
        assert answered == {"r0", "r3"}
        assert server._memory.total_bytes == 0
        peer.send(predict("alone", *[1.0] * 100))
        assert (await peer.expect(Predicted)).request_id == "alone"


async def test_a_peer_that_does_not_read_stops_the_runs() -> None:
    num_runs = 0

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        nonlocal num_runs
        num_runs += 1
        return [inputs[0].repeat(1, 25_000)]  # 200 kB

    server = TensorServer(run, SCHEMA, Serve(artifact_dir="/", max_batch_rows=1))
    async with Stream(server) as peer:
        peer.send(*(predict(f"r{i}", i, i) for i in range(100)))
        num_before = -1
        while num_runs != num_before:  # until it stands still
            num_before = num_runs
            await asyncio.sleep(0.2)
        assert num_runs < 50
        for _ in range(100):
            await peer.expect(Predicted)
        assert num_runs == 100


async def test_an_answer_too_large_for_a_frame_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 500)
    widths = iter([1000, 1])
    server = TensorServer(
        lambda inputs: [inputs[0].repeat(1, next(widths))], SCHEMA, Serve(artifact_dir="/")
    )
    async with Stream(server) as peer:
        peer.send(predict("wide", 1, 1))
        await peer.expect_failed("wide", "output_too_large", 413)
        peer.send(predict("narrow", 1, 1))
        assert (await peer.expect(Predicted)).request_id == "narrow"
        assert server.num_requests == 0


async def test_an_answer_known_to_be_too_large_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "MAX_OUTPUT_BYTES", 40)
    program = Program()
    async with Stream(serve(program)) as peer:
        peer.send(predict("six", *[1.0] * 12))
        failed = await peer.expect(Failed)
        assert (failed.error.code, failed.device_ns) == ("output_too_large", 0)
        assert program.num_rows == []
        peer.send(predict("five", *[1.0] * 10))
        await peer.expect(Predicted)


async def test_what_failed_after_a_run_tells_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = Schema(
        inputs=SCHEMA.inputs,
        outputs=[TensorSpec(name="y", dtype="float32", shape=[None, None])],
        is_batched=True,
    )
    monkeypatch.setattr(tensors, "MAX_OUTPUT_BYTES", 40)
    server = TensorServer(lambda inputs: [inputs[0].repeat(1, 10)], schema, Serve(artifact_dir="/"))
    async with Stream(server) as peer:
        peer.send(predict("wide", 1, 1))
        failed = await peer.expect(Failed)
        assert failed.error.code == "output_too_large"
        assert failed.device_ns > 0
    async with Stream(serve(Program(), max_batch_rows=1)) as peer:
        for request in (predict("at once", -1, 1), predict("later", 1, 1, -1, 1)):
            peer.send(request)
            failed = await peer.expect(Failed)
            assert failed.error.code == "model_failed"
            assert failed.device_ns > 0


async def test_draining_answers_what_was_accepted() -> None:
    program = Program()
    program.may_run.clear()
    async with Stream(serve(program)) as peer:
        peer.send(predict("accepted", 1, 1), Drain(), predict("late", 1, 1))
        await peer.expect_failed("late", "draining", 503)
        program.may_run.set()
        assert (await peer.expect(Predicted)).request_id == "accepted"
        assert await peer.end() == 0


async def test_a_lost_device_is_fatal() -> None:
    def run(_: list[torch.Tensor]) -> list[torch.Tensor]:
        raise torch.AcceleratorError("illegal access")

    server = TensorServer(run, SCHEMA, Serve(artifact_dir="/"))
    async with Stream(server) as peer:
        peer.send(predict("a", 1, 1))
        await peer.expect_failed("a", "device_lost", 503)
        assert (await peer.expect(Fatal)).error.code == "device_lost"
        assert await peer.end() == 1


async def test_generation_is_not_for_tensor_programs() -> None:
    async with Stream(serve(Program())) as peer:
        peer.send(Generate(request_id="a", sampling=SamplingParams(), cache_salt=b"", text="x"))
        assert await peer.end() == 1


async def test_a_peer_that_goes_leaves_nothing_behind() -> None:
    program = Program()
    program.may_run.clear()
    server = serve(program)
    async with Stream(server) as peer:
        peer.send(predict("a", 1, 1), predict("b", 1, 1))
        await peer.writer.drain()
    program.may_run.set()


async def test_an_image_is_one_row() -> None:
    file = io.BytesIO()
    Image.new("L", (16, 16), 255).save(file, "PNG")
    image = ImageInput(height=8, width=8, channels=1, is_channels_first=True)
    schema = Schema(
        inputs=[TensorSpec(name="x", dtype="float32", shape=[None, 1, 8, 8], image=image)],
        outputs=[TensorSpec(name="y", dtype="float32", shape=[None])],
        is_batched=True,
    )
    server = TensorServer(lambda x: [x[0].sum((1, 2, 3))], schema, Serve(artifact_dir="/"))
    async with Stream(server) as peer:
        peer.send(Predict(request_id="white", image=file.getvalue()))
        (sums,) = (await peer.expect(Predicted)).outputs
        assert torch.frombuffer(bytearray(sums.data), dtype=torch.float32).tolist() == [64.0]
        peer.send(Predict(request_id="torn", image=file.getvalue()[:40]))
        assert (await peer.expect(Failed)).error.code == "unreadable_image"
        peer.send(Predict(request_id="text", texts=[["a"]]))
        assert (await peer.expect(Failed)).error.code == "wrong_kind_of_input"
        assert server.num_requests == 0


async def test_texts_are_tokenised_beside_the_loop() -> None:
    def rows(texts: list[list[str]]) -> list[Tensor]:
        assert threading.current_thread() is not threading.main_thread()
        values = torch.tensor([[float(len(word)) for word in row] for row in texts])
        return [
            Tensor(
                name="x", dtype="float32", shape=list(values.shape), data=values.numpy().tobytes()
            )
        ]

    server = TensorServer(Program().run, SCHEMA, Serve(artifact_dir="/"), rows)
    async with Stream(server) as peer:
        peer.send(Predict(request_id="pairs", texts=[["a", "bcd"], ["ef", ""]]))
        (output,) = (await peer.expect(Predicted)).outputs
        values = torch.frombuffer(bytearray(output.data), dtype=torch.float32)
        assert values.tolist() == [2.0, 6.0, 4.0, 0.0]
