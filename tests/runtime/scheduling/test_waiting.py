"""The order of admission: fair between flows, first come first served within one."""

from runtime.scheduling.scheduler import Scheduler
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
