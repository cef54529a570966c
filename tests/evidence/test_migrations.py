"""A box in the middle of its work, brought from the version before money to this one and back.

Everything is written as that version wrote it: rows of its tables, records of its journal.
"""

import asyncio
import struct
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from alembic import command
from sqlalchemy import Connection, Engine, MetaData, Table, make_url
from sqlalchemy.exc import DatabaseError, IntegrityError

from app.billing.sealing import seal_all
from app.billing.signing import open_key
from app.core.database import create_writer_engine
from app.core.migration import alembic_config, upgrade
from tests.evidence.box import Box
from tests.evidence.invariants import require_sound

BEFORE = "0003"
ORGANIZATIONS = ("org_1", "org_2")
START = datetime(2026, 11, 20, 22, 30, tzinfo=UTC)
PRICES = {"input": 100_000_000, "cached_input": 10_000_000, "output": 400_000_000} | {
    "request": 100_000_000
}
LEDGER = {
    "ledger_transaction": "id, idempotency_key, kind, currency, created_at",
    "ledger_entry": "transaction_id, account, amount_nano, created_at",
}
NUM_EVENTS = 40


@pytest.fixture
def engine(database_url: str, tmp_path: Path) -> Iterator[Engine]:
    """A database of the version before, with its rows."""
    if make_url(database_url).drivername == "sqlite":
        database_url = f"sqlite:///{tmp_path / 'old.db'}"
    engine = create_writer_engine(database_url)
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("DROP SCHEMA public CASCADE")
            connection.exec_driver_sql("CREATE SCHEMA public")
        command.upgrade(alembic_config(connection), BEFORE)
    with engine.begin() as connection:
        fill(connection)
    yield engine
    engine.dispose()


def fill(connection: Connection) -> None:
    """Settled requests of two organizations, a waived one, and what four running ones hold."""

    def insert(name: str, *rows: dict[str, Any]) -> None:
        table = Table(name, MetaData(), autoload_with=connection)
        for row in rows:
            connection.execute(table.insert(), row)

    insert(
        "price_book",
        {"id": "pb_1", "number": 1, "currency": "usd", "sha256": "0" * 64}
        | {"effective_at": START, "created_at": START},
    )
    for dimension, price_nano in PRICES.items():
        insert(
            "price_item",
            {"id": f"pi_{dimension}", "price_book_id": "pb_1", "endpoint_name": "*"}
            | {"dimension": dimension, "service_class": "standard"}
            | {"price_nano": price_nano, "unit_scale": 1_000_000},
        )
    owed = dict.fromkeys(ORGANIZATIONS, 0)
    for number in range(NUM_EVENTS):
        owed[ORGANIZATIONS[number % 2]] += _settled(insert, number)
    for name, limit_nano, held_nano in (("org_1", None, 30_000), ("org_2", 10_000_000, 10_000)):
        insert(
            "account_balance",
            {"organization_id": name, "currency": "usd", "posted_nano": -owed[name]}
            | {"held_nano": held_nano, "credit_limit_nano": limit_nano},
        )
    for request_id, name in HELD.items():
        insert(
            "hold",
            {"request_id": request_id, "organization_id": name, "journal_id": "jnl_old"}
            | {"amount_nano": 10_000, "created_at": START},
        )


HELD = {"req_done": "org_1", "req_cut": "org_1", "req_never_ran": "org_1", "req_other": "org_2"}


