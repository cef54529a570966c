"""Books with some of everything in them, a comparison of them, and ways to spoil them."""

from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import text, update

from app.billing.accounts import AccountWriter
from app.billing.budgets import set_budget
from app.billing.credits import add_lot, take_back
from app.billing.ledger import PROMOTIONAL_COST, STRIPE_CLEARING
from app.billing.rating import Settlement
from app.billing.reconciliation import budgets
from app.billing.reconciliation.check import Check
from app.billing.reconciliation.engines import EngineState
from app.billing.reconciliation.journal import JournalState
from app.billing.reconciliation.reconciler import Reconciler, Sources
from app.billing.sealing import Sealer
from app.billing.signing import SigningKey
from app.billing.tables import Budget
from app.billing.usage_archive import UsageArchive
from app.core import clock
from app.core.database import Database
from app.settings import Settings
from tests.app.billing.conftest import ORGANIZATION

OPERATOR = "org_operator"
OTHER = "org_2"
DAY = timedelta(days=1)
APPEND_ONLY = ("ledger_transaction", "ledger_entry", "seal", "sealed_transaction", "lot_use")


class Books:
    """The box's books. `state` and `engines` are what its journal and workers say."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self._url = settings.sync_database_url
        self._archive_dir = settings.data_dir / "archive"
        self.state = JournalState(num_admitted=0, num_settled=0, num_open=0)
        self.key = SigningKey(Ed25519PrivateKey.generate())
        self.sealer = Sealer(settings.sync_database_url, self.key)
        self.engines: Sequence[EngineState] = ()
        self.reconcilers: list[Reconciler] = []
        self.reconciler = self.anew()

    def anew(self) -> Reconciler:
        """That of a process that has just started."""
        made = Reconciler(
            self.database,
            self._url,
            Sources(lambda: self.state, lambda: self.engines),
            organization_id=OPERATOR,
            longest_request_ms=720_000,
            detail_days=62,
            archive=UsageArchive(self._archive_dir),
            public_key=self.key.public_hex,
        )
        self.reconcilers.append(made)
        return made

    async def compare(self) -> dict[str, Check]:
        return {check.name: check for check in (await self.reconciler.run()).checks}

    async def differing(self) -> dict[str, list[str]]:
        """The names of what differs, by check."""
        return {
            name: [difference.name for difference in check.differences]
            for name, check in (await self.compare()).items()
            if not check.is_clean
        }

    async def spoil(self, statement: str, **values: Any) -> None:
        """Changes the database behind everybody's back: triggers and constraints off."""
        async with self.database.write() as session:
            if session.get_bind().dialect.name == "sqlite":
                rows = await session.execute(
                    text("SELECT name FROM sqlite_master WHERE type = 'trigger'")
                )
                for (name,) in rows.all():
                    await session.execute(text(f"DROP TRIGGER {name}"))
                await session.execute(text("PRAGMA ignore_check_constraints = ON"))
            else:
                for table in APPEND_ONLY:
                    await session.execute(text(f"ALTER TABLE {table} DISABLE TRIGGER USER"))
            result = await session.execute(text(statement), values)
            assert result.rowcount, "nothing was spoilt"  # type: ignore[attr-defined]

    async def scalar(self, query: str, **values: Any) -> Any:
        async with self.database.read() as session:
            return await session.scalar(text(query), values)


@pytest.fixture
async def books(
    database: Database,
    settings: Settings,
    accounts: AccountWriter,
    settlement: Callable[..., Settlement],
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Books]:
    """Two organizations, one with credit of both kinds and budgets; six requests, of which one
    is waived; and one hold."""
    monkeypatch.setattr(budgets, "EDGE", timedelta(0))  # as far from midnight as at noon
    async with database.write() as session:
        for kind, source, from_account in (
            ("paid", "stripe:pi_1", STRIPE_CLEARING),
            ("promotional", "grant:1", PROMOTIONAL_COST),
        ):
            await add_lot(
                session,
                ORGANIZATION,
                kind,
                1_000_000,
                source=source,
                currency="usd",
                from_account=from_account,
            )
        await take_back(
            session,
            source="stripe:pi_1",
            amount_nano=100_000,
            key="refund:1",
            kind="refund",
            to_account=STRIPE_CLEARING,
        )
        for period in ("day", "month"):
            await set_budget(
                session,
                ORGANIZATION,
                scope="organization",
                subject="",
                subject_name="",
                period=period,
                limit_nano=10**12,
            )
    await books_long_before(database)
    for n in range(4):
        await accounts.hold(f"req_a{n}", ORGANIZATION, 1_000_000)
        accounts.settle(settlement(f"req_a{n}", outcome="failed" if n == 3 else "completed"))
    for n in range(2):
        accounts.settle(settlement(f"req_b{n}", organization_id=OTHER))
    await accounts.flush()
    await accounts.hold("req_running", ORGANIZATION, 777)
    made = Books(database, settings)
    yield made
    for reconciler in made.reconcilers:
        await reconciler.close()
    await made.sealer.close()


async def books_long_before(database: Database) -> None:
    """As if the budgets had been there since before their windows began."""
    async with database.write() as session:
        await session.execute(update(Budget).values(created_at=clock.now() - 40 * DAY))
