"""Requests that share runs get what they would get alone, in order, and fail alone."""

import asyncio
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.batching.batcher import Batcher, Prediction
from runtime.batching.runner import shares
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


def predict(
    batcher: Batcher, tensors: list[Tensor], caller: str = ""
) -> "asyncio.Future[Prediction]":
    """The answer to a request that is queued at once."""
    answer: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()

    def end(result: Prediction | PredictFailure) -> None:
        if isinstance(result, PredictFailure):
            answer.set_exception(result)
        else:
            answer.set_result(result)

    batcher.submit(tensors, caller, end)
    return answer


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

    async def block(self, batcher: Batcher) -> "asyncio.Future[Prediction]":
        """Start a request that runs until the gate opens."""
        self.gate.clear()
        self.started.clear()
        answer = predict(batcher, rows(100))
        await asyncio.to_thread(self.started.wait, 30)
        return answer


@pytest.fixture
def program() -> Program:
    return Program()


async def gather_behind(program: Program, batcher: Batcher, *requests: list[Tensor]):
    """Answers of requests that all arrive during one run."""
    first = await program.block(batcher)
    answers = [predict(batcher, request) for request in requests]
    program.gate.set()
    await first
    return await asyncio.gather(*answers, return_exceptions=True)


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
    batcher.close()


async def test_shares_of_device_time_add_up_to_the_run(program):
    batcher = Batcher(program, schema())
    answers = await gather_behind(program, batcher, *[rows(*range(n)) for n in range(1, 6)])
    first_ns = batcher.counters.device_ns - sum(answer.device_ns for answer in answers)
    assert first_ns > 0, "what the first request, alone in its run, paid"
    per_row = [answer.device_ns / n for n, answer in enumerate(answers, 1)]
    assert max(per_row) - min(per_row) <= 2
    batcher.close()


@given(st.integers(0, 10**12), st.lists(st.integers(1, 10**6), min_size=1, max_size=40))
def test_shares_are_exact_and_in_proportion(total, weights):
    found = shares(total, weights)
    assert sum(found) == total
    for share, weight in zip(found, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) <= 1 + total * 1e-15


async def test_different_widths_do_not_share_a_run(program):
    batcher = Batcher(program, schema())
    answers = await gather_behind(program, batcher, rows(1), rows(2, width=3), rows(3))
    assert [values(answer) for answer in answers] == [[2], [4], [6]]
    assert program.sizes == [1, 2, 1]
    batcher.close()


async def test_only_the_guilty_request_fails(program):
    batcher = Batcher(program, schema())
    good, bad, fine = await gather_behind(program, batcher, rows(1), rows(-1), rows(2))
    assert values(good) == [2]
    assert values(fine) == [4]
    assert isinstance(bad, PredictFailure)
    assert bad.error.code == "model_failed"
    assert bad.error.status == 422
    assert bad.error.message == "The model failed on this input (ValueError: negative)."
    batcher.close()


async def test_a_large_request_runs_in_pieces(program):
    batcher = Batcher(program, schema(), max_batch_rows=4)
    answer = await predict(batcher, rows(*range(10)))
    assert values(answer) == [2 * n for n in range(10)]
    assert program.sizes == [4, 4, 2]
    assert answer.batch_rows == 4
    batcher.close()


async def test_the_programs_own_limit_bounds_a_run(program):
    batcher = Batcher(program, schema(max_rows=3), max_batch_rows=64)
    await predict(batcher, rows(*range(5)))
    assert program.sizes == [3, 2]
    batcher.close()


async def test_others_get_a_turn_between_the_pieces_of_a_large_request(program):
    batcher = Batcher(program, schema(), max_batch_rows=2)
    order: list[str] = []
    first = await program.block(batcher)
    large, small = predict(batcher, rows(*range(20))), predict(batcher, rows(1))
    large.add_done_callback(lambda _: order.append("large"))
    small.add_done_callback(lambda _: order.append("small"))
    program.gate.set()
    await asyncio.gather(first, large, small)
    assert values(large.result()) == [2 * n for n in range(20)]
    assert order == ["small", "large"]
    batcher.close()


async def test_a_flood_of_one_caller_holds_another_up_for_a_run(program):
    batcher = Batcher(program, schema(), max_batch_rows=4)
    first = await program.block(batcher)
    flood = [predict(batcher, rows(*range(8)), "flood") for _ in range(50)]
    single = predict(batcher, rows(7), "single")
    ended: list[object] = []
    for answer in (*flood, single):
        answer.add_done_callback(ended.append)
    program.gate.set()
    await asyncio.gather(first, single, *flood)
    assert values(single.result()) == [14]
    assert ended.index(single) <= 2
    batcher.close()


async def test_an_unbatched_program_runs_each_request_alone(program):
    batcher = Batcher(program, schema(is_batched=False))
    answers = await gather_behind(program, batcher, rows(1), rows(2, 3))
    assert [values(answer) for answer in answers] == [[2], [4, 6]]
    assert program.sizes == [1, 1, 2]
    batcher.close()


