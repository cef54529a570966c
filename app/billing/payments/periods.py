"""Months, in UTC, as invoices count them."""

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


class Period(NamedTuple):
    """One month: from `start` until before `end`."""

    year: int
    month: int

    def __str__(self) -> str:
        return f"{self.year:04d}-{self.month:02d}"

    @property
    def start(self) -> datetime:
        return datetime(self.year, self.month, 1, tzinfo=UTC)

    @property
    def end(self) -> datetime:
        return self.next.start

    @property
    def next(self) -> "Period":
        return Period(self.year + self.month // 12, self.month % 12 + 1)

    @property
    def previous(self) -> "Period":
        return Period(self.year, self.month - 1) if self.month > 1 else Period(self.year - 1, 12)

    @property
    def hours(self) -> tuple[int, int]:
        """The first hour since 1970, and the first that is no longer in it."""
        return (self.start - EPOCH) // HOUR, (self.end - EPOCH) // HOUR


def period_of(at: datetime) -> Period:
    at = at.astimezone(UTC)
    return Period(at.year, at.month)


def period_named(text: str) -> Period:
    """The month that an invoice's `period` names."""
    year, month = text.split("-")
    return Period(int(year), int(month))
