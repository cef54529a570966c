"""Times forms of a program side by side on this machine, and knows nothing of what they are."""

import statistics
import time
from collections.abc import Callable, Mapping

import msgspec
import torch

Run = Callable[[list[torch.Tensor]], list[torch.Tensor]]
MakeInputs = Callable[[int], list[torch.Tensor]]

MARGIN = 1.05  # how many times faster than eager a form must be to be served instead
WARMUP_RUNS = 2
MIN_RUNS = 3
MAX_RUNS = 30
BUDGET_SECONDS = 2.0  # for all forms together, once each has had its least runs


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Wall time of runs whose outputs have reached the CPU, so that a device has finished."""

    p50_ms: float
    max_ms: float
    runs: int


def measure(
    runs: Mapping[str, Run], inputs: list[torch.Tensor], budget_seconds: float = BUDGET_SECONDS
) -> dict[str, Timing]:
    """Interleaved, so that a slow moment of the machine hits every form alike."""
    for run in runs.values():
        for _ in range(WARMUP_RUNS):
            run(inputs)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.perf_counter() + budget_seconds
    for turn in range(MAX_RUNS):
        if turn >= MIN_RUNS and time.perf_counter() > deadline:
            break
        for name, run in runs.items():
            started = time.perf_counter()
            run(inputs)
            samples[name].append((time.perf_counter() - started) * 1e3)
    return {
        name: Timing(p50_ms=statistics.median(times), max_ms=max(times), runs=len(times))
        for name, times in samples.items()
    }
