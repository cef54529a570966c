"""Invoices: a month of an organization is closed, and what it used and owes is fixed.

Owns the closing and the invoice's sums. What is paid of it is `invoice_payments.py`'s, how Stripe
gets it `invoice_push.py`'s.

A month is closed in two steps, so that requests wait for neither: first its end becomes the
account's `closed_until`, under the account's lock, and nothing can be posted to the month any more;
then what cannot change is read at leisure. A crash in between leaves a closed month without its
invoice, which the next turn makes.
"""

import logging
from collections.abc import Iterator
from datetime import datetime, timedelta

from sqlalchemy import delete, func, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.credits import open_lots
from app.billing.ledger import lock_account
from app.billing.payments.cents import NANO_PER_CENT, write_cents
from app.billing.payments.invoice_payments import asked_for_nano
from app.billing.payments.month_usage import (
    MonthUsage,
    debited_since,
    first_period,
    month_usage,
    owed_for_usage_since,
)
from app.billing.payments.notices import alarm, end_alarm, notify
from app.billing.payments.periods import Period, period_named, period_of
from app.billing.payments.steady_clock import is_steady
from app.billing.payments.tables import Invoice, InvoiceLine
from app.billing.tables import AccountBalance
from app.core import clock
from app.core.database import Database
from app.core.failpoints import failpoint
from app.core.ids import new_id
from app.organizations.tables import Organization

SETTLING_TIME = timedelta(minutes=10)  # after a month's end, before it is closed
MIN_DUE_CENTS = 50  # Stripe takes no less; smaller amounts wait for the next invoice

MAX_ERROR_CHARS = 300

log = logging.getLogger(__name__)


class MonthCloser:
    """One per process. `turn` closes every month that is over, however many there are."""

    def __init__(self, database: Database, currency: str, *, has_stripe: bool) -> None:
        self._database = database
        self._currency = currency
        self._has_stripe = has_stripe
        self._closed: dict[str, Period] = {}  # up to which month this process is done

    async def turn(self) -> int:
        """Returns how many invoices it made. None while the clock cannot be trusted."""
        async with self._database.write() as session:
            if not await is_steady(session):
                return 0
        last = period_of(clock.now() - SETTLING_TIME).previous
        async with self._database.read() as session:
            organization_ids = (await session.scalars(select(AccountBalance.organization_id))).all()
        num_made = 0
        for organization_id in organization_ids:
            if self._closed.get(organization_id) == last:
                continue
            try:
                num_made += await self._close(organization_id, last)
            except IntegrityError:
                log.info("the invoice of %s is made by another at the same time", organization_id)
            except Exception:
                log.exception("the month of %s could not be closed", organization_id)
        return num_made

    async def _close(self, organization_id: str, last: Period) -> int:
        num_made = 0
        async with self._database.read() as session:
            first = await _first_open(session, organization_id, last)
        for period in _months(first, last):
            await self._freeze(organization_id, period)
            failpoint("invoices.after_freeze")
            before = await self._read(organization_id, period)
            if before is None or is_held_back(before):
                num_made += await self._make(organization_id, period)
                after = await self._read(organization_id, period)
                if after is not None and is_held_back(after):
                    return num_made  # no further month until a person has seen to this one
        self._closed[organization_id] = last
        return num_made

    async def _make(self, organization_id: str, period: Period) -> bool:
        """Whether there is one now that was not before, or was held back."""
        async with self._database.read() as session:
            usage = await month_usage(session, organization_id, period)
        async with self._database.write() as session:
            invoice = await self._invoice(session, organization_id, usage)
            failpoint("invoices.before_invoice_commit")
        failpoint("invoices.after_invoice_commit")
        return invoice is not None

    async def _freeze(self, organization_id: str, period: Period) -> None:
        """Nothing is posted to this month from here on."""
        async with self._database.write() as session:
            account = await lock_account(session, organization_id, self._currency)
            if account.closed_until is None or account.closed_until < period.end:
                account.closed_until = period.end
                await session.flush()
            failpoint("invoices.before_freeze_commit")

    async def _invoice(
        self, session: AsyncSession, organization_id: str, usage: MonthUsage
    ) -> Invoice | None:
        """The month's invoice, unless there is one, or nothing to put on it. One that differed
        and no longer does is made good."""
        account = await lock_account(session, organization_id, self._currency)
        before = await invoice_of(session, organization_id, usage.period)
        differs = usage.usage_nano != usage.posted_nano
        if before is not None and (differs or not is_held_back(before)):
            return None
        total_nano = await _total_nano(session, account, usage)
        # What a refund or a dispute of the month, or before, left owing is asked for without usage
        # too. One after it is the next month's, however often this month is looked at.
        since_nano = await debited_since(session, organization_id, usage.period)
        is_owing = _due_cents(account, total_nano - since_nano) > 0
        if not (usage.lines or differs or is_owing):
            return None
        invoice = before or await _new_invoice(session, organization_id, usage.period)
        _fill(invoice, account, usage, total_nano)
        session.add(invoice)
        await session.flush()
        await _put_lines(session, invoice, usage)
        if differs:
            invoice.state = "differs"
            await hold_back(session, invoice, _difference(usage))
            return invoice
        invoice.state = self._first_state(invoice)
        if before is not None:
            await release(session, invoice)
        if invoice.due_cents:
            await tell_of_invoice(session, invoice)
        return invoice

    def _first_state(self, invoice: Invoice) -> str:
        if not invoice.due_cents:
            return "settled"
        return "frozen" if self._has_stripe else "finalised"

    async def _read(self, organization_id: str, period: Period) -> Invoice | None:
        async with self._database.read() as session:
            return await invoice_of(session, organization_id, period)


