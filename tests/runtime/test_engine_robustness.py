"""Ends of all kinds in every phase, with little room: neighbours unaffected, blocks conserved."""

import random
from collections.abc import Callable

import pytest
import torch

from runtime.execution.batch import StepBatch
from runtime.scheduling.plan import BlockMoves
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.sequence import Sequence, SequenceStatus
from tests.runtime.engine_bench import VOCAB_SIZE, Bench, continuation, plant_stale_blocks


def sequence_of(bench: Bench, request_id: str) -> Sequence:
    return bench.engine._requests[request_id][0].sequence


def assert_clean(bench: Bench) -> None:
    stats = bench.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.used_blocks) == (0, 0, 0)
    scheduler = bench.engine.scheduler
    assert isinstance(scheduler, Scheduler)
    assert stats.free_blocks + stats.cached_blocks == scheduler.pool.num_blocks
    assert scheduler.swap_area.num_free == scheduler.swap_area.num_blocks
    assert not bench.engine._deliveries
    assert not bench.engine._requests


# --- little room ------------------------------------------------------------------------


@pytest.mark.parametrize("num_swap_blocks", [0, 6, 100])
@pytest.mark.parametrize("num_blocks", [14, 24])
def test_preempted_and_swapped_requests_answer_as_if_alone(
    num_blocks: int, num_swap_blocks: int
) -> None:
    bench = Bench(num_blocks=num_blocks, num_swap_blocks=num_swap_blocks, max_batch_tokens=16)
    chance = random.Random(7)  # noqa: S311 - not a secret
    asked: dict[str, tuple[list[int], int]] = {}
    for number in range(30):
        shared = [9, 8, 7, 6, 5, 4, 3][: chance.randint(0, 7)]
        prompt = shared + [chance.randrange(2, 200) for _ in range(chance.randint(1, 9))]
        asked[str(number)] = prompt, chance.randint(1, 30)
        bench.add(str(number), token_ids=prompt, max_tokens=asked[str(number)][1])
        for _ in range(chance.randint(0, 3)):
            bench.step()
    bench.finish()
    for request_id, (prompt, max_tokens) in asked.items():
        assert bench.token_ids(request_id) == continuation(prompt, max_tokens)
    stats = bench.engine.stats()
    assert stats.preemptions > 0
    assert (stats.swapped_blocks > 0) == (num_swap_blocks > 0)
    assert_clean(bench)


def test_a_thousand_shared_tokens_are_computed_once() -> None:
    bench = Bench(num_blocks=300, block_size=32, max_batch_tokens=1024, max_context_tokens=2000)
    shared = [2 + at % 200 for at in range(1000)]
    for number in range(64):
        own = [2 + (7 * number + at) % 250 for at in range(50)]
        bench.add(str(number), token_ids=[*shared, 252 - number % 3, *own], max_tokens=1)
    bench.finish()
    cached = sorted(bench.outputs[str(number), 0][0].num_cached_tokens for number in range(64))
    assert cached[0] == 0
    assert cached[1] >= 1000
    assert bench.runner.num_tokens <= 1000 + 64 * 51
    assert_clean(bench)


def test_choices_share_all_but_the_last_token_of_their_prompt() -> None:
    bench = Bench(block_size=16, max_batch_tokens=512)
    prompt = [7, 8, 9] * 30 + [5]  # ends inside a block
    bench.add(token_ids=prompt, num_choices=6, temperature=1.5, max_tokens=4)
    bench.finish()
    cached = [bench.outputs["r", choice][-1].num_cached_tokens for choice in range(6)]
    assert cached == [0] + [90] * 5
    assert bench.runner.num_tokens == 91 + 5 * 1 + 6 * 3
    assert_clean(bench)


def test_more_choices_than_can_run_at_once() -> None:
    bench = Bench(max_sequences=3)
    bench.add(token_ids=[5, 6, 7], num_choices=128, max_tokens=3)
    bench.finish()
    for choice in range(128):
        assert bench.token_ids("r", choice) == continuation([5, 6, 7], 3)
    assert_clean(bench)


# --- leaving in every phase -------------------------------------------------------------


def until(bench: Bench, is_reached: Callable[[], bool]) -> None:
    for _ in range(200):
        if is_reached():
            return
        bench.step()
    pytest.fail("the phase was never reached")


