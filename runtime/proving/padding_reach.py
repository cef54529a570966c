"""Finds how long rows may be that are padded: what is harmless at the lengths first tried is tried
again at twice the length, and so on, as far as the axis, memory and time allow.

Models may treat long rows in another way (attention scaled by length, windows, tables of
positions). Owns how far, not whether at all.
"""

import logging
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import sympy
import torch

from runtime.importing.signature import axis_bounds
from runtime.importing.tensor_program import TensorProgram
from runtime.protocol import Check
from runtime.proving.inputs import InputMaker
from runtime.proving.memory import available_bytes
from runtime.proving.padding_runs import run_error
from runtime.proving.padding_trial import Trial, shown_rows
from runtime.proving.reference import find_tolerance

logger = logging.getLogger(__name__)

MOST_SECONDS = 5.0
FIRST = 32
LARGEST = 2**15  # of an axis without an end
MODEST = 512  # up to it, what rows take is little beside the weights
GROWTH = 4.0  # of time and memory, at most, where a length is doubled: attention's
MODEST_GROWTH = 2.0  # of time, up to the modest length


class Reach(msgspec.Struct, frozen=True):
    """`length` is the longest at which padding was proved; `end` says why it was not tried
    further, empty where the axis ends there."""

    length: int
    end: str
    error: float

    def check(self) -> Check:
        """For the receipt."""
        detail = f"rows of up to {self.length:,} padded beside the longest; error in multiples of "
        detail += "what is allowed"
        if self.end:
            detail += f". {self.end}: longer rows share runs with rows of their own length alone"
        return Check(
            name="padding, long",
            is_equal=True,
            detail=detail,
            error=self.error,
            tolerance=1.0,
        )


def find_reach(
    model: TensorProgram,
    maker: InputMaker,
    symbol: sympy.Symbol,
    trial: Trial,
    values: list[float],
    free: Sequence[int],
    shown: int,
) -> Reach:
    """From the length that `trial`'s rows were padded to on. `free` are the inputs whose padded
    part is filled at random; masks begin with `shown`."""
    _, most = axis_bounds(symbol, model.signature.ranges)
    limit = LARGEST if most is None else min(most, LARGEST)
    reached, worst = trial.padded_length, 0.0
    started = time.monotonic()
    last_seconds = 0.0
    while reached < limit:
        length = min(limit, max(FIRST, 1 << reached.bit_length()))
        growth = MODEST_GROWTH if length <= MODEST else GROWTH
        if time.monotonic() - started + growth * last_seconds > MOST_SECONDS:
            return Reach(reached, "The time for longer rows was over", worst)
        if length > MODEST and GROWTH * _peak_bytes() > available_bytes():
            return Reach(reached, "Longer rows could take more memory than there is", worst)
        step_started = time.monotonic()
        try:
            longer = _longer(
                model, maker, symbol, trial, [trial.lengths[0], reached, length], shown
            )
            error = _error(model, longer, values, free)
        except Exception:  # a stranger's graph may raise anything
            logger.info("rows of length %d do not run padded", length, exc_info=True)
            return Reach(reached, f"Rows of {length:,} do not run", worst)
        if error > 1.0:
            return Reach(reached, f"Padded to {length:,}, rows get other answers", worst)
        reached, worst = length, max(worst, error)
        last_seconds = time.monotonic() - step_started
    end = "" if most is not None and reached >= most else "Longer rows were not tried"
    return Reach(reached, end, worst)


def _longer(
    model: TensorProgram,
    maker: InputMaker,
    symbol: sympy.Symbol,
    trial: Trial,
    lengths: list[int],
    shown: int,
) -> Trial:
    """One row of each of the lengths, with their answers. The tolerance is of all but the longest:
    in float64 that would take most of the time."""
    batches = [
        shown_rows(maker.resized(symbol, length).make(1, seed=length), trial.input_axes, shown)
        for length in lengths
    ]
    answers = [model.run(batch) for batch in batches]
    return msgspec.structs.replace(
        trial,
        lengths=lengths,
        padded_length=lengths[-1],
        batches=batches,
        answers=answers,
        fillings=[maker.resized(symbol, lengths[-1]).make(1, seed=7)],
        tolerance=find_tolerance(model, batches[:-1], answers[:-1]),
    )


def _error(model: TensorProgram, trial: Trial, values: list[float], free: Sequence[int]) -> float:
    """Padded by the rule, and with random values where they may be."""
    rows = [(at, 1) for at in range(len(trial.lengths))]
    filled: list[dict[int, torch.Tensor]] = [{}]
    if free:
        filled.append({at: trial.fillings[0][at] for at in free})
    return max(run_error(model, trial, values, each, rows, trial.padded_length) for each in filled)


def _peak_bytes() -> int:
    """The most that this process has held beyond what it holds: no run took more."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(0, peak - pages * os.sysconf("SC_PAGE_SIZE"))
