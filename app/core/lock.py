"""Advisory locks on files, which end with the process however it ends, and the data directory's.

A lock file's content only tells a person who holds it; the kernel's lock is what counts.
"""

import fcntl
import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from app.core.errors import Conflict


class FileInUse(Exception):
    """Another process holds the lock. Its text names that process, where that is known, in
    brackets after a blank, so that it can follow a noun; else it is empty."""


class DataDirInUse(Conflict):
    """Another process runs on this data directory."""

    default_code = "data_dir_in_use"


@contextmanager
def hold_file(path: Path) -> Generator[None]:
    """Holds the lock file `path` while the block runs. Raises `FileInUse` at once, never waits,
    and `OSError` where the file cannot be made."""
    # Never unlinked: a second process could then lock a new file beside the one still held.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileInUse(_holder(descriptor)) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def hold_data_dir(data_dir: Path) -> Generator[None]:
    """Holds `data_dir` while the block runs. Raises `DataDirInUse` at once, never waits."""
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with ExitStack() as stack:
        try:
            stack.enter_context(hold_file(data_dir / "lock"))
        except FileInUse as holder:
            raise DataDirInUse(
                f"{data_dir} is in use by another Tapeout{holder}. "
                "Stop that one first, or give this one a data directory of its own with --data-dir."
            ) from holder
        yield


def _holder(descriptor: int) -> str:
    with suppress(ValueError, OSError):
        return f" (process {int(os.pread(descriptor, 32, 0))})"
    return ""
