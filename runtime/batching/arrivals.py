"""How many rows are likely to come soon, learnt from what came after moments like this one.

Callers that send their next request when they have an answer come back shortly after a run ends;
parallel calls come in a burst after the first. A mean rate knows of neither. So the last moments
at which waiting was considered are kept with what came after each, and those that began as the
present one did say how it goes on. Plain numbers with the time passed in.
"""

import bisect
from collections import deque
from typing import Literal

# A run ended and others wait; or rows came while nothing ran and nothing waited.
Moment = Literal["ended", "came"]

SPANS_MS = tuple(0.1 * 1.5**step for step in range(18))  # to 99 ms
NUM_KEPT = 12  # moments of a kind
LIKENESS = 0.25  # of the rows that have come so far, or half a row


class Arrivals:
    """Tell it of every arrival and every moment; ask it within one."""

    def __init__(self) -> None:
        self._after: dict[Moment, _After] = {"ended": _After(), "came": _After()}
        self._now: _After | None = None

    def begin(self, moment: Moment, now_ms: float, scale: float) -> None:
        """`scale`: what the numbers are thought to grow with, such as the rows just answered."""
        self._now = self._after[moment]
        self._now.begin(now_ms, scale)

    def add(self, rows: int, now_ms: float) -> None:
        """Rows came."""
        for after in self._after.values():
            after.add(rows, now_ms)

    def expected(self, now_ms: float, limit_ms: float) -> list[float]:
        """Rows within each of `SPANS_MS` below the limit from now; empty while nothing is
        known."""
        return [] if self._now is None else self._now.expected(now_ms, limit_ms)


class _After:
    """What came after the last moments of one kind."""

    def __init__(self) -> None:
        # Of each moment, rows per unit of scale within each span after it.
        self._kept: deque[list[float]] = deque(maxlen=NUM_KEPT)
        self._began_ms: float | None = None
        self._scale = 1.0
        self._within = [0] * len(SPANS_MS)  # rows of the present moment
        self._place = 0  # of the span that the last arrival fell in
        self._have_come = 0

    def begin(self, now_ms: float, scale: float) -> None:
        if self._began_ms is not None:
            self._fill(len(SPANS_MS))
            self._kept.append([rows / self._scale for rows in self._within])
        self._began_ms = now_ms
        self._scale = max(scale, 1.0)
        self._within = [0] * len(SPANS_MS)
        self._place = 0
        self._have_come = 0

    def add(self, rows: int, now_ms: float) -> None:
        if self._began_ms is None or self._place == len(SPANS_MS):
            return
        self._fill(bisect.bisect_left(SPANS_MS, now_ms - self._began_ms))
        self._have_come += rows

    def expected(self, now_ms: float, limit_ms: float) -> list[float]:
        spans = SPANS_MS[: bisect.bisect_left(SPANS_MS, limit_ms)]
        if not spans or self._began_ms is None or not self._kept:
            return []
        elapsed_ms = now_ms - self._began_ms
        begun = [_at(kept, elapsed_ms) * self._scale for kept in self._kept]
        near = max(0.5, LIKENESS * self._have_come)
        near = max(near, min(abs(rows - self._have_come) for rows in begun))
        alike = [
            (kept, rows)
            for kept, rows in zip(self._kept, begun, strict=True)
            if abs(rows - self._have_come) <= near
        ]
        # Of each, the lesser of what came in the rest of the span and of what is missing now of
        # all that came: callers who are back already do not come twice.
        floors = [(kept, max(rows, self._have_come)) for kept, rows in alike]
        return [
            sum(
                max(0.0, _at(kept, elapsed_ms + span) * self._scale - rows) for kept, rows in floors
            )
            / len(floors)
            for span in spans
        ]

    def _fill(self, place: int) -> None:
        """All that has come so far came within the spans before `place`, those up to now."""
        for at in range(self._place, place):
            self._within[at] = self._have_come
        self._place = max(self._place, place)


def _at(within: list[float], span_ms: float) -> float:
    """Straight lines between the spans; level after the last."""
    right = bisect.bisect_left(SPANS_MS, span_ms)
    if right == len(SPANS_MS):
        return within[-1]
    left_ms, left = (SPANS_MS[right - 1], within[right - 1]) if right else (0.0, 0.0)
    return left + (span_ms - left_ms) / (SPANS_MS[right] - left_ms) * (within[right] - left)
