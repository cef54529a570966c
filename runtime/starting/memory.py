"""What this process takes of the machine's memory."""

import ctypes
import gc
import os
from pathlib import Path


def resident_bytes() -> int:
    """What this process holds in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def settled_bytes() -> int:
    """`resident_bytes` after a load, once what it left over has gone back to the system: glibc
    keeps what is freed. Elsewhere that happens by itself or not at all."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return resident_bytes()
