"""The SQL of money, for both databases.

Owns the text of what runs for every request. It is executed without SQLAlchemy's own work per
statement and row, which costs several times what the database's does.
"""

from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import (
    Connection,
    Dialect,
    Select,
    bindparam,
    insert,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from app.billing.tables import (
    MAX_BALANCE_NANO,
    AccountBalance,
    Hold,
    LedgerEntry,
    LedgerTransaction,
)
from app.core.database import Base
from app.metering.tables import UsageEvent, UsageLine

_balance = Base.metadata.tables[AccountBalance.__tablename__]
_hold = Base.metadata.tables[Hold.__tablename__]
_event = Base.metadata.tables[UsageEvent.__tablename__]
_line = Base.metadata.tables[UsageLine.__tablename__]
_transaction = Base.metadata.tables[LedgerTransaction.__tablename__]
_entry = Base.metadata.tables[LedgerEntry.__tablename__]

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
            _balance.c.posted_nano - _balance.c.held_nano
            >= bindparam("amount") - _balance.c.credit_limit_nano,
        ),
    )
    .values(held_nano=_balance.c.held_nano + bindparam("amount"))
)
_MOVE = (
    update(_balance)
    .where(_balance.c.organization_id == bindparam("organization"))
    .values(
        posted_nano=_balance.c.posted_nano - bindparam("spent"),
        held_nano=_balance.c.held_nano - bindparam("released"),
    )
)
STANDING = select(
    _balance.c.posted_nano, _balance.c.held_nano, _balance.c.credit_limit_nano, _balance.c.currency
).where(_balance.c.organization_id == bindparam("organization"))
RECORDED: Select[str] = select(_event.c.id).where(
    _event.c.id.in_(bindparam("event_ids", expanding=True))
)


class Statements:
    """The hot statements as one dialect's SQL, to be executed without SQLAlchemy's own work per
    statement and row, which costs several times what the database's does."""

    def __init__(self, dialect: Dialect) -> None:
        self.is_sqlite = dialect.name == "sqlite"
        # Both drivers take named parameters, so rows are dictionaries for either.
        naming = sqlite.dialect(paramstyle="named") if self.is_sqlite else dialect
        self.take = str(_TAKE.compile(dialect=naming))
        self.move = str(_MOVE.compile(dialect=naming))
        self.insert_hold = str(insert(_hold).compile(dialect=naming))
        self.insert_event = str(insert(_event).compile(dialect=naming))
        self.insert_line = str(insert(_line).compile(dialect=naming))
        self.insert_transaction = str(insert(_transaction).compile(dialect=naming))
        self.insert_entry = str(insert(_entry).compile(dialect=naming))
        one_of = "IN (SELECT value FROM json_each(:ids))" if self.is_sqlite else "= ANY(%(ids)s)"
        self.remove_holds = (
            f"DELETE FROM hold WHERE request_id {one_of} "  # noqa: S608 - nothing of a caller's
            "RETURNING organization_id, amount_nano"
        )

    def ids(self, ids: list[str]) -> dict[str, Any]:
        return {"ids": msgspec.json.encode(ids).decode() if self.is_sqlite else ids}

    def instant(self, at: datetime) -> Any:
        """As `UtcDateTime` stores it."""
        return at.strftime("%Y-%m-%d %H:%M:%S.%f") if self.is_sqlite else at


_compiled: dict[str, Statements] = {}


def statements_of(connection: Connection) -> Statements:
    """Made once for each kind of database."""
    name = connection.dialect.name
    if name not in _compiled:
        _compiled[name] = Statements(connection.dialect)
    return _compiled[name]


def open_statement(dialect_name: str, organization_id: str, currency: str) -> Any:
    """Inserts an account without limit unless it exists."""
    dialect = sqlite if dialect_name == "sqlite" else postgresql
    return (
        dialect.insert(_balance)
        .values(organization_id=organization_id, currency=currency, posted_nano=0, held_nano=0)
        .on_conflict_do_nothing()
    )


def orphans_statement(journal_id: str) -> Select[str]:
    """Requests for which this journal's processes hold money."""
    return select(_hold.c.request_id).where(_hold.c.journal_id == journal_id)
