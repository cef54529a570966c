"""A box's records on a test's database: requests settled, sealed and moved to the archive."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from sqlalchemy import Connection, Engine, text

from app.billing.accounts import AccountWriter
from app.billing.archiving import archive_before
from app.billing.rating import Settlement
from app.billing.records import Records
from app.billing.seal_check import ChainCheck, check_chain
from app.billing.sealing import seal_all
from app.billing.signing import SigningKey, open_key
from app.billing.usage_archive import UsageArchive
from app.core.database import create_writer_engine
from app.core.ids import id_with
from app.settings import Settings


class Books:
    """Blocking, but for settling."""

    def __init__(
        self, settings: Settings, accounts: AccountWriter, settlement: Callable[..., Settlement]
    ) -> None:
        self.accounts = accounts
        self.settlement = settlement
        self.key: SigningKey = open_key(Path(settings.data_dir) / "keys" / "receipts.key")
        self.archive = UsageArchive(Path(settings.data_dir) / "archive" / "usage")
        self.engine: Engine = create_writer_engine(settings.sync_database_url)
        self.records = Records(settings.sync_database_url, self.archive, self.key.public_hex)
        self._count = 0

    def new_request(self, at: datetime) -> str:
        self._count += 1
        return id_with("req", int(at.timestamp() * 1000), self._count.to_bytes(10))

    async def settle(self, *settlements: Settlement) -> list[str]:
        """In one batch."""
        for settled in settlements:
            self.accounts.settle(settled)
        await self.accounts.flush()
        return [settled.request_id for settled in settlements]

    def seal(self) -> int:
        return seal_all(self.engine, self.key)

    def archive_before(self, before: datetime) -> int:
        return archive_before(self.engine, self.archive, before)

    def check(self, **options: int) -> ChainCheck:
        return check_chain(self.engine, self.archive, self.key.public_hex, **options)

    def count(self, table: str) -> int:
        with self.engine.begin() as connection:
            return connection.scalar(text(f"SELECT count(*) FROM {table}"))  # noqa: S608

    def tamper(self, statement: str) -> None:
        """As somebody with the database's password might: past the triggers."""
        with self.engine.begin() as connection:
            _drop_triggers(connection)
            assert connection.execute(text(statement)).rowcount == 1

    async def close(self) -> None:
        await self.records.close()
        self.engine.dispose()


def _drop_triggers(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        names = connection.scalars(
            text("SELECT DISTINCT event_object_table FROM information_schema.triggers")
        )
        for name in list(names):
            connection.execute(text(f"ALTER TABLE {name} DISABLE TRIGGER USER"))
        return
    names = connection.scalars(text("SELECT name FROM sqlite_master WHERE type = 'trigger'"))
    for name in list(names):
        connection.execute(text(f"DROP TRIGGER {name}"))
