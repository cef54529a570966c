"""What the database itself refuses: changed, replaced and late rows of the ledger."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from app.billing.accounts import AccountWriter
from app.billing.credits import add_lot
from app.billing.ledger import PROMOTIONAL_COST
from app.billing.rating import Settlement
from app.core import clock
from app.core.database import Database
from app.settings import Settings
from tests.app.billing.books import Books
from tests.app.billing.conftest import ORGANIZATION

TABLES = ("ledger_transaction", "ledger_entry", "seal", "sealed_transaction", "lot_use")
LATE = {
    "ledger_entry": "SELECT transaction_id, 'customer:org_9', 777, created_at FROM ledger_entry",
    "lot_use": "SELECT ledger_transaction_id, 'lot_9', 777 FROM lot_use",
    "unsealed_transaction": "SELECT id FROM ledger_transaction",
}


@pytest.fixture
async def books(
    settings: Settings,
    accounts: AccountWriter,
    settlement: Callable[..., Settlement],
    database: Database,
) -> AsyncIterator[Books]:
    """One request that used up credit, sealed."""
    async with database.write() as session:
        await add_lot(
            session,
            ORGANIZATION,
            "promotional",
            10**9,
            source="gift",
            currency="usd",
            from_account=PROMOTIONAL_COST,
        )
    books = Books(settings, accounts, settlement)
    await books.settle(settlement(books.new_request(clock.now())))
    assert books.seal() == 2
    yield books
    await books.close()


def rows_of(books: Books, table: str) -> list[dict[str, Any]]:
    with books.engine.begin() as connection:
        found = connection.execute(text(f"SELECT * FROM {table}"))  # noqa: S608
        return [dict(row) for row in found.mappings()]


def insert(books: Books, verb: str, table: str, row: dict[str, Any]) -> None:
    values = ", ".join(f":{name}" for name in row)
    with books.engine.begin() as connection:
        connection.execute(text(f"{verb} INTO {table} ({', '.join(row)}) VALUES ({values})"), row)


@pytest.mark.parametrize("table", TABLES)
def test_no_row_takes_the_place_of_another(books: Books, table: str) -> None:
    """By any of its unique keys. PostgreSQL knows no such statement but an update."""
    if books.engine.dialect.name != "sqlite":
        pytest.skip("INSERT OR REPLACE is SQLite's")
    with books.engine.begin() as connection:  # which would refuse it as well, now
        connection.execute(text(f"DROP TRIGGER IF EXISTS {table}_until_sealed"))
    before = rows_of(books, table)
    row = before[0]
    others = {name: 0 if isinstance(row[name], int) else f"{row[name]} other" for name in row}
    keys: dict[str, list[tuple[str, ...]]] = {
        "ledger_transaction": [("id",), ("idempotency_key",)],
        "ledger_entry": [("transaction_id", "account")],
        "seal": [("number",), ("sha256",)],
        "sealed_transaction": [("ledger_transaction_id",), ("seal_number", "position")],
        "lot_use": [("ledger_transaction_id", "lot_id")],
    }
    for key in keys[table]:
        for verb in ("INSERT OR REPLACE", "REPLACE"):
            with pytest.raises(IntegrityError, match="append-only"):
                insert(books, verb, table, {**others, **{name: row[name] for name in key}})
    with pytest.raises(IntegrityError, match="append-only"):
        insert(books, "INSERT OR REPLACE", table, {**others, "rowid": 1})
    assert rows_of(books, table) == before


@pytest.mark.parametrize("table", LATE)
def test_nothing_is_added_to_what_is_sealed(books: Books, table: str) -> None:
    before = rows_of(books, table)
    with pytest.raises(IntegrityError, match="seal"), books.engine.begin() as connection:
        connection.execute(text(f"INSERT INTO {table} {LATE[table]} LIMIT 1"))
    assert rows_of(books, table) == before
