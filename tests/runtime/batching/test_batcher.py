"""Requests that share runs get what they would get alone, in order, and fail alone."""

import asyncio
import threading

import numpy as np
import pytest
import torch

from runtime.batching.batcher import Batcher, Prediction
from runtime.batching.tensors import PredictFailure
from runtime.protocol import Schema, Tensor, TensorSpec


def schema(*, is_batched: bool = True, max_rows: int | None = None) -> Schema:
    axis = TensorSpec(
        name="x",
        dtype="float32",
        shape=[None, None],
        min_shape=[1, 1],
        max_shape=[max_rows, None],
    )
    output = TensorSpec(name="output", dtype="float32", shape=[None, None])
    return Schema(inputs=[axis], outputs=[output], is_batched=is_batched)


def rows(*values: float, width: int = 2) -> list[Tensor]:
    array = np.repeat(np.array(values, np.float32)[:, None], width, axis=1)
    return [Tensor(name="x", dtype="float32", shape=list(array.shape), data=array.tobytes())]


def values(prediction: Prediction) -> list[float]:
    (output,) = prediction.outputs
    return np.frombuffer(output.data, np.float32).reshape(output.shape)[:, 0].tolist()


class Program:
    """Doubles its input; refuses negative numbers; runs only when `gate` is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.sizes: list[int] = []

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        self.started.set()
        assert self.gate.wait(30)
        (x,) = inputs
        self.sizes.append(x.shape[0])
        if (x < 0).any():
            raise ValueError("negative\nwith details")
        return [x * 2]

    async def block(self, batcher: Batcher) -> asyncio.Task[Prediction]:
        """Start a request that runs until the gate opens."""
        self.gate.clear()
        self.started.clear()
        task = asyncio.create_task(batcher.predict(rows(100)))
        await asyncio.to_thread(self.started.wait, 30)
        return task


@pytest.fixture
def program() -> Program:
    return Program()


async def gather_behind(program: Program, batcher: Batcher, *requests: list[Tensor]):
    """Answers of requests that all arrive during one run."""
    first = await program.block(batcher)
    tasks = [asyncio.create_task(batcher.predict(request)) for request in requests]
    await asyncio.sleep(0)
    program.gate.set()
    await first
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_requests_that_arrive_during_a_run_share_the_next(program):
    batcher = Batcher(program, schema())
    answers = await gather_behind(program, batcher, rows(1), rows(2, 3), rows(4))
    assert [values(answer) for answer in answers] == [[2], [4, 6], [8]]
    assert program.sizes == [1, 4]
    assert {answer.batch_rows for answer in answers} == {4}
    assert answers[1].device_ns >= answers[0].device_ns
    assert all(answer.queue_ns > 0 for answer in answers)
    assert batcher.counters.requests == 4
    assert batcher.counters.rows == 5
    assert batcher.counters.runs == 2
    await batcher.close()


async def test_shares_of_device_time_add_up_to_the_run(program):
    batcher = Batcher(program, schema())
    answers = await gather_behind(program, batcher, *[rows(n) for n in range(3)])
    shared = sum(answer.device_ns for answer in answers)
    assert 0 < shared <= batcher.counters.device_ns
    await batcher.close()


async def test_different_widths_do_not_share_a_run(program):
    batcher = Batcher(program, schema())
    answers = await gather_behind(program, batcher, rows(1), rows(2, width=3), rows(3))
    assert [values(answer) for answer in answers] == [[2], [4], [6]]
    assert program.sizes == [1, 2, 1]
    await batcher.close()


async def test_only_the_guilty_request_fails(program):
    batcher = Batcher(program, schema())
    good, bad, fine = await gather_behind(program, batcher, rows(1), rows(-1), rows(2))
    assert values(good) == [2]
    assert values(fine) == [4]
    assert isinstance(bad, PredictFailure)
    assert bad.error.code == "model_failed"
    assert bad.error.status == 422
    assert bad.error.message == "The model failed on this input (ValueError: negative)."
    await batcher.close()


async def test_a_large_request_runs_in_pieces(program):
    batcher = Batcher(program, schema(), max_batch_rows=4)
    answer = await batcher.predict(rows(*range(10)))
    assert values(answer) == [2 * n for n in range(10)]
    assert program.sizes == [4, 4, 2]
    assert answer.batch_rows == 4
    await batcher.close()


async def test_the_programs_own_limit_bounds_a_run(program):
    batcher = Batcher(program, schema(max_rows=3), max_batch_rows=64)
    await batcher.predict(rows(*range(5)))
    assert program.sizes == [3, 2]
    await batcher.close()


async def test_others_get_a_turn_between_the_pieces_of_a_large_request(program):
    batcher = Batcher(program, schema(), max_batch_rows=2)
    order: list[str] = []

    async def predict(name: str, request: list[Tensor]) -> None:
        await batcher.predict(request)
        order.append(name)

    first = await program.block(batcher)
    async with asyncio.TaskGroup() as group:
        group.create_task(predict("large", rows(*range(20))))
        await asyncio.sleep(0)
        group.create_task(predict("small", rows(1)))
        await asyncio.sleep(0)
        program.gate.set()
    await first
    assert order == ["small", "large"]
    await batcher.close()


async def test_an_unbatched_program_runs_each_request_alone(program):
    batcher = Batcher(program, schema(is_batched=False))
    answers = await gather_behind(program, batcher, rows(1), rows(2, 3))
    assert [values(answer) for answer in answers] == [[2], [4, 6]]
    assert program.sizes == [1, 1, 2]
    await batcher.close()


async def test_a_cancelled_request_that_waits_does_not_run(program):
    batcher = Batcher(program, schema())
    first = await program.block(batcher)
    waiting = asyncio.create_task(batcher.predict(rows(1)))
    await asyncio.sleep(0)
    assert batcher.num_waiting == 1
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    program.gate.set()
    await first
    assert program.sizes == [1]
    assert (batcher.num_waiting, batcher.num_running) == (0, 0)
    await batcher.close()


async def test_a_request_cancelled_during_its_run_leaves_the_others_alone(program):
    batcher = Batcher(program, schema())
    first = await program.block(batcher)
    first.cancel()
    other = asyncio.create_task(batcher.predict(rows(5)))
    await asyncio.sleep(0)
    program.gate.set()
    assert values(await other) == [10]
    await batcher.close()


async def test_a_full_queue_is_refused(program):
    batcher = Batcher(program, schema(), max_waiting=1)
    first = await program.block(batcher)
    with pytest.raises(PredictFailure) as caught:
        await batcher.predict(rows(1))
    assert caught.value.error.status == 429
    program.gate.set()
    await first
    await batcher.close()


async def test_a_program_that_returns_other_rows_than_it_took_fails():
    batcher = Batcher(lambda inputs: [inputs[0][:1]], schema())
    with pytest.raises(PredictFailure, match="other than 2 rows"):
        await batcher.predict(rows(1, 2))
    await batcher.close()


async def test_a_lost_device_fails_everyone_and_is_reported_once():
    reports: list[bool] = []

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        raise torch.AcceleratorError("device-side assert")

    batcher = Batcher(run, schema(), on_lost_device=lambda: reports.append(True))
    for _ in range(2):
        with pytest.raises(PredictFailure) as caught:
            await batcher.predict(rows(1))
        assert caught.value.error.status == 503
    assert reports == [True]
    await batcher.close()


async def test_closing_refuses_what_waits_and_what_comes(program):
    batcher = Batcher(program, schema())
    first = await program.block(batcher)
    waiting = asyncio.create_task(batcher.predict(rows(1)))
    await asyncio.sleep(0)
    closing = asyncio.create_task(batcher.close())
    with pytest.raises(PredictFailure, match="stopping"):
        await waiting
    program.gate.set()
    assert values(await first) == [200]
    await closing
    with pytest.raises(PredictFailure, match="stopping"):
        await batcher.predict(rows(1))


async def test_a_failure_beyond_the_program_answers_everyone_and_is_logged(program, caplog):
    """Not even an exit that is asked for within a run leaves anyone waiting."""
    batcher = Batcher(program, schema())
    doubled = batcher._run

    def leave(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        doubled(inputs)
        raise SystemExit(3)

    batcher._run = leave
    async with asyncio.timeout(10):
        answers = await asyncio.gather(
            *(batcher.predict(rows(n)) for n in range(3)), return_exceptions=True
        )
    assert [answer.error.code for answer in answers] == ["internal_error"] * 3
    assert {answer.error.status for answer in answers} == {500}
    assert "were lost" in caplog.text
    batcher._run = doubled
    assert values(await batcher.predict(rows(4))) == [8]  # and it goes on
    await batcher.close()
