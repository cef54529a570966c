"""Places where a test can end the process, named in the code that they are in.

A failpoint stands before or after everything that may happen without our knowing how it ended:
commits, syncs, network calls. It does nothing unless the environment's FAILPOINT names it, as
`name` or `name:n` for the n-th time it is reached (`*` is any of them), or a test observes it.
"""

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

Observer = Callable[[str], None]


class Reached(BaseException):
    """Raised by tests in place of a crash: not an `Exception`, since nothing may handle it."""


def failpoint(name: str) -> None:
    """Marks a place. `name` is a literal, so that tests find all of them in the source."""
    if _observer is not None:
        _observer(name)


@contextmanager
def observed(observer: Observer) -> Generator[None]:
    """Calls `observer` with each name that is reached meanwhile, in whatever thread."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


class Countdown:
    """Does `act` the n-th time that a failpoint of this name is reached, and never again."""

    def __init__(self, target: str, act: Observer) -> None:
        self._name, _, num_times = target.partition(":")
        self._left = int(num_times or 1)
        self._act = act
        self._lock = threading.Lock()

    def __call__(self, name: str) -> None:
        if self._name not in ("*", name):
            return
        with self._lock:
            self._left -= 1
            is_due = self._left == 0
        if is_due:
            self._act(name)


def _kill(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


_observer: Observer | None = (
    Countdown(os.environ["FAILPOINT"], _kill) if os.environ.get("FAILPOINT") else None
)
