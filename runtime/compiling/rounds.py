"""Runs forms of a program in rounds, side by side, and keeps how long each run took.

Knows nothing of processes or programs: a `Contestant` takes a turn when asked. The choice is
`choosing.py`'s, which also says after how many rounds it wants to look.
"""

import logging
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from runtime.compiling.choosing import LOOKS, Standing, compare_times

logger = logging.getLogger(__name__)

TURN_SECONDS = 0.02
LEAST_RUNS = 3  # of a size that is too slow for rounds


class Contestant(Protocol):
    """One form, ready to run."""

    def turn(self, size: int, seconds: float) -> list[float]:
        """Milliseconds of each run of one turn, one run at least. Raises `Withdrawn`."""
        ...


class Withdrawn(Exception):
    """The form can take no more turns."""


class Measured(msgspec.Struct, kw_only=True):
    """Of one form: every run's milliseconds, and each round's median, by batch size. A size that
    has no rounds was too slow for them and was only run a few times."""

    runs_ms: dict[int, list[float]]
    medians: dict[int, list[float]]

    def p50_ms(self, size: int) -> float:
        return statistics.median(self.runs_ms[size])

    def p99_ms(self, size: int) -> float:
        """By nearest rank: with fewer than a hundred runs, the slowest."""
        ordered = sorted(self.runs_ms[size])
        return ordered[math.ceil(0.99 * len(ordered)) - 1]

    @property
    def num_runs(self) -> int:
        """The least of any batch size."""
        return min(map(len, self.runs_ms.values()))

    @property
    def max_ms(self) -> float:
        return max(max(runs) for runs in self.runs_ms.values())


class Race(msgspec.Struct, kw_only=True):
    """What came of it. `sizes` are those that had rounds; `withdrawn` forms are in no other."""

    sizes: list[int]
    measured: dict[str, Measured]
    standings: dict[str, Standing]


def race(
    contestants: Mapping[str, Contestant],
    run_ms: Mapping[int, float],
    *,
    seconds: float,
    report: Callable[[float, str], None] = lambda *_: None,
    seed: int = 0,
) -> Race:
    """Eager among the contestants. `run_ms` is about how long a run takes of each batch size, of
    all contestants together. Rounds go on while any form is undecided, up to the last of `LOOKS`
    or for `seconds`."""
    deadline = time.monotonic() + seconds
    sizes = sizes_for(run_ms, seconds)
    measured = {
        name: Measured(runs_ms={size: [] for size in run_ms}, medians={size: [] for size in sizes})
        for name in contestants
    }
    left = dict(contestants)
    draw = random.Random(seed)  # noqa: S311 - an order, not a secret
    _run_few(left, measured, [size for size in run_ms if size not in sizes])
    standings: dict[str, Standing] = {}
    for number in range(1, LOOKS[-1] + 1):
        _run_round(left, measured, sizes, draw)
        is_late = time.monotonic() > deadline
        report(number / LOOKS[-1], _line(measured, left, number))
        if number in LOOKS or is_late:
            standings = _standings(measured, left, sizes)
            undecided = [name for name, each in standings.items() if each.verdict == "undecided"]
            if is_late or not undecided:
                break
    return Race(sizes=sizes, measured={name: measured[name] for name in left}, standings=standings)


def sizes_for(run_ms: Mapping[int, float], seconds: float) -> list[int]:
    """The batch sizes, from the smallest on, for which the least number of rounds fits the time
    by half; the smallest in any case."""
    sizes: list[int] = []
    total = 0.0
    for size in sorted(run_ms):
        # A short run is repeated once before it is timed, and for as long as a turn lasts.
        total += LOOKS[0] * max(run_ms[size] / 1e3, TURN_SECONDS)
        if sizes and total > seconds / 2:
            break
        sizes.append(size)
    return sizes


def _run_round(
    left: dict[str, Contestant],
    measured: Mapping[str, Measured],
    sizes: Sequence[int],
    draw: random.Random,
) -> None:
    for size in sizes:
        for name in draw.sample(sorted(left), len(left)):
            runs_ms = _turn(left, name, size, TURN_SECONDS)
            if runs_ms:
                measured[name].runs_ms[size] += runs_ms
                measured[name].medians[size].append(statistics.median(runs_ms))


def _run_few(
    left: dict[str, Contestant], measured: Mapping[str, Measured], sizes: Sequence[int]
) -> None:
    for size in sizes:
        for _ in range(LEAST_RUNS):
            for name in sorted(left):
                measured[name].runs_ms[size] += _turn(left, name, size, 0.0)


def _turn(left: dict[str, Contestant], name: str, size: int, seconds: float) -> list[float]:
    """Empty when the form withdraws."""
    try:
        return left[name].turn(size, seconds)
    except Withdrawn:
        logger.info("%s withdraws", name)
        del left[name]
        return []


def _standings(
    measured: Mapping[str, Measured], left: Mapping[str, Contestant], sizes: Sequence[int]
) -> dict[str, Standing]:
    if "eager" not in left:
        return {}
    eager = {size: measured["eager"].medians[size] for size in sizes}
    return {
        name: compare_times(eager, {size: measured[name].medians[size] for size in sizes})
        for name in left
        if name != "eager"
    }


def _line(measured: Mapping[str, Measured], left: Mapping[str, Contestant], number: int) -> str:
    shown = []
    for name in left:
        medians = [values for values in measured[name].medians.values() if values]
        shown.append(f"{name} {statistics.median(medians[0]):.2f} ms")
    smallest = min(next(iter(measured.values())).medians)
    return f"round {number}, batch of {smallest}: {', '.join(shown)}"
