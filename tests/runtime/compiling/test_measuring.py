"""Forms that are timed take turns, for a number of runs that is bounded either way."""

import torch

from runtime.compiling.measuring import MAX_RUNS, MIN_RUNS, measure


def test_forms_take_turns():
    order: list[str] = []

    def form(name: str):
        def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            order.append(name)
            return inputs

        return run

    measured = measure({"a": form("a"), "b": form("b")}, [torch.zeros(1)], budget_seconds=0.0)
    assert measured["a"].runs == MIN_RUNS
    assert order[-2 * MIN_RUNS :] == ["a", "b"] * MIN_RUNS
    measured = measure({"a": form("a")}, [torch.zeros(1)], budget_seconds=60.0)
    assert measured["a"].runs == MAX_RUNS
