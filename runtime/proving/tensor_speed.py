"""Times a tensor program in its uploaded form, as serving runs it, when it is built.

The other forms are measured beside it later: `building.optimise`.
"""

import logging
import resource
import time
from collections.abc import Callable, Iterator

import torch

from runtime.compiling.measuring import MakeInputs, Run, measure
from runtime.protocol import CandidateReport, Schema
from runtime.proving.inputs import InputMaker
from runtime.proving.memory import available_bytes

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 8, 32, 128)
AXIS_SIZES = tuple(2**power for power in range(4, 13))  # 16 to 4,096, of dynamic axes
SLOW_MS = 1_000.0  # one that takes longer is the last: the next may take four times as long
QUICK_MS = 250.0  # one that takes less is run again
MEMORY_SHARE = 1 / 16  # of what is free: a run that took more is the last

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


def measure_rows(run: Run, maker: InputMaker, schema: Schema) -> dict[int, float]:
    """Milliseconds of one row at growing sizes of its dynamic axes, by `Schema.row_size`: what a
    request of large rows may cost. Empty where all sizes are fixed."""
    found: dict[int, float] = {}
    for series in _series(maker, schema.is_batched):
        for inputs in series:
            size = schema.row_size([list(tensor.shape) for tensor in inputs])
            if not size or size in found:
                continue
            before = _peak_bytes()
            try:
                found[size] = round(_slowest_ms(run, inputs), 4)
            except Exception:  # a stranger's graph, asked for a size that it may not bear
                logger.info("a row of size %d does not run", size, exc_info=True)
                break
            grown_bytes = _peak_bytes() - before
            if found[size] > SLOW_MS or grown_bytes > MEMORY_SHARE * available_bytes():
                break
    return found


def _series(maker: InputMaker, is_batched: bool) -> Iterator[Iterator[list[torch.Tensor]]]:
    """Inputs that grow. Where rows share no run, a request's rows are an axis like others: they
    grow with the others too."""
    if maker.has_sizes:
        yield (each.make(1) for each in (maker, *map(maker.grown, AXIS_SIZES)))
    if not is_batched:
        yield (maker.grown(size).make(maker.max_rows(size)) for size in (1, *AXIS_SIZES))


def _slowest_ms(run: Run, inputs: list[torch.Tensor]) -> float:
    first_ms = _run_ms(run, inputs)
    if first_ms > QUICK_MS:
        return first_ms
    return max(_run_ms(run, inputs) for _ in range(3))  # the first has warmed it up


def _run_ms(run: Run, inputs: list[torch.Tensor]) -> float:
    started = time.perf_counter()
    run(inputs)
    return (time.perf_counter() - started) * 1e3


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
