"""Time. Instants are aware UTC datetimes; durations come from a monotonic clock."""

import time
from datetime import UTC, datetime


def now() -> datetime:
    return datetime.now(UTC)


def in_utc(instant: datetime) -> datetime:
    """The same instant. Raises `ValueError` without a time zone, or outside the calendar."""
    if instant.tzinfo is None:
        raise ValueError("needs a time zone, such as Z")
    try:
        return instant.astimezone(UTC)
    except OverflowError:
        raise ValueError("is not within the years 1 to 9999") from None


def monotonic_ns() -> int:
    return time.monotonic_ns()