def _settled(insert: Any, number: int) -> int:
    """As version 0003 settled a request: a transaction for each, none for what costs nothing."""
    request_id, organization_id = f"req_{number}", ORGANIZATIONS[number % 2]
    is_waived = number % 10 == 9
    at = START + timedelta(minutes=number * 7)
    quantities = {"input": 3 + number, "cached_input": number % 3, "output": 11 * number + 1}
    quantities["request"] = 1
    lines = [
        {"event_id": f"{request_id}:1", "dimension": name, "quantity": quantity}
        | {"price_nano": PRICES[name], "unit_scale": 1_000_000}
        | {"amount_nano": 0 if is_waived else quantity * PRICES[name] // 1_000_000}
        | {"disposition": "waived" if is_waived else "billed"}
        for name, quantity in quantities.items()
        if quantity
    ]
    amount_nano = sum(line["amount_nano"] for line in lines)
    insert(
        "usage_event",
        {"id": f"{request_id}:1", "request_id": request_id, "organization_id": organization_id}
        | {"api_key_id": f"key_{number % 3}", "api_key_name": "käy", "endpoint_name": "tiny"}
        | {"version_number": 1, "route": "/v1/completions", "service_class": "standard"}
        | {"outcome": "failed" if is_waived else "completed", "finish_reason": "stop"}
        | {"price_book_id": "pb_1", "currency": "usd", "amount_nano": amount_nano}
        | {"started_at": at, "finished_at": at + timedelta(seconds=2)}
        | {"duration_ns": 2 * 10**9, "first_token_ns": 10**6},
    )
    insert("usage_line", *lines)
    if amount_nano:
        posted_at = at + timedelta(seconds=3)
        insert(
            "ledger_transaction",
            {"id": f"lt_{number}_1", "idempotency_key": f"usage:{request_id}:1", "kind": "usage"}
            | {"currency": "usd", "created_at": posted_at},
        )
        accounts = {f"customer:{organization_id}": -amount_nano, "revenue": amount_nano}
        insert(
            "ledger_entry",
            *(
                {"transaction_id": f"lt_{number}_1", "account": account}
                | {"amount_nano": nano, "created_at": posted_at}
                for account, nano in accounts.items()
            ),
        )
    return amount_nano


def write_journal(directory: Path) -> None:
    """One request that is done, one cut short, one settled but not marked, one of another
    organization; and a hold of which the journal knows nothing."""
    directory.mkdir(parents=True)
    (directory / "id").write_text("jnl_old")
    at_ns = int(START.timestamp()) * 10**9
    records: list[list[Any]] = [
        [
            *("admit", name, organization_id, "key_0", "käy", "tiny", 1, "/v1/completions"),
            *("decoder", "standard", "pb_1", at_ns, 10, 1, 0),
        ]
        for name, organization_id in [*HELD.items(), ("req_0", "org_1")]
        if name != "req_never_ran"
    ]
    uses = [["req_done", 0, 5, 4, 900, "stop"], ["req_cut", 0, 3, 0, 900, None]]
    uses += [["req_other", 0, 2, 0, 900, "length"], ["req_0", 0, 1, 0, 900, "stop"]]
    records.append(["step", at_ns + 10**9, uses])
    data = b"tapeout-jnl1"
    for record in records:
        payload = msgspec.msgpack.encode(record)
        data += struct.pack("<II", len(payload), zlib.crc32(payload)) + payload
    (directory / "000000000001.journal").write_bytes(data + b"\x09torn")


def rows(engine: Engine, query: str) -> list[tuple[Any, ...]]:
    with engine.begin() as connection:
        return sorted(tuple(row) for row in connection.exec_driver_sql(query))


def ledger(engine: Engine) -> dict[str, list[tuple[Any, ...]]]:
    return {
        table: rows(engine, f"SELECT {columns} FROM {table}")  # noqa: S608 - constants
        for table, columns in LEDGER.items()
    }


async def recover(directory: Path, url: str) -> None:
    box = Box(directory, url)
    await box.start()
    await box.close()


def url_of(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def test_live_holds_and_an_unsettled_journal_survive_the_upgrade(
    engine: Engine, tmp_path: Path
) -> None:
    before = ledger(engine)
    balances = "SELECT organization_id, posted_nano, held_nano FROM account_balance"
    stood = rows(engine, balances)
    upgrade(engine)
    assert ledger(engine) == before
    assert rows(engine, balances) == stood
    require_sound(engine)
    assert len(rows(engine, "SELECT * FROM unsealed_transaction")) == NUM_EVENTS * 9 // 10

    write_journal(tmp_path / "data" / "journal")
    asyncio.run(recover(tmp_path / "data", url_of(engine)))
    require_sound(engine)
    after = {name: (posted, held) for name, posted, held in rows(engine, balances)}
    # 6 new and 4 cached input tokens and 5 of output; 10 of input and 2 of output; one request.
    done, other = 6 * 100 + 4 * 10 + 5 * 400 + 100, 10 * 100 + 2 * 400 + 100
    stood_at = {name: posted for name, posted, _ in stood}
    assert after == {
        "org_1": (stood_at["org_1"] - done, 0),
        "org_2": (stood_at["org_2"] - other, 0),
    }
    assert rows(engine, "SELECT request_id FROM hold") == []
    outcomes = dict(rows(engine, "SELECT request_id, outcome FROM usage_event"))
    assert [outcomes.get(name) for name in HELD] == ["completed", "lost", None, "completed"]
    assert len(outcomes) == NUM_EVENTS + 3, "req_0 was settled before, and is not again"
    assert [row for row in ledger(engine)["ledger_entry"] if row in before["ledger_entry"]] == (
        before["ledger_entry"]
    )

    key = open_key(tmp_path / "key.pem")
    assert seal_all(engine, key) == len(ledger(engine)["ledger_transaction"])
    assert rows(engine, "SELECT * FROM unsealed_transaction") == []
    require_sound(engine)


def test_the_old_ledger_can_no_longer_be_changed(engine: Engine) -> None:
    upgrade(engine)
    before = ledger(engine)
    for table in LEDGER:
        for change in ("UPDATE {} SET created_at = created_at", "DELETE FROM {}"):
            with pytest.raises((IntegrityError, DatabaseError), match="append-only"):
                rows(engine, change.format(table))
    assert ledger(engine) == before


def test_going_back_and_forth_leaves_the_books_as_they_were(engine: Engine) -> None:
    before = ledger(engine)
    events = "SELECT id, amount_nano, started_at, finished_at FROM usage_event"
    recorded = rows(engine, events)
    for _ in range(2):
        upgrade(engine)
        require_sound(engine)
        with engine.begin() as connection:
            command.downgrade(alembic_config(connection), BEFORE)
        assert ledger(engine) == before
        assert rows(engine, events) == recorded
    upgrade(engine)
    require_sound(engine)