async def test_a_cancelled_request_that_waits_does_not_run(program):
    batcher = Batcher(program, schema())
    first = await program.block(batcher)
    answered: list[object] = []
    waiting = batcher.submit(rows(1), "", answered.append)
    assert (batcher.num_waiting, batcher.num_running) == (1, 1)
    assert batcher.cancel(waiting)
    assert not batcher.cancel(waiting)
    program.gate.set()
    await first
    assert program.sizes == [1]
    assert answered == []
    assert (batcher.num_waiting, batcher.num_running) == (0, 0)
    batcher.close()


async def test_a_request_whose_rows_run_cannot_be_cancelled(program):
    batcher = Batcher(program, schema(), max_batch_rows=2)
    first = await program.block(batcher)
    answered: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    large = batcher.submit(rows(1, 2, 3), "", answered.set_result)
    other = predict(batcher, rows(5), "other")
    program.gate.set()
    await first
    assert not batcher.cancel(large)
    assert values(await other) == [10]
    assert isinstance(await answered, Prediction)
    batcher.close()


async def test_a_program_that_returns_other_rows_than_it_took_fails():
    batcher = Batcher(lambda inputs: [inputs[0][:1]], schema())
    with pytest.raises(PredictFailure, match="other than 2 rows"):
        await predict(batcher, rows(1, 2))
    batcher.close()


async def test_a_lost_device_fails_everyone_and_is_reported_once():
    reports: list[bool] = []

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        raise torch.AcceleratorError("device-side assert")

    batcher = Batcher(run, schema(), on_lost_device=lambda: reports.append(True))
    for _ in range(2):
        with pytest.raises(PredictFailure) as caught:
            await predict(batcher, rows(1))
        assert caught.value.error.status == 503
    assert reports == [True]
    batcher.close()


async def test_closing_refuses_what_waits_and_what_comes(program):
    batcher = Batcher(program, schema(), max_batch_rows=2)
    first = await program.block(batcher)
    waiting = predict(batcher, rows(1))
    batcher.close()
    with pytest.raises(PredictFailure, match="stopping"):
        await waiting
    program.gate.set()
    assert values(await first) == [200]
    with pytest.raises(PredictFailure, match="stopping"):
        await predict(batcher, rows(1))


async def test_closing_refuses_what_has_run_in_part(program):
    batcher = Batcher(program, schema(), max_batch_rows=2)
    program.gate.clear()
    program.started.clear()
    large = predict(batcher, rows(*range(6)))
    await asyncio.to_thread(program.started.wait, 30)
    batcher.close()
    program.gate.set()
    with pytest.raises(PredictFailure, match="stopping"):
        await large


async def test_a_failing_run_is_halved(program):
    batcher = Batcher(program, schema())
    requests = [rows(n if n != 9 else -1) for n in range(32)]
    answers = await gather_behind(program, batcher, *requests)
    assert isinstance(answers.pop(9), PredictFailure)
    assert [values(answer) for answer in answers] == [[2 * n] for n in range(32) if n != 9]
    assert len(program.sizes) == 1 + 1 + 2 * 5, "the block, the run and halves down to one"
    batcher.close()


async def test_requests_beside_one_that_failed_pay_the_same_for_the_same(program):
    batcher = Batcher(program, schema())
    requests = [rows(n if n != 3 else -1) for n in range(16)]
    answers = await gather_behind(program, batcher, *requests)
    paid = [answer.device_ns for answer in answers if isinstance(answer, Prediction)]
    assert len(paid) == 15
    assert max(paid) - min(paid) <= 1
    assert batcher.counters.runs == 1 + len(program.sizes[1:]), "those that failed count too"
    batcher.close()


async def test_after_a_failure_its_caller_shares_no_run_with_others(program):
    batcher = Batcher(program, schema())
    with pytest.raises(PredictFailure):
        await predict(batcher, rows(-1), "bad")
    first = await program.block(batcher)
    answers = [predict(batcher, rows(n), "good") for n in range(3)]
    bad = [predict(batcher, rows(-1), "bad") for _ in range(2)]
    program.gate.set()
    await asyncio.gather(first, *answers)
    await asyncio.gather(*bad, return_exceptions=True)
    assert {answer.result().batch_rows for answer in answers} == {3}
    assert sorted(program.sizes) == [1, 1, 1, 1, 2, 3], "the good ones ran once, together"
    batcher.close()


async def test_a_failure_beyond_the_program_answers_everyone_and_is_logged(program, caplog):
    """Not even an exit that is asked for within a run leaves anyone waiting."""
    batcher = Batcher(program, schema())
    doubled = batcher._runner._run

    def leave(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        doubled(inputs)
        raise SystemExit(3)

    batcher._runner._run = leave
    async with asyncio.timeout(10):
        answers = await asyncio.gather(
            *(predict(batcher, rows(n)) for n in range(3)), return_exceptions=True
        )
    assert [answer.error.code for answer in answers] == ["internal_error"] * 3
    assert {answer.error.status for answer in answers} == {500}
    assert "were lost" in caplog.text
    batcher._runner._run = doubled
    assert values(await predict(batcher, rows(4))) == [8]  # and it goes on
    batcher.close()