def is_held_back(invoice: Invoice) -> bool:
    """Because its lines are not what the ledger took."""
    return invoice.state == "differs" and invoice.stripe_invoice_id is None


async def invoice_of(session: AsyncSession, organization_id: str, period: Period) -> Invoice | None:
    return await session.scalar(
        select(Invoice)
        .where(Invoice.organization_id == organization_id, Invoice.period == str(period))
        .execution_options(populate_existing=True)
    )


async def tell_of_invoice(session: AsyncSession, invoice: Invoice) -> None:
    amount = write_cents(invoice.due_cents, invoice.currency)
    await notify(
        session,
        invoice.organization_id,
        "invoice",
        f"Your invoice for {invoice.period} is ready: {amount} to pay.",
        {"invoice_id": invoice.id, "number": invoice.number, "due_cents": invoice.due_cents},
        subject=invoice.id,
    )


async def hold_back(session: AsyncSession, invoice: Invoice, reason: str) -> None:
    """Leaves the invoice to a person, whom it tells. The account is locked."""
    invoice.error = reason[:MAX_ERROR_CHARS]
    await alarm(
        session,
        "invoice_differs",
        f"Invoice {invoice.number} of {invoice.organization_name} is held back: {reason}.",
        {"invoice_id": invoice.id, "number": invoice.number},
        subject=invoice.id,
    )


async def release(session: AsyncSession, invoice: Invoice) -> None:
    """What held it back is over."""
    invoice.error = ""
    await end_alarm(session, "invoice_differs", subject=invoice.id)


async def _first_open(session: AsyncSession, organization_id: str, last: Period) -> Period:
    """The first month to look at: the one closed last may lack its invoice still, and so may those
    after one that differs."""
    differing = await session.scalar(
        select(func.min(Invoice.period)).where(
            Invoice.organization_id == organization_id,
            Invoice.state == "differs",
            Invoice.stripe_invoice_id.is_(None),
        )
    )
    if differing is not None:
        return period_named(differing)
    closed_until: datetime | None = await session.scalar(
        select(AccountBalance.closed_until).where(AccountBalance.organization_id == organization_id)
    )
    if closed_until is not None:
        return period_of(closed_until).previous
    return await first_period(session, organization_id) or last


def _months(first: Period, last: Period) -> Iterator[Period]:
    while first <= last:
        yield first
        first = first.next


async def _total_nano(session: AsyncSession, account: AccountBalance, usage: MonthUsage) -> int:
    """What is to be paid up to the end of this month and is on no invoice yet: what is owed on
    account, without usage since and what earlier invoices ask for. So it holds whatever a refund,
    a dispute or a payment did to the account."""
    in_lots = sum(lot.remaining_nano for lot in await open_lots(session, account.organization_id))
    owed_nano = in_lots - account.posted_nano
    owed_nano -= await owed_for_usage_since(session, account.organization_id, usage.period)
    return owed_nano - await asked_for_nano(session, account.organization_id)


def _due_cents(account: AccountBalance, total_nano: int) -> int:
    """Nothing of a prepaid account, which pays what it owes with the next top-up."""
    due_cents = total_nano // NANO_PER_CENT
    is_prepaid = account.credit_limit_nano == 0
    return 0 if is_prepaid or due_cents < MIN_DUE_CENTS else due_cents


async def _new_invoice(session: AsyncSession, organization_id: str, period: Period) -> Invoice:
    """With the next number. Two at once would have the same, and one of them fails: no number is
    left out."""
    newest = await session.scalar(select(func.max(Invoice.number)))
    name = await session.scalar(select(Organization.name).where(Organization.id == organization_id))
    return Invoice(
        id=new_id("inv"),
        number=(newest or 0) + 1,
        organization_id=organization_id,
        organization_name=name or organization_id,
        period=str(period),
        state="frozen",
        error="",
        created_at=clock.now(),
    )


def _fill(invoice: Invoice, account: AccountBalance, usage: MonthUsage, total_nano: int) -> None:
    """The sums: usage - credit + carry_in = due + carry_out. An invoice whose lines are not what
    the ledger took asks for nothing."""
    is_right = usage.usage_nano == usage.posted_nano
    invoice.currency = account.currency
    invoice.usage_nano = usage.usage_nano
    invoice.credit_nano = usage.credit_nano
    invoice.carry_in_nano = total_nano - (usage.usage_nano - usage.credit_nano)
    invoice.due_cents = _due_cents(account, total_nano) if is_right else 0
    invoice.carry_out_nano = total_nano - invoice.due_cents * NANO_PER_CENT


def _difference(usage: MonthUsage) -> str:
    return (
        f"the usage of {usage.period} adds up to {usage.usage_nano} nano-units, but the ledger "
        f"took {usage.posted_nano}"
    )


async def _put_lines(session: AsyncSession, invoice: Invoice, usage: MonthUsage) -> None:
    await session.execute(delete(InvoiceLine).where(InvoiceLine.invoice_id == invoice.id))
    rows = [
        {
            "invoice_id": invoice.id,
            "position": position,
            "endpoint_name": line.endpoint_name,
            "dimension": line.dimension,
            "service_class": line.service_class,
            "price_nano": line.price_nano,
            "unit_scale": line.unit_scale,
            "quantity": line.quantity,
            "amount_nano": line.amount_nano,
        }
        for position, line in enumerate(usage.lines, 1)
    ]
    if rows:
        await session.execute(insert(InvoiceLine), rows)
