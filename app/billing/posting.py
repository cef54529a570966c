"""The settlement of requests: one transaction for many, idempotent by request.

Owns what a settlement writes and in which order; the SQL is in `statements.py`. Runs on a
connection of the account writer's thread, in a transaction that the caller begins and commits.
"""

from calendar import timegm
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection

from app.billing.budget_holds import release_windows
from app.billing.credits import Draw, LotState, draw, promised_to
from app.billing.currency import require_same
from app.billing.digests import ReceiptRecord, instant_text, merkle_root
from app.billing.holds import move_balances, release_holds
from app.billing.ledger import REVENUE, credit_account, on_account, posting_time
from app.billing.rating import Settlement
from app.billing.statements import RECORDED, Statements, open_statement, statements_of
from app.core import clock
from app.core.failpoints import failpoint
from app.metering.series import SeriesKey


def post_settlements(connection: Connection, settlements: Sequence[Settlement]) -> None:
    """Writes events, lines, ledger and hourly sums, uses credit up, frees the holds and moves
    balances and budgets.

    Raises `IntegrityError` when one of them is recorded already, see `unrecorded`, and
    `WrongCurrency` when one is not in its account's.
    """
    if not settlements:
        return
    by_organization: dict[str, list[Settlement]] = defaultdict(list)
    for settlement in settlements:
        by_organization[_organization_id(settlement)].append(settlement)
    accounts = _lock_accounts(connection, by_organization)
    lots = _open_lots(connection, list(by_organization))
    rows = _Rows(statements_of(connection))
    for organization_id, own in sorted(by_organization.items()):
        account, own_lots = accounts[organization_id], lots[organization_id]
        promised_nano = account.promised_of(own_lots)
        rows.add(own, posting_time(account.closed_until), own_lots, promised_nano)
    failpoint("posting.before_rows")
    rows.write(connection)
    failpoint("posting.after_rows")
    request_ids = [settlement.request_id for settlement in settlements]
    spent = {s.request_id: s.amount_nano for s in settlements}
    move_balances(
        connection,
        {name: sum(s.amount_nano for s in own) for name, own in by_organization.items()},
        release_holds(connection, request_ids),
    )
    failpoint("posting.after_balances")
    release_windows(connection, request_ids, spent)


def unrecorded(connection: Connection, settlements: Sequence[Settlement]) -> list[Settlement]:
    """Those that no earlier attempt has written yet."""
    event_ids = [settlement.event_id for settlement in settlements]
    recorded = set(connection.scalars(RECORDED, {"event_ids": event_ids}))
    fresh = {s.event_id: s for s in settlements if s.event_id not in recorded}
    return list(fresh.values())


class _Account(NamedTuple):
    """Until when its books are closed, and where it stands."""

    closed_until: datetime | None
    credit_limit_nano: int | None
    posted_nano: int
    held_nano: int

    def promised_of(self, lots: list[LotState]) -> int:
        in_lots_nano = sum(lot.remaining_nano for lot in lots)
        return promised_to(self.credit_limit_nano, self.posted_nano, self.held_nano, in_lots_nano)


def _lock_accounts(
    connection: Connection, by_organization: dict[str, list[Settlement]]
) -> dict[str, _Account]:
    """Each organization's. Accounts of those that have none, as they held nothing, are opened."""
    sql = statements_of(connection)
    ids = sql.ids(list(by_organization))
    rows = connection.exec_driver_sql(sql.lock_accounts, ids).all()
    missing = by_organization.keys() - {row[0] for row in rows}
    if missing:
        for name in sorted(missing):
            currency = by_organization[name][0].currency
            connection.execute(open_statement(connection.dialect.name, name, currency))
        rows = connection.exec_driver_sql(sql.lock_accounts, ids).all()
    accounts: dict[str, _Account] = {}
    for name, closed_until, currency, *standing in rows:
        for settlement in by_organization[name]:
            require_same(name, currency, settlement.currency)
        accounts[name] = _Account(_closed_until(closed_until), *standing)
    return accounts


def _closed_until(stored: Any) -> datetime | None:
    """SQLite keeps instants as text."""
    if isinstance(stored, str):
        stored = datetime.fromisoformat(stored)
    if stored is None or stored.tzinfo is not None:
        return stored
    return stored.replace(tzinfo=UTC)


def _open_lots(connection: Connection, organization_ids: list[str]) -> dict[str, list[LotState]]:
    sql = statements_of(connection)
    lots: dict[str, list[LotState]] = defaultdict(list)
    asked = {**sql.ids(organization_ids), "now": sql.instant(clock.now())}
    for name, *lot in connection.exec_driver_sql(sql.open_lots, asked):
        lots[name].append(LotState(*lot))
    return lots


class _Hour(NamedTuple):
    """What is added to one series in one hour."""

    series_id: str
    hour: int


