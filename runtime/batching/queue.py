"""Decides which requests share a run, and when a lone one waits for company.

Plain Python with the time passed in: no clock, no threads, no tensors.
"""

from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")

# Waiting pays when at least this share of recent requests found another one there.
WORTHWHILE_COMPANY = 0.2
MEMORY = 0.1  # weight of the newest request in that share


class Pending(Generic[Item]):
    """A queued request. `key` is equal between those that may share a run."""

    def __init__(self, item: Item, key: Hashable, rows: int, arrived_ns: int) -> None:
        self.item = item
        self.key = key
        self.rows = rows
        self.arrived_ns = arrived_ns
        self.go_at_ns = arrived_ns


class BatchQueue(Generic[Item]):
    """First in, first out between groups of equal key; within a run, in order of arrival.

    What arrives during a run goes in the next one at once. What arrives when nothing runs
    waits up to `max_wait_ns`, but only if recent requests came in company: a single caller
    that sends one request after another never pays for the wait.
    """

    def __init__(self, max_rows: int, max_wait_ns: int) -> None:
        assert max_rows >= 1, "a run takes at least one row"
        assert max_wait_ns >= 0, "waiting goes forward in time"
        self.max_rows = max_rows
        self.max_wait_ns = max_wait_ns
        self._pending: list[Pending[Item]] = []
        self._company = 0.0

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, pending: Pending[Item], *, is_running: bool) -> None:
        """Queue a request of at most `max_rows` rows."""
        assert 1 <= pending.rows <= self.max_rows, "larger requests arrive in pieces"
        has_company = is_running or bool(self._pending)
        self._company += MEMORY * (has_company - self._company)
        if not is_running and self._company >= WORTHWHILE_COMPANY:
            pending.go_at_ns = pending.arrived_ns + self.max_wait_ns
        self._pending.append(pending)

    def remove(self, pending: Pending[Item]) -> bool:
        """Whether the request was still queued; it will not run."""
        if pending not in self._pending:
            return False
        self._pending.remove(pending)
        return True

    def take(self, now_ns: int) -> list[Pending[Item]]:
        """The next run, or nothing while its first request should still wait."""
        if not self._pending:
            return []
        first = self._pending[0]
        batch: list[Pending[Item]] = []
        rows = 0
        is_full = False
        for pending in self._pending:
            if pending.key != first.key:
                continue
            if rows + pending.rows > self.max_rows:
                is_full = True  # nothing may overtake the one that does not fit
                break
            batch.append(pending)
            rows += pending.rows
        if now_ns < first.go_at_ns and not is_full and rows < self.max_rows:
            return []
        taken = set(map(id, batch))
        self._pending = [pending for pending in self._pending if id(pending) not in taken]
        return batch

    def due_ns(self) -> int | None:
        """When the first request has waited enough; None when there is none."""
        return self._pending[0].go_at_ns if self._pending else None

    def clear(self) -> list[Pending[Item]]:
        """Empty the queue and return what was in it."""
        dropped, self._pending = self._pending, []
        return dropped
