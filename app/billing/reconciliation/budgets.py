"""What budgets say was spent in a day or month against the requests admitted in it."""

import time
from calendar import timegm
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, RowMapping, String, TextClause, bindparam, func, select, text

from app.billing.reconciliation.check import MAX_NAMED, Check, Difference, Subject
from app.metering.tables import UsageEvent

BUDGETS = Subject(
    name="budgets",
    title="Spent in budgets = requests",
    description="What budgets' days and months count as spent against the requests admitted in "
    "them, one budget after another. A request that came within a minute of midnight may count on "
    "either side.",
    left_label="Spent by budgets looked at",
    right_label="Their requests",
)
EDGE = timedelta(minutes=1)  # between a request's arrival and its hold
MAX_EVENTS = 1_000_000  # of the organization since the window began; beyond, it is left out
NUM_WINDOWS = 20  # looked at in one run at most
SECONDS = 1.0  # for them, and as much for those that were found last
RECENT = timedelta(days=32)


class BudgetWalk:
    """Goes through windows that began after their budget was set, in the last month."""

    def __init__(self) -> None:
        self._last = ""
        self.differing: list[str] = []  # windows that were found last

    def check(self, connection: Connection, now: datetime) -> Check:
        """Goes on where it stopped. What was found last is looked at again each time."""
        first = f"{now - RECENT:%Y-%m-%d}"
        again = _windows(connection, _AGAIN, {"first": first, "names": self.differing})
        after = {"first": first, "last": self._last, "most": NUM_WINDOWS}
        next_ones = _windows(connection, _NEXT, after)
        looked_at = dict(_in_time(connection, again))
        went_on = dict(_in_time(connection, next_ones))
        is_through = len(went_on) == len(next_ones) < NUM_WINDOWS
        self._last = "" if is_through else list(went_on)[-1]
        looked_at |= went_on
        found: list[Difference] = []
        left = right = num_windows = 0
        for name, bounds in looked_at.items():
            if bounds is None:
                continue
            num_windows += 1
            row = again.get(name) or next_ones[name]
            least, most = bounds
            posted = int(row["posted_nano"])
            nearest = min(max(posted, least), most)
            left, right = left + posted, right + nearest
            if posted != nearest:
                note = f"{row['scope']} {row['subject_name'] or row['subject']}".strip()
                found.append(Difference(name, posted, nearest, note))
        found_names = [difference.name for difference in found]
        not_reached = [name for name in again if name not in looked_at]
        self.differing = [*found_names, *not_reached][:MAX_NAMED]
        return BUDGETS.compared(left, right, found, note=f"{num_windows} windows looked at.")


def _in_time(
    connection: Connection, windows: dict[str, RowMapping]
) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """What each came to, until the time is used up; of the first one in any case."""
    ends_at = time.monotonic() + SECONDS
    for number, (name, row) in enumerate(windows.items()):
        if number and time.monotonic() > ends_at:
            return
        yield name, _spent(connection, row)


_WINDOWS = (
    "SELECT w.budget_id || ' ' || w.starts_on AS name, w.starts_on, w.posted_nano,"
    " b.organization_id, b.scope, b.subject, b.subject_name, b.period, b.created_at"
    " FROM budget_window w JOIN budget b ON b.id = w.budget_id WHERE w.starts_on >= :first"
)
_NAME = "w.budget_id || ' ' || w.starts_on"
_NEXT = text(f"{_WINDOWS} AND {_NAME} > :last ORDER BY {_NAME} LIMIT :most")
_AGAIN = text(f"{_WINDOWS} AND {_NAME} IN :names ORDER BY {_NAME}").bindparams(
    bindparam("names", type_=String, expanding=True)
)


def _windows(
    connection: Connection, query: TextClause, values: dict[str, Any]
) -> dict[str, RowMapping]:
    rows = connection.execute(query, values).mappings()
    return {row["name"]: row for row in rows}


def _spent(connection: Connection, row: RowMapping) -> tuple[int, int] | None:
    """At least and at most what the window's requests came to; None where it cannot be told."""
    start = datetime.strptime(row["starts_on"], "%Y-%m-%d").replace(tzinfo=UTC)
    if _instant(row["created_at"]) > start or _is_too_much(connection, row, start):
        return None
    end = start + timedelta(days=1)
    if row["period"] == "month":
        end = (start + timedelta(days=32)).replace(day=1)
    return (
        _admitted(connection, row, start + EDGE, end - EDGE),
        _admitted(connection, row, start - EDGE, end + EDGE),
    )


def _instant(stored: datetime | str) -> datetime:
    """SQLite keeps instants as text."""
    at = datetime.fromisoformat(stored) if isinstance(stored, str) else stored
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


def _is_too_much(connection: Connection, row: RowMapping, start: datetime) -> bool:
    num_requests = connection.scalar(
        text(
            "SELECT sum(h.quantity) FROM usage_series s JOIN usage_hour h"
            " ON h.series_id = s.id AND h.hour >= :hour"
            " WHERE s.organization_id = :organization AND s.dimension = 'request'"
        ),
        {"hour": timegm(start.timetuple()) // 3600, "organization": row["organization_id"]},
    )
    return int(num_requests or 0) > MAX_EVENTS


def _admitted(connection: Connection, row: RowMapping, start: datetime, end: datetime) -> int:
    query = select(func.sum(UsageEvent.amount_nano)).where(
        UsageEvent.organization_id == row["organization_id"],
        UsageEvent.finished_at >= start,
        UsageEvent.started_at >= start,
        UsageEvent.started_at < end,
    )
    if row["scope"] == "key":
        query = query.where(UsageEvent.api_key_id == row["subject"])
    elif row["scope"] == "model":
        query = query.where(UsageEvent.endpoint_name == row["subject"])
    return int(connection.scalar(query) or 0)