class _Rows:
    """Everything that one transaction inserts."""

    def __init__(self, sql: Statements) -> None:
        self._sql = sql
        self._inserted: dict[str, list[dict[str, Any]]] = {
            # Queued before its entries: a trigger refuses those of what is sealed.
            name: []
            for name in ("transaction", "unsealed", "event", "line", "entry", "lot_use")
        }
        self._draws: list[Draw] = []
        self._series: dict[str, dict[str, Any]] = {}
        self._hours: dict[_Hour, list[int]] = defaultdict(lambda: [0, 0, 0])

    def add(
        self,
        settlements: list[Settlement],
        at: datetime,
        lots: list[LotState],
        promised_nano: int,
    ) -> None:
        """All of one organization in one ledger transaction, posted at `at`."""
        settlements = sorted(settlements, key=lambda settlement: settlement.event_id)
        root = merkle_root([receipt_of(settlement).canonical for settlement in settlements])
        # Its id follows from its content, so that posting twice is impossible twice over.
        transaction_id = f"lt_{root.hex()[:32]}"
        first, stored_at = settlements[0], self._sql.instant(at)
        self._inserted["transaction"].append(
            {
                "id": transaction_id,
                "idempotency_key": f"usage:{root.hex()}",
                "kind": "usage",
                "organization_id": _organization_id(first),
                "currency": first.currency,
                "content_sha256": root.hex(),
                "created_at": stored_at,
            }
        )
        self._inserted["unsealed"].append({"ledger_transaction_id": transaction_id})
        for settlement in settlements:
            self._inserted["event"].append(_event_row(settlement, transaction_id, self._sql))
            self._inserted["line"] += _line_rows(settlement)
            self._add_to_hours(settlement, timegm(at.utctimetuple()) // 3600)
        amount_nano = sum(settlement.amount_nano for settlement in settlements)
        draws = draw(lots, amount_nano, promised_nano)
        self._draws += draws
        self._inserted["lot_use"] += [
            {"ledger_transaction_id": transaction_id, "lot_id": lot_id, "amount_nano": nano}
            for lot_id, _, nano in draws
        ]
        self._inserted["entry"] += [
            {
                "transaction_id": transaction_id,
                "account": account,
                "amount_nano": amount_nano,
                "created_at": stored_at,
            }
            for account, amount_nano in _entries(settlements, draws).items()
        ]

    def _add_to_hours(self, settlement: Settlement, hour: int) -> None:
        admitted = settlement.usage.admitted
        for line in settlement.lines:
            key = SeriesKey(
                admitted.organization_id,
                admitted.api_key_id,
                admitted.endpoint_name,
                admitted.version_number,
                admitted.service_class,
                line.dimension,
                line.disposition,
                admitted.price_book_id,
                line.price_nano,
                line.unit_scale,
            )
            series_id = key.id
            if series_id not in self._series:
                names = type(key).__struct_fields__
                values = {name: getattr(key, name) for name in names}
                self._series[series_id] = {
                    "id": series_id,
                    "api_key_name": admitted.api_key_name,
                    **values,
                }
            sums = self._hours[_Hour(series_id, hour)]
            sums[0] += line.quantity
            sums[1] += line.amount_nano
            sums[2] += settlement.saved_nano if line.dimension == "cached_input" else 0

    def write(self, connection: Connection) -> None:
        sql = self._sql
        for name, rows in self._inserted.items():
            if rows:
                connection.exec_driver_sql(sql.insert[name], rows)
        for lot_id, _, amount_nano in self._draws:
            connection.exec_driver_sql(sql.draw, {"lot": lot_id, "amount": amount_nano})
        connection.exec_driver_sql(sql.name_series, list(self._series.values()))
        hours = [
            {
                "series_id": at.series_id,
                "hour": at.hour,
                "quantity": quantity,
                "amount_nano": amount_nano,
                "saved_nano": saved,
            }
            for at, (quantity, amount_nano, saved) in sorted(self._hours.items())
        ]
        connection.exec_driver_sql(sql.add_hour, hours)


def _entries(settlements: list[Settlement], draws: list[Draw]) -> dict[str, int]:
    """Usage takes from credit, and where there is none from the account, what it adds to
    revenue."""
    name = _organization_id(settlements[0])
    amount_nano = sum(settlement.amount_nano for settlement in settlements)
    entries = {on_account(name): -amount_nano, REVENUE: amount_nano}
    for _, kind, drawn_nano in draws:
        account = credit_account(name, kind)
        entries[account] = entries.get(account, 0) - drawn_nano
        entries[on_account(name)] += drawn_nano
    return entries


def receipt_of(settlement: Settlement) -> ReceiptRecord:
    """The receipt as it is hashed; the stored event gives the same, see `sealing.py`."""
    usage = settlement.usage
    admitted = usage.admitted
    return ReceiptRecord(
        event_id=settlement.event_id,
        organization_id=admitted.organization_id,
        api_key_id=admitted.api_key_id,
        api_key_name=admitted.api_key_name,
        endpoint_name=admitted.endpoint_name,
        version_number=admitted.version_number,
        route=admitted.route,
        service_class=admitted.service_class,
        outcome=usage.outcome,
        finish_reason=usage.finish_reason,
        price_book_id=admitted.price_book_id,
        currency=settlement.currency,
        amount_nano=settlement.amount_nano,
        started_at=instant_text(_instant(admitted.started_at_ns)),
        finished_at=instant_text(_instant(usage.finished_at_ns)),
        duration_ns=usage.finished_at_ns - admitted.started_at_ns,
        first_token_ns=usage.first_token_ns,
        lines=sorted(
            (
                line.dimension,
                line.quantity,
                line.price_nano,
                line.unit_scale,
                line.amount_nano,
                line.disposition,
            )
            for line in settlement.lines
        ),
    )


def _event_row(settlement: Settlement, transaction_id: str, sql: Statements) -> dict[str, Any]:
    usage = settlement.usage
    admitted = usage.admitted
    return {
        "id": settlement.event_id,
        "request_id": admitted.request_id,
        "ledger_transaction_id": transaction_id,
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


def _organization_id(settlement: Settlement) -> str:
    return settlement.usage.admitted.organization_id


def _instant(at_ns: int) -> datetime:
    """To the microsecond, without going through a float."""
    seconds, rest_ns = divmod(at_ns, 1_000_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest_ns // 1000)
