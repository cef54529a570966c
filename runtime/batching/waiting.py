"""Decides how many of the waiting rows run now, and whether the next run waits for more.

Pure functions of what runs are measured to take and of what is expected to come. Which rows share
a run is `fair_queue.py`'s decision.
"""

from collections.abc import Sequence

import msgspec

from runtime.batching.arrivals import SPANS_MS
from runtime.batching.service_times import ServiceTimes

# The summed latency must fall by this share of that of the rows at hand: estimates are rough.
MARGIN = 0.1
# Smaller runs may take so much longer altogether: what waits behind must not suffer.
MAX_SLOWDOWN = 1.05
LOOKS = 3  # while a wait lasts, the question is asked again: nobody coming is news too


class Wait(msgspec.Struct, frozen=True):
    """Until `until_ms`, or until `rows` wait; then ask again."""

    until_ms: float
    rows: float


def best_wait(
    rows: int,
    oldest_ms: float,
    now_ms: float,
    expected: Sequence[float],
    times: ServiceTimes,
    *,
    max_rows: int,
    target_ms: float,
    elapsed_ms: float = 0.0,
) -> Wait | None:
    """None: run the `rows` now, of which the oldest came at `oldest_ms`. `expected` are
    the rows to come within each of `SPANS_MS`; `elapsed_ms` is how long it was waited already.

    Both choices serve the same rows, so their latencies are compared by sum. With `r` rows at hand
    and `k` more within `w`, waiting ends all of them at `w + T(r + k)`; not waiting ends the first
    at `T(r)` and the others at `T(r) + T(k)`. Nothing is waited for that would come after `T(r)`,
    when the server is free anyway, and nobody for longer than the latency target allows.
    """
    now_takes = times.ms(rows)
    least_gain = MARGIN * rows * now_takes
    best: Wait | None = None
    for span, coming in zip(SPANS_MS, expected, strict=False):
        if elapsed_ms + span >= now_takes:
            break
        more = min(coming, max_rows - rows)
        together = times.ms(rows + more)
        if now_ms + span + together - oldest_ms > target_ms:
            break
        saved = more * (now_takes + times.ms(max(1.0, more)) - span - together)
        gain = saved - rows * (span + together - now_takes)
        if gain > least_gain:
            least_gain = gain
            best = Wait(now_ms + max(SPANS_MS[0], span / LOOKS), rows + more)
    return best


def best_rows(rows: int, times: ServiceTimes, max_rows: int) -> int:
    """How many of the `rows` that wait to run at once: where large batches take their full time
    per row, or more, smaller ones answer the first rows earlier and the last ones as early. All
    of them, as long as it is not known how long that takes."""
    most = min(rows, max_rows)
    if most <= 1 or not times.knows(most):
        return most
    choices = [*(size for size in times.rows if size < most and times.knows(size)), most]
    plans = [(*_plan(rows, size, times), size) for size in choices]
    quickest = min(total for total, _, _ in plans)
    whole_total, whole_sum, _ = plans[-1]
    allowed = [plan for plan in plans if plan[0] <= MAX_SLOWDOWN * quickest]
    _, best_sum, best = min(allowed, key=lambda plan: plan[1])
    is_better = whole_total > MAX_SLOWDOWN * quickest or best_sum < (1 - MARGIN) * whole_sum
    return best if is_better else most


def _plan(rows: int, size: int, times: ServiceTimes) -> tuple[float, float]:
    """When the last of `rows` is served by runs of `size`, and the sum over all of when they
    are."""
    num_full, rest = divmod(rows, size)
    takes = times.ms(size)
    total = num_full * takes
    summed = size * takes * num_full * (num_full + 1) / 2
    if rest:
        total += times.ms(rest)
        summed += rest * total
    return total, summed


def drain_ms(rows: int, times: ServiceTimes, max_rows: int) -> float:
    """How long `rows` take to be served."""
    return _plan(rows, best_rows(rows, times, max_rows), times)[0] if rows else 0.0
