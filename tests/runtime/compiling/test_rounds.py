"""Forms take turns in an order drawn anew, as long as it takes to tell them apart."""

import itertools

from runtime.compiling.choosing import LOOKS
from runtime.compiling.rounds import LEAST_RUNS, Withdrawn, race, sizes_for

ORDER = list[tuple[str, int]]


class Fake:
    """Takes as long as it says, and writes down when it was asked."""

    def __init__(self, name: str, ms: float, order: ORDER, turns: int | None = None) -> None:
        self.name, self.ms, self.order = name, ms, order
        self.jitter = itertools.cycle([1.0, 1.01, 0.99, 1.02, 0.98])
        self.num_left = turns

    def turn(self, size: int, seconds: float) -> list[float]:
        self.order.append((self.name, size))
        if self.num_left is not None:
            self.num_left -= 1
            if self.num_left < 0:
                raise Withdrawn
        return [self.ms * size * next(self.jitter) for _ in range(2)]


def test_every_form_has_one_turn_a_round_in_an_order_that_changes():
    order: ORDER = []
    forms = {name: Fake(name, ms, order) for name, ms in {"eager": 2.0, "a": 1.0, "b": 3.0}.items()}
    found = race(forms, {1: 1.0, 8: 1.0}, seconds=60)
    assert found.sizes == [1, 8]
    assert len(order) == LOOKS[0] * 2 * 3, "both are decided at the first look"
    turns = [tuple(name for name, _ in order[at : at + 3]) for at in range(0, len(order), 3)]
    assert all(sorted(turn) == ["a", "b", "eager"] for turn in turns)
    assert len(set(turns)) > 2
    assert found.standings["a"].verdict == "faster"
    assert found.standings["b"].verdict == "not_faster"
    eager = found.measured["eager"]
    assert eager.num_runs == 2 * LOOKS[0]
    assert 1.9 < eager.p50_ms(1) < 2.1
    assert eager.p50_ms(8) <= eager.p99_ms(8) <= eager.max_ms


def test_rounds_go_on_while_a_form_is_undecided():
    order: ORDER = []
    found = race(
        {"eager": Fake("eager", 1.05, order), "near": Fake("near", 1.0, order)},
        {1: 1.0},
        seconds=60,
    )
    assert found.standings["near"].num_rounds == LOOKS[-1]
    assert found.standings["near"].verdict == "undecided"


def test_a_form_that_withdraws_ends_nothing():
    order: ORDER = []
    found = race(
        {
            "eager": Fake("eager", 2.0, order),
            "a": Fake("a", 1.0, order),
            "b": Fake("b", 1, order, 5),
        },
        {1: 1.0},
        seconds=60,
    )
    assert set(found.standings) == {"a"}
    assert set(found.measured) == {"eager", "a"}


def test_out_of_time_what_is_undecided_stays_so():
    order: ORDER = []
    found = race(
        {"eager": Fake("eager", 2.0, order), "a": Fake("a", 1.0, order)}, {1: 1.0}, seconds=0.0
    )
    assert found.standings["a"].num_rounds == 1
    assert found.standings["a"].verdict == "undecided"


def test_sizes_too_slow_for_rounds_are_run_a_few_times():
    assert sizes_for({1: 10.0, 8: 80.0, 32: 300.0, 128: 30_000.0}, 60) == [1, 8, 32]
    assert sizes_for({1: 1e6}, 1) == [1]
    order: ORDER = []
    found = race(
        {"eager": Fake("eager", 2.0, order), "a": Fake("a", 1.0, order)},
        {1: 1.0, 128: 30_000.0},
        seconds=60,
    )
    assert found.sizes == [1]
    assert len(found.measured["a"].runs_ms[128]) == 2 * LEAST_RUNS
    assert list(found.standings["a"].by_size) == [1]
