"""Budgets while requests run: what each window has left, decided in order under a lock.

Runs in the account writer's transactions. What people do with budgets is in `budgets.py`.
"""

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection

from app.billing.statements import statements_of


class Wanted(NamedTuple):
    """What a budget has to know of a hold."""

    request_id: str
    amount_nano: int
    api_key_id: str
    endpoint_name: str


class Window:
    """One budget in its current day or month. The database's row follows at `write`."""

    def __init__(self, row: Sequence[Any], starts_on: str) -> None:
        _, self.budget_id, self.scope, self.subject, self.subject_name, self.period, *counts = row
        self.limit_nano, self.posted_nano, self.held_nano = (int(count) for count in counts)
        self.starts_on = starts_on
        self.taken_nano = 0  # of what is held, by this transaction

    @property
    def left_nano(self) -> int:
        return max(0, self.limit_nano - self.posted_nano - self.held_nano)

    def is_about(self, hold: Wanted) -> bool:
        if self.scope == "organization":
            return True
        return self.subject == (hold.api_key_id if self.scope == "key" else hold.endpoint_name)


class BudgetRefusal(NamedTuple):
    """A budget as it was when it could not give what was asked."""

    scope: str
    name: str
    period: str
    starts_on: str
    limit_nano: int
    posted_nano: int
    held_nano: int
    left_nano: int
    currency: str


class Budgets:
    """The windows of one organization, while its account is locked."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self._windows = windows
        self._rows: list[dict[str, Any]] = []

    @property
    def is_empty(self) -> bool:
        return not self._windows

    def refusing(self, hold: Wanted) -> Window | None:
        """The first budget that has no room for it."""
        return next(
            (w for w in self._windows if w.is_about(hold) and w.left_nano < hold.amount_nano), None
        )

    def take(self, hold: Wanted) -> None:
        """Counts a hold that nothing refuses in all the windows it is about."""
        for window in self._windows:
            if window.is_about(hold):
                window.held_nano += hold.amount_nano
                window.taken_nano += hold.amount_nano
                self._rows.append(
                    {
                        "request_id": hold.request_id,
                        "budget_id": window.budget_id,
                        "starts_on": window.starts_on,
                        "amount_nano": hold.amount_nano,
                    }
                )

    def write(self, connection: Connection, organization_id: str) -> None:
        """Puts what was taken into the database, whose constraint has the last word."""
        sql = statements_of(connection)
        for window in self._windows:
            if window.taken_nano:
                row = {
                    "budget_id": window.budget_id,
                    "starts_on": window.starts_on,
                    "organization_id": organization_id,
                    "limit_nano": window.limit_nano,
                    "posted_nano": 0,
                    "held_nano": window.taken_nano,
                }
                connection.exec_driver_sql(sql.hold_in_window, row)
        if self._rows:
            connection.exec_driver_sql(sql.insert["hold_window"], self._rows)


def window_starts(period: str, at: datetime) -> str:
    """The first day (UTC) of the day or month that `at` falls in."""
    return at.strftime("%Y-%m-%d" if period == "day" else "%Y-%m-01")


def organizations_with_budgets(
    connection: Connection, organization_ids: list[str], at: datetime
) -> set[str]:
    """Of these organizations. One whose first budget is set at this moment may be missed once."""
    return {row[0] for row in _rows(connection, organization_ids, at)}


def read_budgets(connection: Connection, organization_id: str, at: datetime) -> Budgets:
    """To be called with the account locked: nobody else takes from its windows until then."""
    rows = _rows(connection, [organization_id], at)
    return Budgets([Window(row, window_starts(row[5], at)) for row in rows])


def _rows(connection: Connection, organization_ids: list[str], at: datetime) -> Sequence[Any]:
    sql = statements_of(connection)
    parameters = {
        **sql.ids(organization_ids),
        "day": window_starts("day", at),
        "month": window_starts("month", at),
    }
    return connection.exec_driver_sql(sql.budgets, parameters).all()


def release_windows(connection: Connection, request_ids: list[str], spent: dict[str, int]) -> None:
    """Ends these requests' holds in their windows; `spent` nano-units, by request, stay."""
    sql = statements_of(connection)
    removed = connection.exec_driver_sql(sql.remove_hold_windows, sql.ids(request_ids))
    moves: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for request_id, budget_id, starts_on, amount_nano in removed:
        move = moves[budget_id, starts_on]
        move[0] += spent.get(request_id, 0)
        move[1] += amount_nano
    for (budget_id, starts_on), (spent_nano, released_nano) in sorted(moves.items()):
        connection.exec_driver_sql(
            sql.move_window,
            {
                "budget": budget_id,
                "starts_on": starts_on,
                "spent": spent_nano,
                "released": released_nano,
            },
        )
