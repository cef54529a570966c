"""One app process per data directory: an advisory lock that ends with the process, however it ends.

The lock file's content only tells a person who holds it; the kernel's lock is what counts.
"""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from app.core.errors import Conflict


class DataDirInUse(Conflict):
    """Another process runs on this data directory."""

    default_code = "data_dir_in_use"


@contextmanager
def hold_data_dir(data_dir: Path) -> Generator[None]:
    """Holds `data_dir` while the block runs. Raises `DataDirInUse` at once, never waits."""
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Never unlinked: a second process could then lock a new file beside the one still held.
    descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataDirInUse(_explanation(data_dir, descriptor)) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _explanation(data_dir: Path, descriptor: int) -> str:
    holder = ""
    with suppress(ValueError, OSError):
        holder = f" (process {int(os.pread(descriptor, 32, 0))})"
    return (
        f"{data_dir} is in use by another Tapeout{holder}. "
        "Stop that one first, or give this one a data directory of its own with --data-dir."
    )
