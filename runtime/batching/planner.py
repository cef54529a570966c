"""Plans a tensor program's runs: what waits, what is known of service times and arrivals, and so
which rows run next and when.

Pure: the time is passed in, in milliseconds of any clock that never goes back.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

from runtime.batching.arrivals import Arrivals, Moment
from runtime.batching.fair_queue import BatchQueue, Pending, Slice, is_similar
from runtime.batching.service_times import SizedTimes
from runtime.batching.waiting import Wait, best_rows, best_wait, drain_ms

Item = TypeVar("Item")

MAX_COUNTED_RUNS = 4  # full runs of rows that wait: more of them make no difference to the next
TRIAL_RUNS = 50  # one in so many takes all that waits, so that what is known of it stays true
MEMORY = 0.1  # weight of the newest arrival in the share that could join the one before


class Planner(Generic[Item]):
    """One run at a time: `add` what comes, ask for the `next` run while none is under way, tell
    when it `ended`. A row waits for others only while nothing runs, only if that pays, and only
    within `latency_target_ms` of its arrival; never if that is 0."""

    def __init__(
        self, max_rows: int, latency_target_ms: float, measured: Mapping[int, float] | None = None
    ) -> None:
        self.queue: BatchQueue[Item] = BatchQueue(max_rows)
        self._max_rows = max_rows
        self._target_ms = latency_target_ms
        self._times = SizedTimes(max_rows, measured)
        self._arrivals = Arrivals()
        self._is_running = False
        self._wait: Wait | None = None
        self._moment_ms = 0.0
        self._num_runs = 0
        self._previous: tuple[Hashable, int] | None = None  # group and length
        self._joinable = 1.0  # share of arrivals that could share a run with the one before

    @property
    def due_ms(self) -> float | None:
        """Until when `next` has nothing to run although rows wait, unless more come."""
        return None if self._wait is None else self._wait.until_ms

    def add(self, pending: Pending[Item], now_ms: float) -> None:
        """Queue a request."""
        pending.came_ms = now_ms
        self._arrivals.add(pending.rows, now_ms)
        if not self._is_running and not len(self.queue):
            self._begin("came", now_ms, 1)
        if self._previous is not None:
            group, length = self._previous
            is_joinable = group == pending.group and is_similar(pending.length, length, length)
            self._joinable += MEMORY * (is_joinable - self._joinable)
        self._previous = pending.group, pending.length
        self.queue.add(pending)

    def next(self, now_ms: float) -> list[Slice[Item]]:
        """The run to begin now; empty when nothing waits, or while waiting pays."""
        head = self.queue.head()
        if head is None or self._is_running:
            self._wait = None
            return []
        rows = self.queue.num_rows(head, MAX_COUNTED_RUNS * self._max_rows)
        if self._should_wait(head, rows, now_ms):
            return []
        self._wait = None
        self._is_running = True
        self._num_runs += 1
        most = best_rows(rows, self._times.of_size(head.cost), self._max_rows)
        return self.queue.take(most if self._num_runs % TRIAL_RUNS else self._max_rows)

    def ended(
        self, slices: Sequence[Slice[Item]], now_ms: float, run_ms: float | None, size: int
    ) -> None:
        """The run of `slices` is over. It took `run_ms`, with rows of `size` values; None where
        that says nothing of the next."""
        self._is_running = False
        rows = sum(each.stop - each.start for each in slices)
        if run_ms is not None:
            self._times.of_size(size).observe(rows, run_ms)
        if len(self.queue):
            self._begin("ended", now_ms, rows)

    def drain_ms(self) -> float:
        """How long what waits will take."""
        head = self.queue.head()
        if head is None:
            return 0.0
        times = self._times.of_size(head.cost)
        return drain_ms(self.queue.total_rows(), times, self._max_rows)

    def _begin(self, moment: Moment, now_ms: float, scale: float) -> None:
        self._moment_ms = now_ms
        self._arrivals.begin(moment, now_ms, scale)

    def _should_wait(self, head: Pending[Item], rows: int, now_ms: float) -> bool:
        times = self._times.of_size(head.cost)
        if rows >= self._max_rows or not times or now_ms >= head.came_ms + self._target_ms:
            return False
        if self._wait is not None and now_ms < self._wait.until_ms and rows < self._wait.rows:
            return True
        elapsed_ms = now_ms - self._moment_ms
        expected = self._arrivals.expected(now_ms, times.ms(rows) - elapsed_ms)
        self._wait = best_wait(
            rows,
            head.came_ms,
            now_ms,
            [self._joinable * coming for coming in expected],
            times,
            max_rows=self._max_rows,
            target_ms=self._target_ms,
            elapsed_ms=elapsed_ms,
        )
        return self._wait is not None
