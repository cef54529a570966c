"""Months of usage, made quickly: settlements of chosen amounts posted by the real code at a chosen
time, and the closing of months."""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import count

import pytest
from sqlalchemy import Engine, func, select

from app.billing.credits import add_lot
from app.billing.ledger import OTHER_CLEARING, PROMOTIONAL_COST, credit_account, on_account
from app.billing.payments.cents import NANO_PER_CENT
from app.billing.payments.invoices import MonthCloser
from app.billing.payments.tables import Invoice, InvoiceLine
from app.billing.posting import post_settlements
from app.billing.rating import Line, Settlement
from app.billing.service import set_spending_limit
from app.billing.tables import AccountBalance, LedgerEntry
from app.core import clock
from app.core.database import Database, create_writer_engine
from app.metering.records import AdmitRecord, Usage
from app.organizations.tables import Organization

OPERATOR = "org_operator"
ORGANIZATION = "org_1"
CENT = NANO_PER_CENT

_numbers = count(1)


class Clock:
    """Stands still until it is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
        self.set(at)
        monkeypatch.setattr(clock, "now", lambda: self.at)

    def set(self, at: str) -> None:
        self.at = datetime.fromisoformat(at).replace(tzinfo=UTC)


class Months:
    """One box: its organizations, its clock, its usage and its invoices."""

    def __init__(self, database: Database, url: str, clock: Clock) -> None:
        self.database = database
        self.clock = clock
        self._engine: Engine = create_writer_engine(url)

    def close(self) -> None:
        self._engine.dispose()

    async def add_organizations(self, *names: str) -> None:
        async with self.database.write() as session:
            for name in (OPERATOR, *names):
                session.add(
                    Organization(
                        id=name,
                        name="default" if name == OPERATOR else name,
                        cache_salt=b"-",
                        is_operator=name == OPERATOR,
                        created_at=clock.now(),
                    )
                )

    def use(self, *amounts_nano: int, organization_id: str = ORGANIZATION) -> None:
        """One request of each amount, settled now."""
        self.settle([settlement(nano, organization_id) for nano in amounts_nano])

    def settle(self, settlements: Sequence[Settlement]) -> None:
        with self._engine.begin() as connection:
            post_settlements(connection, settlements)

    async def limit(self, limit_nano: int | None, organization_id: str = ORGANIZATION) -> None:
        async with self.database.write() as session:
            await set_spending_limit(session, organization_id, limit_nano, "usd")

    async def credit(
        self,
        amount_nano: int,
        kind: str = "promotional",
        organization_id: str = ORGANIZATION,
        expires_at: datetime | None = None,
    ) -> str:
        """Returns its source."""
        source = f"grant:{next(_numbers)}"
        async with self.database.write() as session:
            await add_lot(
                session,
                organization_id,
                kind,
                amount_nano,
                source=source,
                currency="usd",
                from_account=PROMOTIONAL_COST if kind == "promotional" else OTHER_CLEARING,
                expires_at=expires_at,
            )
        return source

    async def close_months(self, *, has_stripe: bool = False) -> int:
        return await MonthCloser(self.database, "usd", has_stripe=has_stripe).turn()

    async def invoices(self, organization_id: str = ORGANIZATION) -> list[Invoice]:
        async with self.database.read() as session:
            rows = await session.scalars(
                select(Invoice)
                .where(Invoice.organization_id == organization_id)
                .order_by(Invoice.period)
            )
            return list(rows)

    async def invoice(self, organization_id: str = ORGANIZATION) -> Invoice:
        """The only one."""
        (invoice,) = await self.invoices(organization_id)
        return invoice

    async def lines(self, invoice: Invoice) -> list[InvoiceLine]:
        async with self.database.read() as session:
            rows = await session.scalars(
                select(InvoiceLine)
                .where(InvoiceLine.invoice_id == invoice.id)
                .order_by(InvoiceLine.position)
            )
            return list(rows)

    async def account(self, organization_id: str = ORGANIZATION) -> AccountBalance:
        async with self.database.read() as session:
            return await session.get_one(AccountBalance, organization_id)

    async def entries(self, account: str) -> int:
        async with self.database.read() as session:
            total = await session.scalar(
                select(func.sum(LedgerEntry.amount_nano)).where(LedgerEntry.account == account)
            )
            return int(total or 0)

    async def check_books(self, organization_id: str = ORGANIZATION) -> None:
        """The balance is what the ledger says, and every invoice adds up to its lines."""
        accounts = [on_account(organization_id)]
        accounts += [credit_account(organization_id, kind) for kind in ("paid", "promotional")]
        total = sum([await self.entries(name) for name in accounts])
        assert (await self.account(organization_id)).posted_nano == total
        for invoice in await self.invoices(organization_id):
            lines = await self.lines(invoice)
            assert sum(line.amount_nano for line in lines) == invoice.usage_nano
            assert (
                invoice.usage_nano - invoice.credit_nano + invoice.carry_in_nano
                == invoice.due_cents * CENT + invoice.carry_out_nano
            )


def settlement(
    amount_nano: int,
    organization_id: str = ORGANIZATION,
    *,
    endpoint_name: str = "tiny",
    waived_nano: int = 0,
    request_id: str = "",
) -> Settlement:
    """A request that cost this, of one unit per nano-unit; `waived_nano` would have been more."""
    number = next(_numbers)
    at_ns = int(clock.now().timestamp()) * 10**9
    admitted = AdmitRecord(
        request_id=request_id or f"req_{number}",
        organization_id=organization_id,
        api_key_id="key_1",
        api_key_name="key",
        endpoint_name=endpoint_name,
        version_number=1,
        route="/v1/completions",
        kind="decoder",
        service_class="standard",
        price_book_id="pb_1",
        started_at_ns=at_ns - 10**6,
    )
    usage = Usage(
        admitted=admitted,
        outcome="completed",
        finish_reason="stop",
        input_tokens=0,
        cached_tokens=0,
        output_tokens=amount_nano,
        device_ms=0,
        finished_at_ns=at_ns,
        first_token_ns=None,
    )
    lines = [Line("output", amount_nano, 1, 1, amount_nano, "billed")]
    if waived_nano:
        lines.append(Line("input", waived_nano, 1, 1, 0, "waived"))
    return Settlement(usage=usage, currency="usd", lines=lines, amount_nano=amount_nano)
