"""What an event of Stripe's means: which object to read again, and whose books it changes.

Owns that choice alone. The event says only where to look: the object, read again, says what is so.
Whatever the order and number of events, the books end the same.
"""

import msgspec
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.ledger import lock_account
from app.billing.payments import mirror
from app.billing.payments.profile import (
    follow_customer,
    forget_card,
    organization_of_customer,
)
from app.billing.payments.settling import Seen, look_up, settle
from app.billing.payments.tables import Invoice, StripeMirror, TopUp
from app.billing.payments.top_ups import follow_checkout
from app.billing.stripe import Stripe
from app.billing.stripe_errors import StripeRejected
from app.billing.stripe_objects import Checkout, Customer, Event

# What the webhook is to be subscribed to; in parts of what Stripe lists at once.
EVENT_TYPES = (
    (
        "checkout.session.completed",
        "checkout.session.expired",
        "checkout.session.async_payment_succeeded",
        "checkout.session.async_payment_failed",
        "payment_intent.succeeded",
        "payment_intent.payment_failed",
        "payment_intent.canceled",
        "charge.updated",
        "charge.refunded",
        "refund.created",
        "refund.updated",
        "refund.failed",
        "charge.dispute.created",
        "charge.dispute.funds_withdrawn",
        "charge.dispute.funds_reinstated",
        "charge.dispute.closed",
        "customer.updated",
        "customer.deleted",
        "payment_method.detached",
    ),
    (
        "invoice.finalized",
        "invoice.finalization_failed",
        "invoice.paid",
        "invoice.payment_failed",
        "invoice.overdue",
        "invoice.voided",
        "invoice.marked_uncollectible",
        "invoice.updated",
        "invoice.deleted",
    ),
)


class Found(msgspec.Struct, frozen=True):
    """What was read at Stripe for an event; empty where it says nothing of ours, or is gone."""

    checkout: Checkout | None = None
    seen: Seen | None = None
    customer: Customer | None = None


class NotThere(Exception):
    """Stripe does not know the object of an event: it is gone, or of another account or mode than
    the API key. The words say which, as far as that is known."""


def read(stripe: Stripe, event: Event) -> Found:
    """The objects that an event is about, as they are now. Raises `NotThere`. Blocks."""
    if event.account_id:
        return Found()  # of an account that is connected to ours
    if event.is_live is not None and event.is_live != stripe.is_live:
        mode = "live" if event.is_live else "test"
        raise NotThere(f"This happened in {mode} mode, of which TAPEOUT_STRIPE_API_KEY is not.")
    try:
        return _read(stripe, event)
    except StripeRejected as error:
        if error.code == "resource_missing":
            raise NotThere(f"{error}") from error
        raise


async def names_ours(session: AsyncSession, event: Event) -> bool:
    """Whether an event's own words name a top-up, payment or invoice of ours."""
    payment_ids = {event.payment_id, event.object_id} - {""}
    ours = (
        select(TopUp.id).where(
            or_(TopUp.id == event.top_up_id, TopUp.payment_intent_id.in_(payment_ids))
        ),
        select(StripeMirror.id).where(
            StripeMirror.kind == "payment", StripeMirror.id.in_(payment_ids)
        ),
        select(Invoice.id).where(
            or_(Invoice.id == event.invoice_id, Invoice.stripe_invoice_id == event.object_id)
        ),
    )
    for query in ours:
        if await session.scalar(query.limit(1)) is not None:
            return True
    return False


def _read(stripe: Stripe, event: Event) -> Found:
    match event.object_kind:
        case "checkout.session":
            return look_up_checkout(stripe, event.object_id)
        case "payment_intent":
            return Found(seen=look_up(stripe, event.object_id))
        case "refund":
            return _of_payment(stripe, stripe.get_refund(event.object_id).payment_id)
        case "dispute":
            return _of_payment(stripe, stripe.get_dispute(event.object_id).payment_id)
        case "charge":
            return _of_payment(stripe, event.payment_id)
        case "customer":
            return Found(customer=stripe.get_customer(event.object_id))
        case _:
            return Found()


def look_up_checkout(stripe: Stripe, checkout_id: str) -> Found:
    """A page with the payment that was made through it. Blocks."""
    checkout = stripe.get_checkout(checkout_id)
    if not checkout.top_up_id:
        return Found()
    payment_id = checkout.payment_intent_id
    return Found(checkout=checkout, seen=look_up(stripe, payment_id) if payment_id else None)


def _of_payment(stripe: Stripe, payment_id: str) -> Found:
    return Found(seen=look_up(stripe, payment_id)) if payment_id else Found()


async def apply(session: AsyncSession, event: Event, found: Found) -> None:
    """Brings what was read for an event into the books."""
    await apply_found(session, found)
    if event.type == "payment_method.detached":
        # One that was detached can never be attached again, so that there is nothing to read.
        await forget_card(session, event.object_id)


async def apply_found(session: AsyncSession, found: Found) -> None:
    if found.seen is not None:
        await settle(session, found.seen)
    if found.checkout is not None:
        await _apply_checkout(session, found.checkout, found.seen)
    if found.customer is not None:
        organization_id = await organization_of_customer(session, found.customer.id)
        if organization_id is not None:
            await lock_account(session, organization_id, "")
            await follow_customer(session, organization_id, found.customer)
            await mirror.store(session, found.customer)


async def _apply_checkout(session: AsyncSession, checkout: Checkout, seen: Seen | None) -> None:
    top_up = await session.get(TopUp, checkout.top_up_id)
    if top_up is None:
        return
    await lock_account(session, top_up.organization_id, top_up.currency)
    await session.refresh(top_up)
    await mirror.store(session, checkout)
    await follow_checkout(session, top_up, checkout, None if seen is None else seen.payment)
