"""How long a run of so many rows takes: from what the build measured, kept right by every run.

Plain numbers: no clock, no tensors. What follows from them is `waiting.py`'s.
"""

import bisect
import math
from collections.abc import Mapping

WEIGHT = 0.1  # of the newest run, once there have been a few
MEASURED_RUNS = 4.0  # what a time from the build counts as
KNOWN_RUNS = 3
MINOR_SHARE = 0.25
MAX_SURPRISE = 4.0  # times what was expected; more is a hiccup of the machine
SIZES_PER_DOUBLING = 2
MAX_SIZES = 64


class ServiceTimes:
    """Milliseconds of a run by its rows, at a few numbers of rows and straight lines between.

    What nothing is known of takes as long as its rows would one by one, so that sharing runs is
    not believed to pay before it was seen to. More rows never take less time.
    """

    def __init__(self, max_rows: int, measured: Mapping[int, float] | None = None) -> None:
        """`measured`: milliseconds by rows."""
        known = {rows: ms for rows, ms in (measured or {}).items() if rows <= max_rows and ms > 0}
        powers = {1 << power for power in range(max_rows.bit_length())}
        self.rows = sorted({*powers, *known, max_rows})
        points = sorted(known.items())
        self._is_known = bool(points)
        self._num_measured = MEASURED_RUNS if points else 0.0
        self._num_runs = [0.0] * len(self.rows)
        self._raw = [_interpolate(rows, points) if points else float(rows) for rows in self.rows]
        self._smooth()

    def __bool__(self) -> bool:
        """Whether anything is known at all."""
        return self._is_known

    def ms(self, rows: float) -> float:
        """0 for no rows; in proportion beyond the most that a run takes."""
        return _interpolate(rows, self._points)

    def knows(self, rows: int) -> bool:
        """Whether runs of about so many rows were measured."""
        return all(
            self._num_measured + self._num_runs[at] >= KNOWN_RUNS or share < MINOR_SHARE
            for at, share in self._shares(rows).items()
        )

    def observe(self, rows: int, ms: float) -> None:
        """A run of `rows` took `ms`."""
        if not self._is_known:
            self._is_known = True
            self._raw = [ms * each / rows for each in self.rows]
        expected = _interpolate(rows, list(zip(self.rows, self._raw, strict=True)))
        change = min(ms / expected, MAX_SURPRISE) - 1 if expected > 0 else 0.0
        shares = self._shares(rows)
        weights = {
            at: share * max(WEIGHT, 1 / (self._num_measured + self._num_runs[at] + share))
            for at, share in shares.items()
        }
        # What has not run yet moves along: the machine is slower or faster than was thought.
        others = max(weights.values())
        for at, num_runs in enumerate(self._num_runs):
            weight = weights.get(at, 0.0 if num_runs else others)
            self._raw[at] *= 1 + weight * change
            self._num_runs[at] += shares.get(at, 0.0)
        self._smooth()

    def borrowed(self, scale: float) -> "ServiceTimes":
        """A first guess for rows that are `scale` times the size: to be unlearned quickly."""
        other = ServiceTimes(self.rows[-1])
        other.rows = list(self.rows)
        other._raw = [ms * scale for _, ms in self._points]
        other._num_runs = [0.0] * len(self.rows)
        other._is_known = self._is_known
        other._smooth()
        return other

    def _smooth(self) -> None:
        """A large run that was quick shows what smaller ones can be; a slow small one may have
        been a hiccup."""
        lowest = math.inf
        points = []
        for rows, ms in zip(reversed(self.rows), reversed(self._raw), strict=True):
            lowest = min(lowest, ms)
            points.append((rows, lowest))
        self._points = points[::-1]

    def _shares(self, rows: int) -> dict[int, float]:
        """How near `rows` is to the numbers around it, by their places."""
        right = min(bisect.bisect_left(self.rows, rows), len(self.rows) - 1)
        if self.rows[right] <= rows or right == 0:
            return {right: 1.0}
        left = right - 1
        share = (rows - self.rows[left]) / (self.rows[right] - self.rows[left])
        return {left: 1 - share, right: share}


class SizedTimes:
    """Service times by the size of a row (its number of values), which differs between requests
    where axes besides the batch are dynamic. `measured` are those of the first size seen."""

    def __init__(self, max_rows: int, measured: Mapping[int, float] | None = None) -> None:
        self._first = ServiceTimes(max_rows, measured)
        self._times: dict[int, ServiceTimes] = {}

    def of_size(self, size: int) -> ServiceTimes:
        """The times of rows of about `size` values."""
        place = round(math.log2(max(1, size)) * SIZES_PER_DOUBLING)
        found = self._times.get(place)
        if found is None:
            found = self._times[place] = self._guess(place)
            if len(self._times) > MAX_SIZES:
                del self._times[next(iter(self._times))]
        return found

    def _guess(self, place: int) -> ServiceTimes:
        if not self._times:
            return self._first
        nearest = min(self._times, key=lambda other: abs(other - place))
        scale = 2.0 ** ((place - nearest) / SIZES_PER_DOUBLING)
        return self._times[nearest].borrowed(scale)


def _interpolate(rows: float, points: list[tuple[int, float]]) -> float:
    """On straight lines between `points`; in proportion outside them."""
    right = bisect.bisect_left(points, rows, key=lambda point: point[0])
    if right == 0 or right == len(points):
        at, ms = points[min(right, len(points) - 1)]
        return ms * rows / at
    (left_at, left_ms), (right_at, right_ms) = points[right - 1], points[right]
    share = (rows - left_at) / (right_at - left_at)
    return left_ms + share * (right_ms - left_ms)
