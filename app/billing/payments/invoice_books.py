"""What an invoice's state at Stripe means for ours: read again, and only ever forward.

Owns that translation. Webhooks and the outbox bring what they read at Stripe here, in whatever
order and however often; the postings are `invoice_payments.py`'s.
"""

from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.ledger import OTHER_CLEARING, STRIPE_CLEARING, lock_account
from app.billing.payments import mirror
from app.billing.payments.calls import Calls
from app.billing.payments.cents import NANO_PER_CENT, write_cents
from app.billing.payments.invoice_payments import advance, post_payments, write_off
from app.billing.payments.invoices import hold_back, release
from app.billing.payments.notices import alarm, end, notify
from app.billing.payments.tables import Invoice
from app.billing.stripe import Stripe
from app.billing.stripe_errors import StripeRejected
from app.billing.stripe_invoices import DAYS_UNTIL_DUE
from app.billing.stripe_objects import Invoice as StripeInvoice
from app.core import clock
from app.core.database import Database
from app.core.failpoints import failpoint

AT_STRIPE = ("pushed", "differs", "finalised", "past_due")
NOT_FOUND = "Stripe does not know it: is TAPEOUT_STRIPE_API_KEY that of another account or mode?"


async def refresh_invoice(
    database: Database, stripe: Stripe, calls: Calls, stripe_invoice_id: str
) -> None:
    """Reads an invoice again and brings it into the books, if it is one of ours. Raises what
    `Stripe.get_invoice` does."""
    organization_id = await _organization_of(database, stripe_invoice_id)
    if organization_id is None:
        return
    seen = await calls(_read, stripe, stripe_invoice_id)
    failpoint("invoice_books.after_read")
    async with database.write() as session:
        await lock_account(session, organization_id, "")
        query = select(Invoice).where(Invoice.stripe_invoice_id == stripe_invoice_id)
        invoice = await session.scalar(query)
        if invoice is not None and seen is not None:
            await apply(session, invoice, seen)
        elif invoice is not None:
            await _missing(session, invoice)
        failpoint("invoice_books.before_commit")
    failpoint("invoice_books.after_commit")


def _read(stripe: Stripe, stripe_invoice_id: str) -> StripeInvoice | None:
    """None where Stripe does not know it, as a draft that was deleted."""
    try:
        return stripe.get_invoice(stripe_invoice_id)
    except StripeRejected as error:
        if error.code == "resource_missing":
            return None
        raise


async def apply(session: AsyncSession, invoice: Invoice, seen: StripeInvoice) -> None:
    """The account is locked. Money that came in is booked whatever else is wrong."""
    await mirror.store(session, seen)
    invoice.hosted_url = seen.hosted_url or invoice.hosted_url
    paid_nano = seen.amount_paid_cents * NANO_PER_CENT
    await post_payments(session, invoice, paid_nano, STRIPE_CLEARING)
    match seen.status:
        case "open":
            await _open(session, invoice, seen)
        case "paid":
            await _paid(session, invoice, seen)
        case "uncollectible" | "void":
            await write_off(session, invoice)
            await finish(session, invoice, seen.status)
        case "deleted":
            await _missing(session, invoice)
        case _:
            pass  # a draft says nothing


async def _paid(session: AsyncSession, invoice: Invoice, seen: StripeInvoice) -> None:
    """What Stripe calls paid may not have been paid to it: what it had to collect and did not, a
    person marked as paid otherwise; the rest, as by a credit note, nobody paid."""
    collectable_cents = min(seen.amount_due_cents, seen.total_cents - seen.credited_cents)
    await post_payments(session, invoice, collectable_cents * NANO_PER_CENT, OTHER_CLEARING)
    given_up_nano = await write_off(session, invoice)
    if given_up_nano:
        await alarm(
            session,
            "invoice_short",
            f"Stripe calls invoice {invoice.number} of {invoice.organization_name} paid, but "
            f"{write_cents(given_up_nano // NANO_PER_CENT, invoice.currency)} of it never came, as "
            "after a credit note. That much was written off.",
            {"invoice_id": invoice.id, "number": invoice.number},
            subject=invoice.id,
        )
    await finish(session, invoice, "paid")


async def finish(session: AsyncSession, invoice: Invoice, state: str) -> None:
    """Nothing is left to be done about it, as far as we know."""
    if not advance(invoice, state):
        return
    await release(session, invoice)
    for kind in ("invoice", "invoice_past_due"):
        await end(session, invoice.organization_id, kind, subject=invoice.id)


def is_draft(invoice: Invoice) -> bool:
    """Whether Stripe has at most a draft of it, as far as we know. Only that can be deleted."""
    return invoice.state in ("frozen", "pushed", "differs") and invoice.hosted_url is None


async def _missing(session: AsyncSession, invoice: Invoice) -> None:
    """Stripe does not know it. An invoice that is to be paid was not deleted: Stripe lets nobody
    do that, so the key is another account's, and making it again would ask for it twice."""
    if is_draft(invoice):
        await set_aside(session, invoice, "its draft was deleted at Stripe", is_gone=True)
    elif invoice.state in AT_STRIPE:
        await hold_back(session, invoice, NOT_FOUND)


async def set_aside(session: AsyncSession, invoice: Invoice, reason: str, *, is_gone: bool) -> None:
    """Leaves it to a person. Whose draft at Stripe is gone may get another."""
    if is_gone and is_draft(invoice):
        invoice.stripe_invoice_id, invoice.state = None, "frozen"
    elif invoice.stripe_invoice_id is not None:
        invoice.state = "differs"
    await hold_back(session, invoice, reason)


async def _open(session: AsyncSession, invoice: Invoice, seen: StripeInvoice) -> None:
    if seen.total_cents != invoice.due_cents:
        if invoice.state in AT_STRIPE:
            await set_aside(session, invoice, _totals_differ(invoice, seen), is_gone=False)
        return
    if advance(invoice, "finalised") or invoice.error:
        await release(session, invoice)
    overdue_at = seen.created_at + timedelta(days=DAYS_UNTIL_DUE)
    if seen.attempt_count == 0 and clock.now() < overdue_at:
        return
    if advance(invoice, "past_due"):
        await end(session, invoice.organization_id, "invoice", subject=invoice.id)
        amount = write_cents(invoice.due_cents, invoice.currency)
        await notify(
            session,
            invoice.organization_id,
            "invoice_past_due",
            f"Your invoice for {invoice.period} ({amount}) is not paid: "
            + ("the card was declined." if seen.attempt_count else "it was due by now."),
            {"invoice_id": invoice.id, "number": invoice.number, "url": seen.hosted_url},
            subject=invoice.id,
        )


def _totals_differ(invoice: Invoice, seen: StripeInvoice) -> str:
    return (
        f"its total at Stripe is {write_cents(seen.total_cents, seen.currency)}, not "
        f"{write_cents(invoice.due_cents, invoice.currency)}"
    )


async def _organization_of(database: Database, stripe_invoice_id: str) -> str | None:
    async with database.read() as session:
        query = select(Invoice.organization_id).where(
            Invoice.stripe_invoice_id == stripe_invoice_id
        )
        return await session.scalar(query)
