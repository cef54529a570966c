"""Which rows share a run: fair between callers, in order within each, similar lengths."""

from collections import Counter, defaultdict

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.batching.fair_queue import NUM_APART, BatchQueue, Pending, Slice, is_similar


def add(
    queue: BatchQueue[str],
    name: str,
    rows: int = 1,
    *,
    caller: str = "",
    group: str = "",
    length: int = 0,
    cost: int = 1,
) -> Pending[str]:
    pending = Pending(name, caller, group, rows, length=length, cost=cost)
    queue.add(pending)
    return pending


def names(slices: list[Slice[str]]) -> list[tuple[str, int]]:
    return [(each.pending.item, each.stop - each.start) for each in slices]


def test_rows_fill_a_run_in_order_of_arrival():
    queue: BatchQueue[str] = BatchQueue(8)
    for name in "abc":
        add(queue, name, 3)
    assert names(queue.take(8)) == [("a", 3), ("b", 3), ("c", 2)]
    assert names(queue.take(8)) == [("c", 1)]
    assert queue.take(8) == []


def test_a_run_may_be_made_smaller():
    queue: BatchQueue[str] = BatchQueue(8)
    add(queue, "a", 8)
    assert names(queue.take(3)) == [("a", 3)]
    assert names(queue.take(8)) == [("a", 5)]


def test_a_large_request_lets_others_of_its_caller_go_between():
    queue: BatchQueue[str] = BatchQueue(4)
    add(queue, "large", 12)
    add(queue, "small")
    assert names(queue.take(4)) == [("large", 4)]
    assert names(queue.take(4)) == [("small", 1), ("large", 3)]
    assert names(queue.take(4)) == [("large", 4)]
    assert names(queue.take(4)) == [("large", 1)]


@pytest.mark.parametrize("num_flooding", [1, 3])
def test_a_flood_does_not_hold_up_another_caller(num_flooding: int):
    queue: BatchQueue[str] = BatchQueue(16)
    for number in range(200):
        add(queue, f"flood {number}", 10, caller=f"flood {number % num_flooding}")
    queue.take(16)
    add(queue, "one", caller="other")
    assert "one" in dict(names(queue.take(16)))


def test_callers_get_equal_shares_of_values():
    queue: BatchQueue[str] = BatchQueue(8)
    for number in range(400):
        add(queue, f"{number}", caller="heavy", group="wide", cost=4)
        add(queue, f"{number}", 4, caller="light", group="narrow")
    served: Counter[str] = Counter()
    for _ in range(40):
        for each in queue.take(8):
            served[each.pending.caller] += (each.stop - each.start) * each.pending.cost
    assert abs(served["heavy"] - served["light"]) <= 32


def test_coming_back_earns_no_credit():
    queue: BatchQueue[str] = BatchQueue(1)
    add(queue, "first", caller="idle")
    queue.take(1)
    for number in range(60):
        add(queue, f"busy {number}", caller="busy")
    for _ in range(20):
        queue.take(1)
    for number in range(60):
        add(queue, f"idle {number}", caller="idle")
    callers = [queue.take(1)[0].pending.caller for _ in range(20)]
    assert 9 <= callers.count("idle") <= 11


def test_other_groups_do_not_share_a_run_and_are_not_starved():
    queue: BatchQueue[str] = BatchQueue(8)
    for name in ("a", "b", "c"):
        add(queue, name, group="wide" if name == "b" else "narrow")
    assert names(queue.take(8)) == [("a", 1), ("c", 1)]
    add(queue, "d", group="narrow")
    assert names(queue.take(8)) == [("b", 1)], "the oldest begins"


def test_similar_lengths_share_a_run_and_others_do_not():
    queue: BatchQueue[str] = BatchQueue(8)
    for length in (100, 10, 120, 99, 130):
        add(queue, f"{length}", length=length)
    assert names(queue.take(8)) == [("100", 1), ("120", 1), ("99", 1)]
    assert names(queue.take(8)) == [("10", 1)]
    assert names(queue.take(8)) == [("130", 1)]


