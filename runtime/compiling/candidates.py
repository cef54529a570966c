"""The optimised forms of a tensor program, and which of them to serve.

Owns the list of forms and the choice; timing is `measuring.py`'s. Every form is measured on this
machine, eager among them, and a form must beat eager by a margin to be chosen.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from runtime.compiling.measuring import MakeInputs, Run, Timing, measure
from runtime.protocol import CandidateReport

BATCH_SIZES = (1, 8, 32)
MARGIN = 1.05  # how many times faster than eager a form must be

Report = Callable[[float, str], None]


class Runnable(Protocol):
    """What a candidate starts from: a program in its uploaded form."""

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]: ...


def eager(program: Runnable) -> Run:
    """The graph as uploaded, operator by operator."""
    return program.run


# By name; each makes a form of the program, and raises when it cannot.
CANDIDATES: dict[str, Callable[[Runnable], Run]] = {"eager": eager}


def measure_candidates(
    program: Runnable,
    make_inputs: MakeInputs,
    max_batch_rows: int,
    report: Report = lambda *_: None,
) -> list[CandidateReport]:
    """One report per candidate, exactly one of them chosen. `make_inputs` takes a number of
    rows; `max_batch_rows` is the largest run that serving will make (1: unbatched)."""
    sizes = sorted({size for size in BATCH_SIZES if size < max_batch_rows} | {max_batch_rows})
    runs = {name: make(program) for name, make in CANDIDATES.items()}
    timings: dict[str, dict[int, Timing]] = {name: {} for name in runs}
    for index, size in enumerate(sizes):
        measured = measure(runs, make_inputs(size))
        for name, timing in measured.items():
            timings[name][size] = timing
            line = f"{name}, batch of {size}: {timing.p50_ms:.2f} ms ({timing.runs} runs)"
            report((index + 1) / len(sizes), line)
    best = choose(timings)
    return [
        CandidateReport(
            name=name,
            is_chosen=name == best,
            reason=_reason(name, best, list(runs)),
            p50_ms={size: round(timing.p50_ms, 4) for size, timing in by_size.items()},
            device_ms_max=max(timing.max_ms for timing in by_size.values()),
        )
        for name, by_size in timings.items()
    ]


def choose(timings: dict[str, dict[int, Timing]]) -> str:
    """The form with the best speed-up over eager, averaged over batch sizes, if that is more
    than the margin; eager otherwise."""
    base = timings["eager"]
    best, best_speedup = "eager", MARGIN
    for name, times in timings.items():
        speedup = sum(base[size].p50_ms / times[size].p50_ms for size in base) / len(base)
        if name != "eager" and speedup > best_speedup:
            best, best_speedup = name, speedup
    return best


def _reason(name: str, best: str, names: Sequence[str]) -> str:
    if len(names) == 1:
        return "the program as uploaded, and the only form measured"
    if name == best:
        return "the fastest form" if name != "eager" else "no form was faster by the margin"
    return f"not faster than {best}"