LEADER = list(range(2, 42))
PHASES = ["waiting", "following", "leading", "prefilling", "decoding", "preempted", "swapped"]


def enter(bench: Bench, phase: str) -> None:
    """Bring request `gone` into the phase, beside `kept`."""
    if phase in ("preempted", "swapped"):
        bench.add("kept", token_ids=[7, 8, 9], max_tokens=50)
        bench.add("gone", token_ids=[5, 6, 4], max_tokens=50)
        until(bench, lambda: sequence_of(bench, "gone").status is SequenceStatus.PREEMPTED)
        is_swapped = sequence_of(bench, "gone").swapped is not None
        assert is_swapped == (phase == "swapped")
        return
    leader, follower = ("gone", "kept") if phase == "leading" else ("kept", "gone")
    if phase in ("following", "leading"):
        bench.add(leader, token_ids=[*LEADER, 50], max_tokens=10)
        bench.add(follower, token_ids=[*LEADER, 60], max_tokens=10)
        bench.step()
        assert sequence_of(bench, follower).status is SequenceStatus.WAITING
        return
    bench.add("kept", token_ids=[7, 8, 9], max_tokens=12)
    bench.step()
    bench.add("gone", token_ids=[5] * 30 if phase == "prefilling" else [5], max_tokens=20)
    if phase == "prefilling":
        bench.step()
        assert 0 < sequence_of(bench, "gone").num_computed_tokens < 30
    elif phase == "decoding":
        until(bench, lambda: len(bench.token_ids("gone")) > 2)


@pytest.mark.parametrize("phase", PHASES)
def test_a_caller_may_leave_in_any_phase(phase: str) -> None:
    bench = Bench(
        num_blocks=20, max_batch_tokens=8, num_swap_blocks=20 if phase == "swapped" else 0
    )
    enter(bench, phase)
    prompt = sequence_of(bench, "kept").token_ids[: sequence_of(bench, "kept").num_prompt_tokens]
    bench.engine.abort("gone")
    bench.engine.check_integrity()
    bench.finish()
    assert bench.finish_reason("gone") == "abort"
    assert bench.finish_reason("kept") == "length"
    kept = bench.token_ids("kept")
    assert kept == continuation(prompt, len(kept))
    assert_clean(bench)


@pytest.mark.parametrize("phase", ["leading", "prefilling", "decoding"])
def test_a_model_may_fail_in_any_phase(phase: str) -> None:
    bench = Bench(num_blocks=20, max_batch_tokens=8)
    enter(bench, phase)
    gone, kept = sequence_of(bench, "gone"), sequence_of(bench, "kept")
    prompt = kept.token_ids[: kept.num_prompt_tokens]
    run = bench.runner.run

    def fail(batch: StepBatch) -> torch.Tensor:
        if gone.block_table and gone.block_table[0] in batch.block_tables[:, 0].tolist():
            raise ValueError("it cannot")
        return run(batch)

    bench.runner.run = fail
    bench.finish()
    assert bench.finish_reason("gone") == "error"
    kept_tokens = bench.token_ids("kept")
    assert kept_tokens == continuation(prompt, len(kept_tokens))
    assert len(kept_tokens) == kept.max_tokens
    assert_clean(bench)


def test_a_step_that_fails_has_moved_its_blocks_once() -> None:
    """Copies are made before the step; its sequences, run again one by one, must find them."""
    bench = Bench()
    bench.add("first", token_ids=[5, 6, 7, 8, 9, 10], max_tokens=1)
    bench.finish()
    moves: list[BlockMoves] = []
    move = bench.runner.move
    bench.runner.move = lambda each: (moves.append(each), move(each))[1]
    bench.runner.is_broken = lambda prefix: prefix[-1] == 99
    bench.add("copies", token_ids=[5, 6, 7, 8, 9, 20], max_tokens=6)
    bench.add("bad", token_ids=[99], max_tokens=6)
    bench.finish()
    assert sum(len(each.copies) for each in moves) == 1
    assert bench.outputs["copies", 0][0].num_cached_tokens == 5
    assert bench.token_ids("copies") == continuation([5, 6, 7, 8, 9, 20], 6)
    assert bench.finish_reason("bad") == "error"
    assert_clean(bench)


