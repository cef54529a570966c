"""How a person ends an invoice: paid another way, void, given up; or tries again to send it.

Owns what may be done in which state. An invoice that is at Stripe is ended there, and follows.
"""

from typing import Any

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.ledger import OTHER_CLEARING, lock_account
from app.billing.payments.invoice_books import apply, finish, is_draft
from app.billing.payments.invoice_payments import post_payments, standing, write_off
from app.billing.payments.invoice_push import (
    AddLines,
    CreateInvoice,
    DeleteDraft,
    FinaliseInvoice,
    retry,
)
from app.billing.payments.invoices import hold_back, is_held_back
from app.billing.payments.operations import Answer, Kind, Operation, Refusal, plan
from app.billing.payments.tables import Invoice
from app.billing.stripe import Stripe
from app.billing.stripe_errors import StripeRejected
from app.billing.stripe_objects import Invoice as StripeInvoice
from app.core.errors import Conflict, NotFound
from app.core.ids import new_id

UNENDED = ("frozen", "pushed", "differs", "finalised", "past_due", "uncollectible")


async def mark_paid(session: AsyncSession, invoice_id: str) -> Invoice:
    """All that is open of it came in otherwise than through Stripe. Marking it twice does no harm.
    Raises `NotFound`, `Conflict`."""
    invoice = await lock_invoice(session, invoice_id)
    if invoice.state == "paid":
        return invoice
    _require(invoice, "marked paid")
    if is_held_back(invoice):
        raise _usage_differs()
    if invoice.stripe_invoice_id is not None:
        raise Conflict(
            "This invoice is at Stripe. Mark it as paid there; it follows here.",
            code="invoice_at_stripe",
        )
    due_nano = (await standing(session, invoice)).due_nano
    await post_payments(session, invoice, due_nano, OTHER_CLEARING)
    await finish(session, invoice, "paid")
    return invoice


async def give_up(session: AsyncSession, invoice_id: str, to: str) -> Invoice:
    """`to` is `void` (a mistake) or `uncollectible` (can still be paid): what is open of it is
    written off. Raises `NotFound`, `Conflict`."""
    invoice = await lock_invoice(session, invoice_id)
    if invoice.state == to:
        return invoice
    _require(invoice, f"made {to}")
    if invoice.stripe_invoice_id is None:
        await write_off(session, invoice)
        await finish(session, invoice, to)
        return invoice
    await plan(
        session,
        EndInvoice.name,
        f"end_invoice:{invoice.id}:{new_id('end')}",
        invoice.organization_id,
        invoice.id,
        {
            "stripe_invoice_id": invoice.stripe_invoice_id,
            "to": to,
            "is_draft": is_draft(invoice),
        },
    )
    return invoice


async def try_again(session: AsyncSession, invoice_id: str) -> Invoice:
    """Brings an invoice that was held back to Stripe, if what was wrong is right by now. Raises
    `NotFound`, `Conflict`."""
    invoice = await lock_invoice(session, invoice_id)
    if not invoice.error or invoice.state not in ("frozen", "differs"):
        raise Conflict("This invoice is not held back.", code="invoice_not_held_back")
    if is_held_back(invoice):
        raise _usage_differs()
    await retry(session, invoice)
    return invoice


async def lock_invoice(session: AsyncSession, invoice_id: str) -> Invoice:
    """As it is now, with its organization's account locked. Raises `NotFound`."""
    query = select(Invoice.organization_id, Invoice.currency).where(Invoice.id == invoice_id)
    found = (await session.execute(query)).one_or_none()
    if found is None:
        raise NotFound(f"There is no invoice {invoice_id!r}.", code="invoice_not_found")
    await lock_account(session, *found)
    return await session.get_one(Invoice, invoice_id, populate_existing=True)


def _usage_differs() -> Conflict:
    return Conflict(
        "The usage of this month is not what the ledger took. The invoice is made again by itself "
        "as soon as both agree; the page Books shows what differs. Void, it asks for nothing, and "
        "what the ledger took is carried into the next.",
        code="usage_differs",
    )


def _require(invoice: Invoice, words: str) -> None:
    if invoice.state not in UNENDED:
        raise Conflict(
            f"This invoice is {invoice.state}: it cannot be {words}.", code="invoice_ended"
        )


class DeletedInvoice(msgspec.Struct, frozen=True):
    """A draft that was deleted."""

    id: str


class EndInvoice(Kind):
    """Voids an invoice at Stripe or gives it up there; a draft is deleted either way, and void.
    Stripe itself refuses a second time."""

    name = "end_invoice"
    is_harmless_twice = True

    def send(self, stripe: Stripe, operation: Operation) -> Answer:
        stripe_invoice_id, to = operation.params["stripe_invoice_id"], operation.params["to"]
        seen = stripe.get_invoice(stripe_invoice_id)
        if seen.status == "draft":
            stripe.delete_draft(stripe_invoice_id)
            return DeletedInvoice(stripe_invoice_id)
        if _is_over(seen, to):
            return seen
        if to == "void":
            return stripe.void_invoice(operation.id, stripe_invoice_id)
        return stripe.mark_uncollectible(operation.id, stripe_invoice_id)

    def find(self, stripe: Stripe, operation: Operation) -> Answer | None:
        stripe_invoice_id, to = operation.params["stripe_invoice_id"], operation.params["to"]
        try:
            seen = stripe.get_invoice(stripe_invoice_id)
        except StripeRejected as error:
            if error.code != "resource_missing" or not operation.params.get("is_draft"):
                raise
            return DeletedInvoice(stripe_invoice_id)
        return seen if _is_over(seen, to) else None

    async def confirmed(self, session: AsyncSession, operation: Operation, answer: Any) -> None:
        invoice = await session.get_one(Invoice, operation.subject_id, populate_existing=True)
        if isinstance(answer, StripeInvoice):
            await apply(session, invoice, answer)
        else:
            await write_off(session, invoice)
            await finish(session, invoice, "void")

    async def refused(self, session: AsyncSession, operation: Operation, why: Refusal) -> None:
        invoice = await session.get_one(Invoice, operation.subject_id, populate_existing=True)
        if invoice.state in UNENDED:
            await hold_back(session, invoice, why.message)


def _is_over(seen: StripeInvoice, to: str) -> bool:
    return seen.status in ("paid", "void", to)


def kinds() -> tuple[Kind, ...]:
    """What is done with invoices at Stripe, for the outbox."""
    return CreateInvoice(), DeleteDraft(), AddLines(), FinaliseInvoice(), EndInvoice()
