"""Which requests the journal has admitted and not seen settled, for those who compare.

Counts only: what keeps a segment on disk is the writing thread's own memory, in `journal.py`.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MAX_KEPT = 50_000  # ids of settled requests that wait to be looked up


class OpenState(NamedTuple):
    """Counts since the process started, at one moment. `settled_ids` are those of since the last
    `take`; `num_not_kept` more were settled."""

    num_admitted: int
    num_settled: int
    num_open: int
    oldest_open: str
    oldest_open_ms: int
    settled_ids: Sequence[str]
    num_not_kept: int


class OpenRequests:
    """Any thread may call any of its methods."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}  # request id -> when it was admitted, the oldest first
        self._settled: deque[str] = deque(maxlen=MAX_KEPT)
        self._num_admitted = 0
        self._num_settled = 0
        self._num_untaken = 0

    def admit(self, request_ids: Iterable[str]) -> None:
        now_ns = time.monotonic_ns()
        with self._lock:
            for request_id in request_ids:
                self._num_admitted += 1
                self._open[request_id] = now_ns

    def settle(self, request_ids: Iterable[str]) -> None:
        """One that is settled again, as after an attempt of unknown end, counts once."""
        with self._lock:
            for request_id in request_ids:
                if self._open.pop(request_id, None) is not None:
                    self._num_settled += 1
                    self._num_untaken += 1
                    self._settled.append(request_id)

    def take(self) -> OpenState:
        """How things stand; the settled requests are handed out once."""
        with self._lock:
            oldest, admitted_ns = next(iter(self._open.items()), ("", 0))
            age_ns = time.monotonic_ns() - admitted_ns if oldest else 0
            settled_ids, num_untaken = list(self._settled), self._num_untaken
            self._settled.clear()
            self._num_untaken = 0
            return OpenState(
                num_admitted=self._num_admitted,
                num_settled=self._num_settled,
                num_open=len(self._open),
                oldest_open=oldest,
                oldest_open_ms=age_ns // 1_000_000,
                settled_ids=settled_ids,
                num_not_kept=num_untaken - len(settled_ids),
            )
