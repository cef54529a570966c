"""Hours of usage against the ledger, by organization and month.

Owns running sums of the hours: those that are over are added up once.
"""

from collections import defaultdict

from sqlalchemy import Connection, text

from app.billing.reconciliation.check import Check, Subject, differing
from app.billing.reconciliation.dialects import join_in_order, month_of_hour
from app.billing.reconciliation.sums import LedgerTotals

HOURS = Subject(
    name="hours",
    title="Hourly usage = ledger",
    description="What usage came to, added up by the hour for people and invoices, against what "
    "the ledger took from their accounts. For each organization and month.",
    left_label="Usage by the hour",
    right_label="Taken in the ledger",
)
OPEN_HOURS = 2  # the last ones, which are read each time


class HourSums:
    """Amounts by `organization month`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._until = 0
        self._sums: dict[str, int] = defaultdict(int)

    def read(self, connection: Connection, hour: int) -> dict[str, int]:
        """All hours, of which those before `hour` will hardly change any more. What a clock that
        was ahead took for over is read anew."""
        closed = hour - OPEN_HOURS + 1
        if closed < self._until:
            self.reset()
        for name, nano in _sums(connection, self._until, closed).items():
            self._sums[name] += nano
        self._until = closed
        sums = self._sums.copy()
        for name, nano in _sums(connection, closed, None).items():
            sums[name] += nano
        return sums


def _sums(connection: Connection, first: int, end: int | None) -> dict[str, int]:
    """Of hours in [first, end), found series by series: the table's key begins with them."""
    month = month_of_hour(connection, "h.hour")
    bound = "" if end is None else " AND h.hour < :end"
    rows = connection.execute(
        text(
            f"SELECT s.organization_id, {month} AS month, sum(h.amount_nano)"  # noqa: S608
            f" FROM usage_series s {join_in_order(connection)} usage_hour h"
            f" ON h.series_id = s.id AND h.hour >= :first{bound}"
            " GROUP BY s.organization_id, month"
        ),
        {"first": first} | ({} if end is None else {"end": end}),
    )
    return {f"{organization} {month}": int(nano) for organization, month, nano in rows}


def check_hours(hours: dict[str, int], totals: LedgerTotals) -> Check:
    usage = totals.usage()
    return HOURS.compared(sum(hours.values()), sum(usage.values()), differing(hours, usage))
