"""Times a tensor program in its uploaded form, as serving runs it, when it is built.

The other forms are measured beside it later: `building.optimise`.
"""

from collections.abc import Callable

from runtime.compiling.measuring import MakeInputs, Run, measure
from runtime.protocol import CandidateReport

BATCH_SIZES = (1, 8, 32, 128)

Report = Callable[[float, str], None]


def batch_sizes(max_rows: int) -> list[int]:
    """Those measured of a program whose runs have up to `max_rows` rows (1: unbatched); always
    the largest, whose time bounds what a request may cost."""
    return sorted({size for size in BATCH_SIZES if size < max_rows} | {max_rows})


def measure_tensor(
    run: Run, make_inputs: MakeInputs, max_rows: int, report: Report = lambda *_: None
) -> list[CandidateReport]:
    """One report, of the eager form. `make_inputs` takes a number of rows."""
    sizes = batch_sizes(max_rows)
    p50_ms: dict[int, float] = {}
    slowest = 0.0
    for index, size in enumerate(sizes):
        timing = measure({"eager": run}, make_inputs(size))["eager"]
        p50_ms[size], slowest = round(timing.p50_ms, 4), max(slowest, timing.max_ms)
        line = f"eager, batch of {size}: {timing.p50_ms:.2f} ms ({timing.runs} runs)"
        report((index + 1) / len(sizes), line)
    return [
        CandidateReport(
            name="eager",
            is_chosen=True,
            fate="chosen",
            reason="the program as uploaded, and the only form measured yet",
            p50_ms=p50_ms,
            rows_per_second={size: round(1e3 * size / p50_ms[size], 2) for size in sizes},
            device_ms_max=slowest,
        )
    ]