def test_who_failed_shares_no_run_with_others_for_a_while():
    queue: BatchQueue[str] = BatchQueue(8)
    first = add(queue, "bad 1", caller="bad")
    add(queue, "good 1", caller="good")
    queue.blame("bad", 2)
    add(queue, "bad 2", caller="bad")
    assert names(queue.take(8)) == [("good 1", 1)], "it has been served less"
    assert queue.remove(first)
    assert names(queue.take(8)) == [("bad 2", 1)]
    for number in range(NUM_APART):
        add(queue, f"{number}", caller="bad")
    while len(queue):
        queue.take(8)
    add(queue, "good 2", caller="good")
    add(queue, "bad 3", caller="bad")
    assert {name for name, _ in names(queue.take(8))} == {"good 2", "bad 3"}


def test_what_failed_is_made_up_for_by_who_comes_back():
    queue: BatchQueue[str] = BatchQueue(1)
    queue.blame("bad", 5)
    for number in range(8):
        add(queue, f"{number}", caller="bad")
        add(queue, f"{number}", caller="good")
    callers = [queue.take(1)[0].pending.caller for _ in range(8)]
    assert callers.count("good") >= 6


def test_what_is_removed_does_not_run():
    queue: BatchQueue[str] = BatchQueue(4)
    first = add(queue, "a", 9)
    add(queue, "b")
    assert names(queue.take(4)) == [("a", 4)]
    assert queue.remove(first)
    assert not queue.remove(first)
    assert names(queue.take(4)) == [("b", 1)]
    assert len(queue) == 0


def test_callers_are_forgotten_in_the_end():
    queue: BatchQueue[str] = BatchQueue(4)
    for number in range(10_000):
        add(queue, "a", caller=f"{number}")
        queue.take(4)
    assert len(queue._served) <= 4097
    assert not queue._callers


class Serving(RuleBasedStateMachine):
    """Whatever comes and goes: nothing is lost, doubled, or overtaken within its caller."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: BatchQueue[int] = BatchQueue(8)
        self.waiting: dict[int, Pending[int]] = {}
        self.num_rows: dict[int, int] = {}
        self.lengths: dict[int, int] = {}
        self.given: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        self.begun: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.removed: set[int] = set()

    @rule(
        caller=st.sampled_from("abc"),
        group=st.sampled_from("xy"),
        rows=st.integers(1, 30),
        length=st.sampled_from([1, 5, 9, 10, 50, 60]),
    )
    def come(self, caller: str, group: str, rows: int, length: int) -> None:
        number = len(self.num_rows)
        self.num_rows[number] = rows
        self.lengths[number] = length
        pending = Pending(number, caller, group, rows, length=length, cost=1 + length)
        self.waiting[number] = pending
        self.queue.add(pending)

    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        if self.waiting:
            number = data.draw(st.sampled_from(sorted(self.waiting)))
            assert self.queue.remove(self.waiting.pop(number))
            self.removed.add(number)

    @rule(max_rows=st.integers(1, 12))
    def run(self, max_rows: int) -> None:
        slices = self.queue.take(max_rows)
        assert bool(slices) == bool(self.waiting)
        assert sum(each.stop - each.start for each in slices) <= min(max_rows, 8)
        assert len({each.pending.group for each in slices}) <= 1
        lengths = [each.pending.length for each in slices]
        assert all(is_similar(length, min(lengths), max(lengths)) for length in lengths)
        for each in slices:
            number = each.pending.item
            if not self.given[number]:
                self.begun[each.pending.caller, each.pending.group].append(number)
            self.given[number].append((each.start, each.stop))
            if each.stop == self.num_rows[number]:
                del self.waiting[number]

    @invariant()
    def rows_are_given_once_and_in_order(self) -> None:
        for number, parts in self.given.items():
            stops = [0, *(stop for _, stop in parts)]
            assert [start for start, _ in parts] == stops[:-1]
            is_whole = stops[-1] == self.num_rows[number]
            assert is_whole or number in self.waiting or number in self.removed
        assert len(self.queue) == len(self.waiting)
        assert self.queue.total_rows() == sum(each.rows for each in self.waiting.values())

    def teardown(self) -> None:
        """The rest runs to the end, and of equal lengths in the order it came."""
        while self.waiting:
            self.run(8)
        for numbers in self.begun.values():
            by_length = defaultdict(list)
            for number in numbers:
                by_length[self.lengths[number]].append(number)
            assert all(found == sorted(found) for found in by_length.values())


Serving.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestServing = Serving.TestCase
