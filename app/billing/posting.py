"""The two transactions of money: taking holds and settling requests, both many at a time.

Owns their order and the postings to the ledger; the SQL is in `statements.py`. Runs on a
connection of the account writer's thread, in a transaction that the caller begins and commits.
"""

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection

from app.billing.rating import Settlement
from app.billing.statements import (
    RECORDED,
    STANDING,
    Statements,
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


class Standing(NamedTuple):
    """An account as it was when it could not give what was asked."""

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


def take_holds(
    connection: Connection, holds: Sequence[HoldRequest], journal_id: str, currency: str
) -> dict[str, Standing]:
    """Takes what each account can give, in order; returns those refused, by request id."""
    refused: dict[str, Standing] = {}
    taken: list[HoldRequest] = []
    by_organization: dict[str, list[HoldRequest]] = defaultdict(list)
    for hold in holds:
        by_organization[hold.organization_id].append(hold)
    for organization_id in sorted(by_organization):  # one order, so that no two writers deadlock
        wanted = by_organization[organization_id]
        if _take(connection, organization_id, sum(hold.amount_nano for hold in wanted)):
            taken += wanted
            continue
        standing = _open_and_read(connection, organization_id, currency)
        for hold in wanted:
            if _take(connection, organization_id, hold.amount_nano):
                taken.append(hold)
            else:
                refused[hold.request_id] = standing
        if refused:
            standing = _open_and_read(connection, organization_id, currency)
            refused |= {h.request_id: standing for h in wanted if h.request_id in refused}
    if taken:
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
        connection.exec_driver_sql(sql.insert_hold, rows)
    return refused


def _take(connection: Connection, organization_id: str, amount_nano: int) -> bool:
    if amount_nano > MAX_BALANCE_NANO:  # of many holds at once
        return False
    row = {"organization": organization_id, "amount": amount_nano}
    return connection.exec_driver_sql(statements_of(connection).take, row).rowcount == 1


def _open_and_read(connection: Connection, organization_id: str, currency: str) -> Standing:
    """The account, opened without limit if this is the organization's first request."""
    connection.execute(open_statement(connection.dialect.name, organization_id, currency))
    row = connection.execute(STANDING, {"organization": organization_id}).one()
    return Standing(*row)


def post_settlements(connection: Connection, settlements: Sequence[Settlement]) -> None:
    """Writes events, lines and ledger, frees the holds and moves the balances.

    Raises `IntegrityError` when one of them is recorded already: see `unrecorded`.
    """
    sql = statements_of(connection)
    now = sql.instant(clock.now())
    events: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    transactions: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    spent: dict[str, int] = defaultdict(int)
    for settlement in settlements:
        events.append(_event_row(settlement, sql))
        lines += _line_rows(settlement)
        spent[settlement.usage.admitted.organization_id] += settlement.amount_nano
        if settlement.amount_nano:
            transaction, posted = _posting(settlement, now)
            transactions.append(transaction)
            entries += posted
    for statement, rows in (
        (sql.insert_event, events),
        (sql.insert_line, lines),
        (sql.insert_transaction, transactions),
        (sql.insert_entry, entries),
    ):
        if rows:
            connection.exec_driver_sql(statement, rows)
    released = release_holds(connection, [s.request_id for s in settlements])
    for organization_id, currency in {
        s.usage.admitted.organization_id: s.currency for s in settlements
    }.items():
        if organization_id not in released:  # held nothing, so may have no account either
            connection.execute(open_statement(connection.dialect.name, organization_id, currency))
    _move(connection, spent, released)


def release_holds(connection: Connection, request_ids: list[str]) -> dict[str, int]:
    """Removes holds and returns what they held, by organization. The balances still have it."""
    released: dict[str, int] = defaultdict(int)
    sql = statements_of(connection)
    removed = connection.exec_driver_sql(sql.remove_holds, sql.ids(request_ids))
    for organization_id, amount in removed:
        released[organization_id] += amount
    return released


def void_holds(connection: Connection, request_ids: list[str]) -> None:
    """Gives back what was held for requests that never ran."""
    _move(connection, {}, release_holds(connection, request_ids))


def orphaned_holds(connection: Connection, journal_id: str) -> list[str]:
    """Requests for which an earlier process of this journal still holds money."""
    return list(connection.scalars(orphans_statement(journal_id)))


def unrecorded(connection: Connection, settlements: Sequence[Settlement]) -> list[Settlement]:
    """Those that no earlier attempt has written yet."""
    event_ids = [settlement.event_id for settlement in settlements]
    recorded = set(connection.scalars(RECORDED, {"event_ids": event_ids}))
    fresh = {s.event_id: s for s in settlements if s.event_id not in recorded}
    return list(fresh.values())


def _move(connection: Connection, spent: dict[str, int], released: dict[str, int]) -> None:
    rows = [
        {
            "organization": organization_id,
            "spent": spent.get(organization_id, 0),
            "released": released.get(organization_id, 0),
        }
        for organization_id in sorted(spent.keys() | released.keys())
    ]
    for row in rows:
        connection.exec_driver_sql(statements_of(connection).move, row)


def _event_row(settlement: Settlement, sql: Statements) -> dict[str, Any]:
    usage = settlement.usage
    admitted = usage.admitted
    return {
        "id": settlement.event_id,
        "request_id": admitted.request_id,
        "organization_id": admitted.organization_id,
        "api_key_id": admitted.api_key_id,
        "api_key_name": admitted.api_key_name,
        "endpoint_name": admitted.endpoint_name,
        "version_number": admitted.version_number,
        "route": admitted.route,
        "service_class": admitted.service_class,
        "outcome": usage.outcome,
        "finish_reason": usage.finish_reason,
        "price_book_id": admitted.price_book_id,
        "currency": settlement.currency,
        "amount_nano": settlement.amount_nano,
        "started_at": sql.instant(_instant(admitted.started_at_ns)),
        "finished_at": sql.instant(_instant(usage.finished_at_ns)),
        "duration_ns": usage.finished_at_ns - admitted.started_at_ns,
        "first_token_ns": usage.first_token_ns,
    }


def _line_rows(settlement: Settlement) -> list[dict[str, Any]]:
    return [
        {
            "event_id": settlement.event_id,
            "dimension": line.dimension,
            "quantity": line.quantity,
            "price_nano": line.price_nano,
            "unit_scale": line.unit_scale,
            "amount_nano": line.amount_nano,
            "disposition": line.disposition,
        }
        for line in settlement.lines
    ]


def _posting(settlement: Settlement, now: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Usage takes from the customer what it adds to revenue. The transaction's id follows from
    the event's, so that posting twice is impossible twice over."""
    transaction_id = f"lt_{settlement.request_id.removeprefix('req_')}_{settlement.attempt}"
    organization_id = settlement.usage.admitted.organization_id
    transaction = {
        "id": transaction_id,
        "idempotency_key": f"usage:{settlement.event_id}",
        "kind": "usage",
        "currency": settlement.currency,
        "created_at": now,
    }
    amounts = {
        f"customer:{organization_id}": -settlement.amount_nano,
        "revenue": settlement.amount_nano,
    }
    return transaction, [
        {
            "transaction_id": transaction_id,
            "account": account,
            "amount_nano": amount,
            "created_at": now,
        }
        for account, amount in amounts.items()
    ]


def _instant(at_ns: int) -> datetime:
    """To the microsecond, without going through a float."""
    seconds, rest_ns = divmod(at_ns, 1_000_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest_ns // 1000)
