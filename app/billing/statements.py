"""The SQL of money, for both databases.

Owns the text of what runs for every request. It is executed without SQLAlchemy's own work per
statement and row, which costs several times what the database's does.
"""

from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import (
    BigInteger,
    Connection,
    Dialect,
    Select,
    bindparam,
    case,
    cast,
    func,
    insert,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import sqlite

from app.billing.tables import (
    MAX_BALANCE_NANO,
    AccountBalance,
    BudgetWindow,
    CreditLot,
    Hold,
    HoldWindow,
    LedgerEntry,
    LedgerTransaction,
    LotUse,
    UnsealedTransaction,
)
from app.core.database import Base, upsert
from app.metering.tables import UsageEvent, UsageHour, UsageLine, UsageSeries


def _table(entity: type[Base]) -> Any:
    return Base.metadata.tables[entity.__tablename__]


_balance, _hold, _event = _table(AccountBalance), _table(Hold), _table(UsageEvent)
_window, _lot = _table(BudgetWindow), _table(CreditLot)

# What is left of credit whose time is over, which is in the balance until it is taken away.
_over_nano = func.coalesce(
    select(cast(func.sum(_lot.c.remaining_nano), BigInteger))
    .where(
        _lot.c.organization_id == bindparam("organization"),
        _lot.c.remaining_nano > literal_column("0"),
        _lot.c.expires_at <= bindparam("now"),
    )
    .scalar_subquery(),
    literal_column("0", BigInteger),
)
# One statement decides and takes: whatever runs beside it, nobody gets past the limit, nor past
# what can be counted. No side of a comparison leaves 64 bits.
_TAKE = (
    update(_balance)
    .where(
        _balance.c.organization_id == bindparam("organization"),
        _balance.c.posted_nano - _balance.c.held_nano
        >= bindparam("amount") - literal_column(str(MAX_BALANCE_NANO)),
        or_(
            _balance.c.credit_limit_nano.is_(None),
            _balance.c.posted_nano - _balance.c.held_nano - _over_nano
            >= bindparam("amount") - _balance.c.credit_limit_nano,
        ),
    )
    .values(held_nano=_balance.c.held_nano + bindparam("amount"))
)


def forced_after(posted: Any, held: Any, limit: Any) -> Any:
    """SQL of `forced_nano` once an account has these: what is still lacking, and never more than
    before, so that the constraint promises the whole limit again."""
    lacking, none = held - posted - limit, literal_column("0", BigInteger)
    return case(
        (_balance.c.forced_nano == none, none),  # first: the rest may be beyond 64 bits then
        (or_(limit.is_(None), held == none, lacking <= none), none),
        (lacking < _balance.c.forced_nano, lacking),
        else_=_balance.c.forced_nano,
    )


_posted_after = _balance.c.posted_nano - bindparam("spent")
_held_after = _balance.c.held_nano - bindparam("released")
_MOVE = (
    update(_balance)
    .where(_balance.c.organization_id == bindparam("organization"))
    .values(
        posted_nano=_posted_after,
        held_nano=_held_after,
        forced_nano=forced_after(_posted_after, _held_after, _balance.c.credit_limit_nano),
    )
)
_MOVE_WINDOW = (
    update(_window)
    .where(
        _window.c.budget_id == bindparam("budget"), _window.c.starts_on == bindparam("starts_on")
    )
    .values(
        posted_nano=_window.c.posted_nano + bindparam("spent"),
        held_nano=_window.c.held_nano - bindparam("released"),
    )
)
_DRAW = (
    update(_lot)
    .where(_lot.c.id == bindparam("lot"))
    .values(remaining_nano=_lot.c.remaining_nano - bindparam("amount"))
)
STANDING = select(
    case(
        (_balance.c.credit_limit_nano.is_(None), _balance.c.posted_nano),
        else_=_balance.c.posted_nano - _over_nano,
    ),
    _balance.c.held_nano,
    _balance.c.credit_limit_nano,
    _balance.c.currency,
).where(_balance.c.organization_id == bindparam("organization"))
RECORDED: Select[str] = select(_event.c.id).where(
    _event.c.id.in_(bindparam("event_ids", expanding=True))
)
# What rows are inserted into by the thousand, by the names used below.
_INSERTED = {
    "hold": Hold,
    "hold_window": HoldWindow,
    "event": UsageEvent,
    "line": UsageLine,
    "transaction": LedgerTransaction,
    "entry": LedgerEntry,
    "unsealed": UnsealedTransaction,
    "lot_use": LotUse,
}


class Statements:
    """The hot statements as one dialect's SQL, to be executed without SQLAlchemy's own work per
    statement and row."""

    def __init__(self, dialect: Dialect) -> None:
        self.is_sqlite = dialect.name == "sqlite"
        # Both drivers take named parameters, so rows are dictionaries for either.
        naming = sqlite.dialect(paramstyle="named") if self.is_sqlite else dialect

        def text(statement: Any) -> str:
            return str(statement.compile(dialect=naming))

        self.take, self.move = text(_TAKE), text(_MOVE)
        self.move_window, self.draw = text(_MOVE_WINDOW), text(_DRAW)
        self.insert = {name: text(insert(_table(entity))) for name, entity in _INSERTED.items()}
        self.name_series = text(upsert(dialect.name, _table(UsageSeries)).on_conflict_do_nothing())
        self.add_hour = text(_added_to_hour(upsert(dialect.name, _table(UsageHour))))
        self.hold_in_window = text(_held_in_window(upsert(dialect.name, _window)))
        one_of = "IN (SELECT value FROM json_each(:ids))" if self.is_sqlite else "= ANY(%(ids)s)"
        self.remove_holds = (
            f"DELETE FROM hold WHERE request_id {one_of} "  # noqa: S608 - nothing of a caller's
            "RETURNING organization_id, amount_nano"
        )
        self.remove_hold_windows = (
            f"DELETE FROM hold_window WHERE request_id {one_of} "  # noqa: S608
            "RETURNING request_id, budget_id, starts_on, amount_nano"
        )
        day, month, now = (
            f":{name}" if self.is_sqlite else f"%({name})s" for name in ("day", "month", "now")
        )
        # SQLite's transactions are alone from their start.
        lock = "" if self.is_sqlite else " FOR UPDATE"
        self.lock_accounts = (
            "SELECT organization_id, closed_until, currency, credit_limit_nano, posted_nano,"  # noqa: S608
            " held_nano FROM account_balance"
            f" WHERE organization_id {one_of} ORDER BY organization_id{lock}"
        )
        self.open_lots = (
            "SELECT organization_id, id, kind, remaining_nano,"  # noqa: S608
            f" expires_at IS NOT NULL AND expires_at <= {now} FROM credit_lot"
            f" WHERE organization_id {one_of} AND remaining_nano > 0 ORDER BY"
            " organization_id, priority, expires_at IS NULL, expires_at, created_at, id"
        )
        self.budgets = (
            "SELECT b.organization_id, b.id, b.scope, b.subject, b.subject_name, b.period,"  # noqa: S608
            " b.limit_nano, coalesce(w.posted_nano, 0), coalesce(w.held_nano, 0) FROM budget b"
            " LEFT JOIN budget_window w ON w.budget_id = b.id AND w.starts_on ="
            f" CASE b.period WHEN 'day' THEN {day} ELSE {month} END"
            f" WHERE b.organization_id {one_of} ORDER BY b.id"
        )

    def ids(self, ids: list[str]) -> dict[str, Any]:
        return {"ids": msgspec.json.encode(ids).decode() if self.is_sqlite else ids}

    def instant(self, at: datetime) -> Any:
        """As `UtcDateTime` stores it."""
        return at.strftime("%Y-%m-%d %H:%M:%S.%f") if self.is_sqlite else at


def _added_to_hour(statement: Any) -> Any:
    table, new = _table(UsageHour), statement.excluded
    return statement.on_conflict_do_update(
        index_elements=["series_id", "hour"],
        set_={
            name: table.c[name] + new[name] for name in ("quantity", "amount_nano", "saved_nano")
        },
    )


def _held_in_window(statement: Any) -> Any:
    """A window's first hold makes its row. All that is held fits under the budget's limit."""
    return statement.on_conflict_do_update(
        index_elements=["budget_id", "starts_on"],
        set_={
            "held_nano": _window.c.held_nano + statement.excluded.held_nano,
            "limit_nano": statement.excluded.limit_nano,
        },
    )


_compiled: dict[str, Statements] = {}


def statements_of(connection: Connection) -> Statements:
    """Made once for each kind of database."""
    name = connection.dialect.name
    if name not in _compiled:
        _compiled[name] = Statements(connection.dialect)
    return _compiled[name]


def open_statement(dialect_name: str, organization_id: str, currency: str) -> Any:
    """Inserts an account without limit unless it exists."""
    return (
        upsert(dialect_name, _balance)
        .values(
            organization_id=organization_id,
            currency=currency,
            posted_nano=0,
            held_nano=0,
            forced_nano=0,
        )
        .on_conflict_do_nothing()
    )


def orphans_statement(journal_id: str) -> Select[str]:
    """Requests for which this journal's processes hold money."""
    return select(_hold.c.request_id).where(_hold.c.journal_id == journal_id)
