"""Every form is measured at the sizes that matter, and eager wins unless beaten by a margin."""

import torch

from runtime.compiling import candidates
from runtime.compiling.candidates import choose, measure_candidates
from runtime.compiling.measuring import MAX_RUNS, MIN_RUNS, Timing, measure


class Program:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        self.sizes.append(inputs[0].shape[0])
        return inputs


def make_inputs(rows: int) -> list[torch.Tensor]:
    return [torch.zeros(rows, 2)]


def timings(**p50_ms: float) -> dict[str, dict[int, Timing]]:
    return {
        name: {size: Timing(p50_ms=value, max_ms=value, runs=3) for size in (1, 8)}
        for name, value in p50_ms.items()
    }


def test_eager_alone_is_chosen_and_measured_at_every_size():
    program = Program()
    lines: list[str] = []
    (report,) = measure_candidates(program, make_inputs, 64, lambda _, line: lines.append(line))
    assert (report.name, report.is_chosen) == ("eager", True)
    assert list(report.p50_ms) == [1, 8, 32, 64]
    assert report.device_ms_max > 0
    assert set(program.sizes) == {1, 8, 32, 64}
    assert len(lines) == 4


def test_an_unbatched_program_is_measured_with_one_row():
    program = Program()
    (report,) = measure_candidates(program, make_inputs, 1)
    assert list(report.p50_ms) == [1]


def test_a_form_must_beat_eager_by_the_margin():
    assert choose(timings(eager=1.0, other=0.97)) == "eager"
    assert choose(timings(eager=1.0, other=0.5, third=0.7)) == "other"
    assert choose(timings(eager=1.0, other=2.0)) == "eager"


def test_exactly_one_form_is_chosen_and_the_others_say_why_not(monkeypatch):
    monkeypatch.setitem(candidates.CANDIDATES, "twice", lambda program: program.run)
    reports = measure_candidates(Program(), make_inputs, 8)
    assert [report.is_chosen for report in reports].count(True) == 1
    assert all(report.reason for report in reports)


def test_forms_take_turns():
    order: list[str] = []

    def form(name: str):
        def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            order.append(name)
            return inputs

        return run

    measured = measure({"a": form("a"), "b": form("b")}, make_inputs(1), budget_seconds=0.0)
    assert measured["a"].runs == MIN_RUNS
    assert order[-2 * MIN_RUNS :] == ["a", "b"] * MIN_RUNS
    measured = measure({"a": form("a")}, make_inputs(1), budget_seconds=60.0)
    assert measured["a"].runs == MAX_RUNS
