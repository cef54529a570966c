"""Holds: money set aside before a request runs, many at a time, and given back.

Owns the order in which accounts and budgets are asked; the SQL is in `statements.py`. Runs on a
connection of the account writer's thread, in a transaction that the caller begins and commits.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection

from app.billing.budget_holds import (
    BudgetRefusal,
    Budgets,
    Wanted,
    Window,
    organizations_with_budgets,
    read_budgets,
    release_windows,
)
from app.billing.statements import (
    STANDING,
    open_statement,
    orphans_statement,
    statements_of,
)
from app.billing.tables import MAX_BALANCE_NANO
from app.core import clock


class HoldRequest(NamedTuple):
    """Money to set aside for one request."""

    request_id: str
    organization_id: str
    amount_nano: int
    api_key_id: str = ""
    endpoint_name: str = ""

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.request_id, self.amount_nano, self.api_key_id, self.endpoint_name)


class Standing(NamedTuple):
    """An account as it was when it could not give what was asked. Under a limit, `posted_nano` is
    without credit whose time is over."""

    posted_nano: int
    held_nano: int
    credit_limit_nano: int | None
    currency: str

    @property
    def available_nano(self) -> int:
        return max(0, self.posted_nano - self.held_nano + (self.credit_limit_nano or 0))

    @property
    def room_nano(self) -> int:
        """How much more can be held before the account could not be counted in 64 bits."""
        return MAX_BALANCE_NANO + self.posted_nano - self.held_nano


Refusal = Standing | BudgetRefusal


def take_holds(
    connection: Connection, holds: Sequence[HoldRequest], journal_id: str, currency: str
) -> dict[str, Refusal]:
    """Takes what each account and its budgets can give, in order; returns why others were
    refused, by request id."""
    by_organization: dict[str, list[HoldRequest]] = defaultdict(list)
    for hold in holds:
        by_organization[hold.organization_id].append(hold)
    at = clock.now()
    limited = organizations_with_budgets(connection, list(by_organization), at)
    refused: dict[str, Refusal] = {}
    for organization_id in sorted(by_organization):  # one order, so that no two writers deadlock
        wanted = by_organization[organization_id]
        budgets = Budgets([])
        if organization_id in limited:
            _lock(connection, organization_id, currency)
            budgets = read_budgets(connection, organization_id, at)
        refused |= _take_of_one(connection, wanted, budgets, currency)
        budgets.write(connection, organization_id)
    _record(connection, [h for h in holds if h.request_id not in refused], journal_id)
    return refused


def _take_of_one(
    connection: Connection, wanted: list[HoldRequest], budgets: Budgets, currency: str
) -> dict[str, Refusal]:
    """Of one organization: all at once where everything fits, else one by one."""
    organization_id = wanted[0].organization_id
    total_nano = sum(hold.amount_nano for hold in wanted)
    if budgets.is_empty and _take(connection, organization_id, total_nano):
        return {}
    _open(connection, organization_id, currency)
    refused: dict[str, Refusal] = {}
    short: list[HoldRequest] = []
    for hold in wanted:
        window = budgets.refusing(hold.wanted)
        if window is not None:
            refused[hold.request_id] = _budget_refusal(window, currency)
        elif _take(connection, organization_id, hold.amount_nano):
            budgets.take(hold.wanted)
        else:
            short.append(hold)
    if short:
        asked = {"organization": organization_id, "now": clock.now()}
        standing = Standing(*connection.execute(STANDING, asked).one())
        refused |= {hold.request_id: standing for hold in short}
    return refused


def _budget_refusal(window: Window, currency: str) -> BudgetRefusal:
    return BudgetRefusal(
        window.scope,
        window.subject_name or window.subject,
        window.period,
        window.starts_on,
        window.limit_nano,
        window.posted_nano,
        window.held_nano,
        window.left_nano,
        currency,
    )


def _record(connection: Connection, taken: Sequence[HoldRequest], journal_id: str) -> None:
    if not taken:
        return
    sql = statements_of(connection)
    now = sql.instant(clock.now())
    rows = [
        {
            "request_id": hold.request_id,
            "organization_id": hold.organization_id,
            "journal_id": journal_id,
            "amount_nano": hold.amount_nano,
            "created_at": now,
        }
        for hold in taken
    ]
    connection.exec_driver_sql(sql.insert["hold"], rows)


def _take(connection: Connection, organization_id: str, amount_nano: int) -> bool:
    if amount_nano > MAX_BALANCE_NANO:  # of many holds at once
        return False
    sql = statements_of(connection)
    row = {
        "organization": organization_id,
        "amount": amount_nano,
        "now": sql.instant(clock.now()),
    }
    return connection.exec_driver_sql(sql.take, row).rowcount == 1


def _open(connection: Connection, organization_id: str, currency: str) -> None:
    """The account, without limit if this is the organization's first request."""
    connection.execute(open_statement(connection.dialect.name, organization_id, currency))


def _lock(connection: Connection, organization_id: str, currency: str) -> None:
    _open(connection, organization_id, currency)
    sql = statements_of(connection)
    connection.exec_driver_sql(sql.lock_accounts, sql.ids([organization_id]))


def release_holds(connection: Connection, request_ids: list[str]) -> dict[str, int]:
    """Removes holds and returns what they held, by organization. The balances and the budgets'
    windows still have it."""
    released: dict[str, int] = defaultdict(int)
    sql = statements_of(connection)
    removed = connection.exec_driver_sql(sql.remove_holds, sql.ids(request_ids))
    for organization_id, amount in removed:
        released[organization_id] += amount
    return released


def void_holds(connection: Connection, request_ids: list[str]) -> None:
    """Gives back what was held for requests that never ran."""
    move_balances(connection, {}, release_holds(connection, request_ids))
    release_windows(connection, request_ids, {})


def orphaned_holds(connection: Connection, journal_id: str) -> list[str]:
    """Requests for which an earlier process of this journal still holds money."""
    return list(connection.scalars(orphans_statement(journal_id)))


def move_balances(connection: Connection, spent: dict[str, int], released: dict[str, int]) -> None:
    """Takes what was spent and frees what was held, by organization in one order."""
    for organization_id in sorted(spent.keys() | released.keys()):
        row = {
            "organization": organization_id,
            "spent": spent.get(organization_id, 0),
            "released": released.get(organization_id, 0),
        }
        connection.exec_driver_sql(statements_of(connection).move, row)
