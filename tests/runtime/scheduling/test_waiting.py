"""The order of admission: fair between flows, first come first served within one."""

import pytest

from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.sequence import Sequence
from runtime.scheduling.waiting import WaitingLine

from .conftest import CacheModel, MakeSequence


def test_first_come_first_served_within_a_flow(make_sequence: MakeSequence) -> None:
    line = WaitingLine()
    sequences = [make_sequence([1]) for _ in range(5)]
    for sequence in sequences:
        line.push(sequence)
    line.remove(sequences[2])
    assert [line.pop() for _ in range(4)] == [sequences[i] for i in (0, 1, 3, 4)]
    assert line.peek() is None


def test_one_that_returns_keeps_its_place(make_sequence: MakeSequence) -> None:
    line = WaitingLine()
    first, second = make_sequence([1]), make_sequence([2])
    line.push(first)
    line.push(second)
    line.push(line.pop())
    assert line.pop() is first


def test_a_flood_of_one_organization_does_not_starve_another(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(num_blocks=64, block_size=4, max_batch_tokens=16, max_sequences=1)
    flood = [make_sequence([i, i], flow="flood") for i in range(20)]
    late = make_sequence([1, 2, 3], flow="late")
    for sequence in [*flood, late]:
        scheduler.add(sequence)
    cache = CacheModel(scheduler)
    while not late.is_finished:
        cache.step(lambda _: 1)
    assert sum(sequence.is_finished for sequence in flood) <= 2


def test_a_returning_flow_does_not_claim_the_time_it_was_away(make_sequence: MakeSequence) -> None:
    line = WaitingLine()
    steady = [make_sequence([1], flow="steady") for _ in range(10)]
    for sequence in steady:
        line.push(sequence)
    for _ in range(6):
        line.charge(line.pop(), 100)
    back = [make_sequence([1], flow="back") for _ in range(4)]
    for sequence in back:
        line.push(sequence)
    order = []
    for _ in range(6):
        sequence = line.pop()
        line.charge(sequence, 100)
        order.append(sequence.fairness_key)
    assert order.count("back") == 3, "it takes turns, and no more"


def test_classes_share_by_weight(make_sequence: MakeSequence) -> None:
    line = WaitingLine()
    for _ in range(40):
        line.push(make_sequence([1], service_class="batch"))
        line.push(make_sequence([1], service_class="standard"))
    order = []
    for _ in range(25):
        sequence = line.pop()
        line.charge(sequence, 8)
        order.append(sequence.service_class)
    assert order.count("batch") == 5


def test_prompts_are_charged_as_they_are_admitted(make_sequence: MakeSequence) -> None:
    """Or one flow would fill all places of a step before it is charged for any."""
    scheduler = Scheduler(num_blocks=64, block_size=4, max_batch_tokens=64, max_sequences=4)
    for number in range(10):
        scheduler.add(make_sequence([number, number], flow="flood"))
    late = [make_sequence([50 + number] * 2, flow="late") for number in range(2)]
    for sequence in late:
        scheduler.add(sequence)
    plan = scheduler.schedule()
    assert plan is not None
    assert sum(item.sequence in late for item in plan.items) == 2


def test_what_the_cache_serves_and_what_runs_again_is_free(make_sequence: MakeSequence) -> None:
    line = WaitingLine()
    sequence = make_sequence([1] * 10, max_tokens=5)
    line.push(sequence)
    line.pop()
    sequence.num_computed_tokens = 8  # found in the cache
    line.charge_prompt(sequence)
    assert line._served["", "standard"] == 2 / 4
    sequence.append(1)
    line.charge_answer(sequence)
    assert line._served["", "standard"] == (2 + 2) / 4
    sequence.num_computed_tokens = 0  # preempted
    line.charge_prompt(sequence)
    assert line._served["", "standard"] == (2 + 2) / 4


def test_removed_sequences_and_flows_leave_no_trace(make_sequence: MakeSequence) -> None:
    line = WaitingLine()
    sequences = [make_sequence([1], flow=f"flow {number % 5}") for number in range(50)]
    for sequence in sequences:
        line.push(sequence)
    for sequence in sequences[::2]:
        line.remove(sequence)
    taken = []
    while line.peek():
        taken.append(line.pop())
        line.charge(taken[-1], 1)
    assert sorted(each.sequence_id for each in taken) == [s.sequence_id for s in sequences[1::2]]
    assert len(line) == len(line._flows) == len(line._order) == 0


@pytest.mark.parametrize("num_blocks", [200, 4000])
def test_a_step_costs_the_same_whoever_waits(
    make_sequence: MakeSequence, monkeypatch: pytest.MonkeyPatch, num_blocks: int
) -> None:
    """Counts the looks at waiting sequences, not time. With few blocks, room is what lacks; with
    many, places are."""
    scheduler = Scheduler(num_blocks, block_size=4, max_batch_tokens=64, max_sequences=8)
    cache = CacheModel(scheduler)
    for number in range(1000):
        prompt = [number, *range(60)]
        scheduler.add(make_sequence(prompt, max_tokens=30, flow=f"flow {number % 100}"))
    while scheduler.num_running < 3:
        cache.step(lambda _: 1)
    looks: list[Sequence] = []
    match = scheduler.index.match
    monkeypatch.setattr(scheduler.index, "match", lambda each: looks.append(each) or match(each))
    for _ in range(100):
        num_waiting = scheduler.num_waiting
        looks.clear()
        cache.step(lambda _: 1)
        num_admitted = num_waiting - scheduler.num_waiting
        assert len(looks) <= max(num_admitted, 0) + 1
