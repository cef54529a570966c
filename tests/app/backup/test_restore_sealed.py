"""A box with a past is restored: its transactions are sealed, and the database lets nobody add to
such; afterwards it does so again."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError

from app.backup.backup import take_backup
from app.backup.restore import restore_backup
from app.billing.accounts import AccountWriter
from app.billing.sealing import seal_all
from app.billing.signing import open_key
from app.core.database import create_writer_engine
from app.core.storage import Storage
from app.settings import Settings
from tests.app.billing.conftest import accounts, settlement  # noqa: F401


def triggers(connection: Connection) -> list[tuple[str, str]]:
    """Name and table of each that the schema has, and on PostgreSQL only those that are on."""
    query = (
        "SELECT name, tbl_name FROM sqlite_master WHERE type = 'trigger'"
        if connection.dialect.name == "sqlite"
        else "SELECT tgname, CAST(CAST(tgrelid AS regclass) AS text) FROM pg_trigger "
        "WHERE NOT tgisinternal AND tgenabled = 'O'"
    )
    return sorted((name, table) for name, table in connection.execute(text(query)))


async def test_a_sealed_box_comes_back(
    settings: Settings,
    accounts: AccountWriter,  # noqa: F811
    settlement: Callable[..., object],  # noqa: F811
    tmp_path: Path,
) -> None:
    storage = Storage(settings.data_dir)
    for number in range(5):
        accounts.settle(settlement(f"req_{number:03d}"))  # type: ignore[arg-type]
    await accounts.flush()
    source = create_writer_engine(settings.sync_database_url)
    assert await asyncio.to_thread(seal_all, source, open_key(storage.receipt_key)) >= 1
    accounts.settle(settlement("req_waits"))  # type: ignore[arg-type]
    await accounts.flush()
    take_backup(settings.data_dir, settings.sync_database_url, tmp_path / "backup")
    url = f"sqlite:///{tmp_path / 'new.db'}"
    restore_backup(tmp_path / "backup", tmp_path / "new", url)
    restored = create_writer_engine(url)
    try:
        with source.connect() as before, restored.connect() as after:
            for table in ("seal", "sealed_transaction", "unsealed_transaction", "ledger_entry"):
                query = text(f"SELECT count(*) FROM {table}")  # noqa: S608 - names of ours
                count = after.scalar(query)
                assert count == before.scalar(query), table
                assert count, table
            kept = triggers(after)
            assert any(table == "ledger_entry" for _, table in kept)
            if before.dialect.name == "sqlite":
                assert kept == triggers(before)
        with pytest.raises(IntegrityError, match="append-only"), restored.begin() as connection:
            connection.execute(text("DELETE FROM ledger_entry"))
        with pytest.raises(IntegrityError, match="waiting for its seal"), restored.begin() as one:
            one.execute(
                text(
                    "INSERT INTO ledger_entry (transaction_id, account, amount_nano, created_at) "
                    "SELECT ledger_transaction_id, 'x', 1, '2026-01-01' FROM sealed_transaction"
                )
            )
    finally:
        source.dispose()
        restored.dispose()
