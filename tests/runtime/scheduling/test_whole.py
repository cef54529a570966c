"""Turns, admission and fairness where nothing is kept between steps."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.scheduling.plan import StepPlan
from runtime.scheduling.sequence import Sequence, SequenceStatus
from runtime.scheduling.whole import WholeScheduler

from .conftest import MakeSequence


def make_scheduler(max_batch_tokens: int = 16, max_sequences: int = 4) -> WholeScheduler:
    return WholeScheduler(max_batch_tokens, max_sequences, max_sequence_tokens=100)


class Waits:
    """Counts the steps in which a running sequence got no token, and those in which there was a
    place and none of the waiting got it."""

    def __init__(self) -> None:
        self._of_running: dict[int, int] = {}  # by sequence id
        self._of_line = 0

    def step(self, scheduler: WholeScheduler, sequences: list[Sequence]) -> StepPlan | None:
        running = [each for each in sequences if each.status is SequenceStatus.RUNNING]
        is_wanted = scheduler.num_waiting > 0 and len(running) < scheduler.max_sequences
        plan = step(scheduler)
        planned = [] if plan is None else [item.sequence for item in plan.items]
        for sequence in running:
            waited = self._of_running.get(sequence.sequence_id, 0)
            self._of_running[sequence.sequence_id] = 0 if sequence in planned else waited + 1
        is_admitted = any(sequence not in running for sequence in planned)
        self._of_line = self._of_line + 1 if is_wanted and not is_admitted else 0
        assert self._of_line <= 1, "whoever waits gets no place"
        longest = max(self._of_running.values(), default=0)
        assert longest < 2 * scheduler.max_sequences, "a running sequence gets no turn"
        return plan


def step(scheduler: WholeScheduler) -> StepPlan | None:
    plan = scheduler.schedule()
    if plan is not None:
        for item in plan.items:
            assert item.sequence.num_computed_tokens == 0
            assert item.num_tokens == len(item.sequence.token_ids), "a sequence is not whole"
            assert item.is_sampled
        assert plan.num_tokens <= scheduler.max_batch_tokens or len(plan.items) == 1
        scheduler.commit(plan, {item.sequence.sequence_id: 1 for item in plan.items})
    scheduler.check_integrity()
    return plan


def test_whole_sequences_fill_the_budget_and_grow(make_sequence: MakeSequence) -> None:
    scheduler = make_scheduler()
    sequences = [make_sequence([1] * length, max_tokens=2) for length in (6, 5, 4, 3)]
    for sequence in sequences:
        scheduler.add(sequence)
    shapes = []
    while plan := step(scheduler):
        shapes.append([(item.sequence.sequence_id, item.num_tokens) for item in plan.items])
    # Grown to 7, 6 and 5 tokens, the first three no longer fit together: the third has the first
    # turn of the next step, and the fourth waits for room.
    assert shapes == [[(0, 6), (1, 5), (2, 4)], [(0, 7), (1, 6), (3, 3)], [(2, 5), (3, 4)]]
    assert all(sequence.finish_reason == "length" for sequence in sequences)
    assert all(sequence.num_cached_tokens == 0 for sequence in sequences)


def test_one_longer_than_the_budget_runs_alone(make_sequence: MakeSequence) -> None:
    scheduler = make_scheduler()
    long, short = make_sequence([1] * 20, max_tokens=3), make_sequence([1], max_tokens=3)
    scheduler.add(long)
    scheduler.add(short)
    lengths = []
    while plan := step(scheduler):
        lengths.append([item.num_tokens for item in plan.items])
    assert sorted(lengths) == [[1], [2], [3], [20], [21], [22]]


def test_a_flood_does_not_take_all_places_of_a_step(make_sequence: MakeSequence) -> None:
    scheduler = make_scheduler(max_sequences=4)
    for _ in range(20):
        scheduler.add(make_sequence([1, 1], flow="flood"))
    late = [make_sequence([1, 1], flow="late") for _ in range(2)]
    for sequence in late:
        scheduler.add(sequence)
    plan = step(scheduler)
    assert plan is not None
    assert sum(item.sequence in late for item in plan.items) == 2


@pytest.mark.parametrize("lengths", [[20], [10, 10], [12, 12, 12]])
def test_long_answers_do_not_hold_a_newcomer_up(
    make_sequence: MakeSequence, lengths: list[int]
) -> None:
    scheduler = make_scheduler(max_sequences=8)
    for length in lengths:
        scheduler.add(make_sequence([1] * length, max_tokens=60))
    for _ in range(10):
        step(scheduler)
    newcomer = make_sequence([1] * 5, max_tokens=1, flow="other")
    scheduler.add(newcomer)
    step(scheduler)
    step(scheduler)
    assert newcomer.finish_reason == "length"


def test_newcomers_do_not_hold_long_answers_up(make_sequence: MakeSequence) -> None:
    scheduler = make_scheduler()
    long = make_sequence([1] * 20, max_tokens=10)
    scheduler.add(long)
    for _ in range(20):
        scheduler.add(make_sequence([1] * 16, max_tokens=1, flow="other"))
        step(scheduler)
    assert long.finish_reason == "length"


@settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    arrivals=st.lists(
        st.tuples(
            st.integers(1, 20),  # prompt tokens
            st.integers(1, 6),  # to generate
            st.integers(0, 3),  # steps until the next
            st.sampled_from([None, None, "abort", "error"]),  # its end, in the middle
        ),
        max_size=20,
    ),
    max_batch_tokens=st.integers(1, 30),
    max_sequences=st.integers(1, 6),
)
def test_every_sequence_ends_and_none_waits_for_ever(
    make_sequence: MakeSequence,
    arrivals: list[tuple[int, int, int, str | None]],
    max_batch_tokens: int,
    max_sequences: int,
) -> None:
    scheduler = make_scheduler(max_batch_tokens, max_sequences)
    sequences: list[Sequence] = []
    waits = Waits()
    for num_prompt, max_tokens, num_steps, reason in arrivals:
        sequence = make_sequence([1] * num_prompt, max_tokens)
        scheduler.add(sequence)
        sequences.append(sequence)
        for _ in range(num_steps):
            waits.step(scheduler, sequences)
        if reason == "abort":
            scheduler.abort(sequence)
            scheduler.abort(sequence)
        elif reason == "error":
            scheduler.finish(sequence, "error")
    num_left = sum(each.max_tokens for each in sequences)
    while waits.step(scheduler, sequences) is not None:
        num_left -= 1
        assert num_left >= 0, "a step in which nobody got a token"
    assert not scheduler.has_work
    for sequence, (_, max_tokens, _, reason) in zip(sequences, arrivals, strict=True):
        assert sequence.finish_reason in ("length", reason)
        if sequence.finish_reason == "length":
            assert sequence.num_generated_tokens == max_tokens
