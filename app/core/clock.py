"""Time. Instants are aware UTC datetimes; durations come from a monotonic clock."""

import time
from datetime import UTC, datetime


def now() -> datetime:
    return datetime.now(UTC)


def monotonic_ns() -> int:
    return time.monotonic_ns()
