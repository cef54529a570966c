"""Ends what takes too long, in the process's main thread."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class _OutOfTime(BaseException):
    """No `Exception`, so that nothing inside mistakes it for a failure of its own."""


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Raises `TimeoutError` when the block takes longer; between two Python instructions only,
    so a single long call of C code is waited for. `what` names the block, for people."""

    def out_of_time(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise _OutOfTime

    previous = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _OutOfTime:
        raise TimeoutError(f"{what} took longer than {seconds:.0f} s.") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
