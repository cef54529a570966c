"""The box under test, its clock and its two judges, which look after every step."""

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
)
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.payments.invoices import MonthCloser
from app.billing.prices import PriceTable, Rates
from app.billing.rating import Settlement
from app.billing.signing import SigningKey, open_key
from app.core.database import Database, create_writer_engine
from app.metering.journal import Journal
from app.metering.records import AdmitRecord, Tally, Usage
from tests.evidence import model
from tests.evidence.invariants import problems

ORGANIZATIONS = ("org_a", "org_b", "org_c")
KEYS = ("key_1", "key_2")
ENDPOINTS = ("tiny", "large")
MEMORY = Path("/dev/shm")
START = datetime(2026, 11, 23, 12, tzinfo=UTC)

organizations = st.sampled_from(ORGANIZATIONS)
small = st.integers(0, 20)
amounts = st.integers(1, 3_000)


class Running:
    """One request on its way, as its caller and its journal see it."""

    def __init__(self, admitted: AdmitRecord, rates: Rates, max_tokens: int) -> None:
        self.tally = Tally(admitted)
        self.rates = rates
        self.tokens_left = [max_tokens] * admitted.num_choices
        self.delivered = 0


class Base(RuleBasedStateMachine):
    """One box with three organizations."""

    template: ClassVar[Path]
    set_clock: ClassVar[Callable[[datetime], None]]

    def __init__(self) -> None:
        super().__init__()
        # In memory where there is such a place: it is not the disk that is tested here.
        self.directory = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        path = self.directory / "books.db"
        shutil.copy(self.template, path)
        self.loop = asyncio.new_event_loop()
        self.engine = create_writer_engine(f"sqlite:///{path}")
        self.database = Database(f"sqlite+aiosqlite:///{path}")
        self.now = START
        self.set_clock(self.now)
        self.accounts: dict[str, model.Account] = {}
        self.running: dict[str, Running] = {}
        self.pending: dict[str, Settlement] = {}
        self.delivered: dict[str, int] = {}  # tokens, of every request that ever ran
        self.num_made = 0
        self.prices = PriceTable(self.database)
        self.do(self.prices.start())
        self.key: SigningKey = open_key(self.directory / "key.pem")
        self.closer = MonthCloser(self.database, "usd", has_stripe=False)
        self._open_journal(0)

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def write(self, work: Callable[[AsyncSession], Any]) -> Any:
        async def transaction() -> Any:
            async with self.database.write() as session:
                return await work(session)

        return self.do(transaction())

    def _open_journal(self, number: int) -> list[Usage]:
        directory = self.directory / f"journal{number}"
        directory.mkdir(exist_ok=True)
        self.journal_number = number
        self.journal = Journal(directory, segment_bytes=2_000)
        return self.do(self.journal.start())

    def teardown(self) -> None:
        self.do(self.journal.close())
        self.do(self.prices.close())
        self.do(self.database.close())
        self.engine.dispose()
        self.do(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.directory)

    def account(self, name: str) -> model.Account:
        return self.accounts.setdefault(name, model.Account())

    def name(self, prefix: str) -> str:
        self.num_made += 1
        return f"{prefix}_{self.num_made}"

    # --- judges ---------------------------------------------------------------------------

    @invariant()
    def books_are_sound(self) -> None:
        with self.engine.begin() as connection:
            found = problems(connection)
        assert not found, "\n".join(found)

    @invariant()
    def books_are_as_expected(self) -> None:
        with self.engine.begin() as connection:

            def rows(query: str) -> list[Any]:
                return list(connection.exec_driver_sql(query).all())

            balances = {
                row[0]: row[1:]
                for row in rows(
                    "SELECT organization_id, posted_nano, held_nano, forced_nano"
                    " FROM account_balance"
                )
            }
            lots = dict(tuple(row) for row in rows("SELECT source, remaining_nano FROM credit_lot"))
            windows = {
                (row[0], row[1]): (row[2], row[3])
                for row in rows(
                    "SELECT budget_id, starts_on, posted_nano, held_nano FROM budget_window"
                )
            }
            recorded = dict(
                tuple(row)
                for row in rows(
                    "SELECT e.request_id, l.quantity FROM usage_event e JOIN usage_line l"
                    " ON l.event_id = e.id WHERE l.dimension = 'output'"
                )
            )
            settled = {row[0] for row in rows("SELECT request_id FROM usage_event")}
        expected = {
            name: (account.posted, account.held, account.forced)
            for name, account in self.accounts.items()
        }
        assert {name: tuple(row) for name, row in balances.items()} == expected
        for account in self.accounts.values():
            for lot in account.lots.values():
                assert lots[lot.id] == lot.remaining, lot
            for at, window in account.windows.items():
                if window.posted or window.held:
                    assert windows[at] == (window.posted, window.held)
        for request_id, num_tokens in self.delivered.items():
            if request_id in settled:
                assert recorded.get(request_id, 0) == num_tokens, (
                    "delivered is not what is on record"
                )

    @invariant()
    def months_are_invoiced_as_billed(self) -> None:
        with self.engine.begin() as connection:
            invoices = connection.exec_driver_sql(
                "SELECT organization_id, period, usage_nano FROM invoice"
            ).all()
        for organization, period, usage_nano in invoices:
            assert usage_nano == self.accounts[organization].billed[period]