def test_blocks_that_cannot_be_moved_are_everyones_failure_and_can_be_left_behind() -> None:
    bench = Bench()
    bench.add("first", token_ids=[5, 6, 7, 8, 9, 10], max_tokens=1)
    bench.finish()
    move = bench.runner.move

    def fail(moves: BlockMoves) -> None:
        raise MemoryError

    bench.runner.move = fail
    bench.add("copies", token_ids=[5, 6, 7, 8, 9, 20], max_tokens=3)
    with pytest.raises(MemoryError):
        bench.engine.step()
    bench.engine.abort("copies")  # as the server does with all requests after such a step
    bench.runner.move = move
    bench.finish()
    # The block that was never filled is not served to anyone.
    bench.add("again", token_ids=[5, 6, 7, 8, 9, 20, 21], max_tokens=3)
    bench.finish()
    assert bench.outputs["again", 0][0].num_cached_tokens == 5
    assert bench.token_ids("again") == continuation([5, 6, 7, 8, 9, 20, 21], 3)
    assert_clean(bench)


def test_a_model_that_always_fails_fails_every_request_and_no_more() -> None:
    bench = Bench(num_blocks=20, max_batch_tokens=8)
    bench.runner.is_broken = lambda prefix: True
    for number in range(12):
        bench.add(str(number), token_ids=[5, 6, 7, number + 8], num_choices=2)
    bench.finish()
    for number in range(12):
        for choice in range(2):
            assert bench.finish_reason(str(number), choice) == "error"
    assert_clean(bench)
    bench.runner.is_broken = lambda prefix: False
    bench.add("later", token_ids=[5, 6, 7], max_tokens=4)
    bench.finish()
    assert bench.token_ids("later") == continuation([5, 6, 7], 4)


def test_a_poisoned_block_that_is_read_all_the_same_ends_its_reader() -> None:
    """With the index kept from forgetting, a request is served a block that was given up."""
    bench = Bench()
    scheduler = bench.engine.scheduler
    assert isinstance(scheduler, Scheduler)
    plant_stale_blocks(scheduler)
    bench.runner.is_broken = lambda prefix: len(prefix) > 9
    bench.add("failed", token_ids=[5, 6, 7, 8, 9], max_tokens=20)
    while bench.engine.has_work:
        bench.engine.step()
    bench.runner.is_broken = lambda prefix: False
    bench.add("reader", token_ids=[5, 6, 7, 8, 9, 10], max_tokens=3)
    outputs = []
    while bench.engine.has_work:
        outputs += bench.engine.step()
    assert [output.finish_reason for output in outputs] == ["error"]


# --- absurd but allowed -----------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1e-300},
        {"temperature": 2.0, "top_k": 2**62, "top_p": 1e-12, "min_p": 1.0},
        {"temperature": 2.0, "top_p": 0.0},
        {"seed": -(2**63), "temperature": 1.0},
        {"repetition_penalty": 100.0, "frequency_penalty": 2.0, "presence_penalty": -2.0},
        {"logit_bias": dict.fromkeys(range(VOCAB_SIZE), -100.0)},
        {"stop": ["x" * 512] * 16},
        {"stop_token_ids": list(range(2, 130)), "ignore_eos": True},
        {"logprobs": 20},
    ],
)
def test_absurd_parameters_end_in_tokens(sampling: dict[str, object]) -> None:
    bench = Bench()
    bench.add("absurd", token_ids=[5, 6, 7], **{"max_tokens": 5} | sampling)
    bench.add("plain", token_ids=[5, 6, 7], max_tokens=5)
    bench.finish()
    assert bench.finish_reason("absurd") in ("length", "stop")
    assert 1 <= len(bench.token_ids("absurd")) <= 5
    assert bench.token_ids("plain") == continuation([5, 6, 7], 5)
    assert_clean(bench)


def test_the_longest_answer_and_the_longest_prompt_fill_the_cache_exactly() -> None:
    bench = Bench(num_blocks=10)  # 40 tokens
    assert bench.add("answer", token_ids=[5], max_tokens=2**62).max_tokens == 39
    bench.add("prompt", token_ids=[6] * 39, max_tokens=2**62)
    bench.finish()
    assert bench.token_ids("answer") == continuation([5], 39)
    assert bench.token_ids("prompt") == continuation([6] * 39, 1)
    assert_clean(bench)
