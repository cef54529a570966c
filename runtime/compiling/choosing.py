"""Chooses among forms of a program from how long their turns took. Pure: times in, choice out.

A *round* gives every form one turn at every batch size, in an order drawn anew, so a slow moment
of the machine hits all alike. Of each turn the median run counts. A round's *score* of a form is
the geometric mean, over the batch sizes, of how many times as fast as eager it was; the form's
score is the median over rounds, with the bounds that the order of the rounds' scores alone gives
(the sign test's: no assumption about the noise but that rounds are as likely high as low).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from runtime.compiling.measuring import MARGIN

# Rounds after which the times are looked at. Looking four times gives chance four chances, so
# each look gets a fourth of the doubt that is allowed in all.
LOOKS = (12, 24, 48, 96)
DOUBT = 0.025  # that a form which wins is not faster by the margin

Medians = Mapping[int, Sequence[float]]  # batch size -> the median of a turn, per round
Verdict = Literal["faster", "not_faster", "undecided"]


class Bounds(msgspec.Struct, frozen=True):
    """How many times as fast as eager, and what that is at least and at most but for the doubt."""

    value: float
    least: float
    most: float


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """How a form stands against eager. `slowest_size` is where it stands worst."""

    score: Bounds
    by_size: dict[int, Bounds]
    verdict: Verdict
    num_rounds: int

    @property
    def slowest_size(self) -> int:
        return min(self.by_size, key=lambda size: self.by_size[size].value)


def compare_times(eager: Medians, own: Medians) -> Standing:
    """Where a form stands. It is *faster* if its score is above the margin without doubt, and if
    at no batch size it may be slower than eager by more than the margin."""
    by_size = {
        size: find_bounds([base / time for base, time in zip(eager[size], own[size], strict=True)])
        for size in eager
    }
    rounds = zip(*(zip(eager[size], own[size], strict=True) for size in eager), strict=True)
    score = find_bounds(
        [statistics.geometric_mean([base / time for base, time in pairs]) for pairs in rounds]
    )
    least = min(bounds.least for bounds in by_size.values())
    most = min(bounds.most for bounds in by_size.values())
    verdict: Verdict = "undecided"
    if score.least > MARGIN and least > 1 / MARGIN:
        verdict = "faster"
    elif score.most < MARGIN or most < 1 / MARGIN:
        verdict = "not_faster"
    return Standing(
        score=score,
        by_size=by_size,
        verdict=verdict,
        num_rounds=len(next(iter(eager.values()))),
    )


def find_bounds(values: Sequence[float]) -> Bounds:
    """The median of positive `values`, and the bounds of the true one: as many from either end as
    fair coins would hardly ever leave on one side. Too few values bound nothing."""
    ordered = sorted(values)
    num_outside = _num_outside(len(ordered), DOUBT / len(LOOKS))
    return Bounds(
        statistics.median(ordered),
        ordered[num_outside - 1] if num_outside else 0.0,
        ordered[-num_outside] if num_outside else math.inf,
    )


def _num_outside(num_values: int, doubt: float) -> int:
    """The largest k for which the k-th smallest value is above the true median with no more than
    this chance: that fewer than k of n coins fall tails."""
    chance = 0.0
    for k in range(num_values + 1):
        chance += math.comb(num_values, k) / 2**num_values
        if chance > doubt:
            return k
    return num_values


def choose(standings: Mapping[str, Standing], ranks: Mapping[str, int]) -> str:
    """The form to serve: the fastest that is faster than eager without doubt, or eager. A form of
    a higher rank changes answers more (0: the uploaded precision, 1: a lower one, 2: lossy), so
    it has to beat the best of the lower ranks by the margin as well, without doubt."""
    best, best_score = "eager", 1.0
    for rank in sorted(set(ranks.values())):
        faster = {
            name: standing.score
            for name, standing in standings.items()
            if ranks[name] == rank and standing.verdict == "faster"
        }
        asked = best_score * MARGIN
        known = {name: score for name, score in faster.items() if score.least > asked}
        if known:
            best = max(known, key=lambda name: known[name].value)
            best_score = known[best].value
    return best
