"""Simulated loads: waiting never costs much, and pays where rows are nearly free."""

from collections.abc import Callable

import pytest

from runtime.batching.fair_queue import Pending
from runtime.batching.planner import Planner
from tests.runtime.batching.simulation import (
    FixedWait,
    Load,
    Result,
    Simulation,
    Truth,
    both,
    bursts,
    closed,
    poisson,
)

MAX_ROWS = 128
MEASURED = (1, 8, 32, 128)
NEVER_MS, TARGET_MS = 0.0, 100.0

FREE: Truth = lambda rows: 10.0  # noqa: E731
CHEAP: Truth = lambda rows: 5.0 + 0.1 * rows  # noqa: E731
DEAR: Truth = lambda rows: 2.0 + 0.5 * rows  # noqa: E731
LINEAR: Truth = lambda rows: 1.0 * rows  # noqa: E731
SMALL: Truth = lambda rows: 0.15 + 0.04 * rows  # noqa: E731
CLIFF: Truth = lambda rows: 0.15 + 0.04 * rows if rows <= 32 else 0.1 * rows  # noqa: E731


def simulate(
    load: Load, truth: Truth, target_ms: float = TARGET_MS, *, knows: bool = True
) -> Result:
    measured = {rows: truth(rows) for rows in MEASURED} if knows else None
    return run(load, truth, Planner(MAX_ROWS, target_ms, measured))


def run(load: Load, truth: Truth, policy: Planner[int] | FixedWait) -> Result:
    simulation = Simulation(policy, truth, seed=1)
    load(simulation)
    return simulation.run(max(300.0, 200 * truth(1)))


LOADS: list[Callable[[Truth], Load]] = [
    lambda truth: closed(1, 1.0),
    lambda truth: closed(2, 1.0),
    lambda truth: closed(32, 1.0),
    lambda truth: closed(100, 2.0),
    lambda truth: poisson(300 / truth(1)),
    lambda truth: poisson(min(115_000 / truth(128), 3000 / truth(1))),
    lambda truth: bursts(8, 8 * truth(8)),
    lambda truth: both(bursts(8, 8 * truth(8)), closed(1, 3 * truth(1))),
    lambda truth: both(closed(8, 1.0), poisson(300 / truth(1))),
]


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("truth", [FREE, CHEAP, DEAR, LINEAR, SMALL, CLIFF])
def test_waiting_is_nowhere_much_worse_than_never_waiting(truth: Truth, knows: bool):
    for number, load in enumerate(LOADS):
        never = simulate(load(truth), truth, NEVER_MS, knows=knows)
        ours = simulate(load(truth), truth, knows=knows)
        assert ours.mean_ms <= never.mean_ms * 1.05, number
        assert ours.per_second >= never.per_second * 0.95, number


@pytest.mark.parametrize(
    ("load", "gain"),
    [(closed(2, 1.0), 1.5), (closed(8, 1.0), 1.4), (closed(32, 1.0), 1.3), (bursts(8, 80.0), 1.4)],
)
def test_it_pays_where_rows_are_nearly_free(load: Load, gain: float):
    never = simulate(load, FREE, NEVER_MS)
    ours = simulate(load, FREE)
    assert ours.mean_ms * gain < never.mean_ms
    fixed = run(load, FREE, FixedWait(MAX_ROWS, 2.0))
    assert ours.mean_ms < fixed.mean_ms


def test_without_any_measurement_it_is_learnt():
    never = simulate(closed(8, 1.0), FREE, NEVER_MS, knows=False)
    ours = simulate(closed(8, 1.0), FREE, knows=False)
    assert ours.mean_ms * 1.3 < never.mean_ms


def test_a_fixed_wait_costs_where_nobody_comes():
    load = closed(1, 1.0)
    assert run(load, SMALL, FixedWait(MAX_ROWS, 2.0)).mean_ms > 5 * simulate(load, SMALL).mean_ms


@pytest.mark.parametrize("truth", [FREE, CHEAP, SMALL])
def test_a_lone_caller_never_waits(truth: Truth):
    planner: Planner[int] = Planner(MAX_ROWS, TARGET_MS, {rows: truth(rows) for rows in MEASURED})
    now_ms = 0.0
    for turn in range(100):
        planner.add(Pending(turn, "", "", 1), now_ms)
        slices = planner.next(now_ms)
        assert [each.pending.item for each in slices] == [turn]
        now_ms += truth(1)
        planner.ended(slices, now_ms, truth(1), 1)
        assert planner.next(now_ms) == []
        now_ms += 1.0 + turn % 7


def test_a_size_at_which_the_model_is_slow_is_not_run():
    result = simulate(poisson(9000), CLIFF)
    assert sum(size > 32 for size in result.sizes) <= len(result.sizes) / 50


def test_a_target_of_nothing_never_waits():
    simulation = Simulation(policy := Planner(MAX_ROWS, NEVER_MS, {1: 10.0, 128: 10.0}), FREE, 1)
    closed(8, 1.0)(simulation)
    for until in range(0, 400, 7):
        simulation.run(float(until))
        assert policy.due_ms is None


def test_nobody_waits_past_the_target():
    target_ms = 12.0
    for load in (closed(8, 1.0), bursts(8, 80.0)):
        planner: Planner[int] = Planner(MAX_ROWS, target_ms, {1: 10.0, 128: 10.0})
        simulation = Simulation(planner, lambda rows: 10.0, seed=1)
        load(simulation)
        for tenth in range(2000):
            simulation.run(tenth / 10)
            head = planner.queue.head()
            if planner.due_ms is not None and head is not None:
                assert planner.due_ms + 10.0 <= head.came_ms + target_ms + 1e-6
