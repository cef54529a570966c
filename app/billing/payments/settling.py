"""What Stripe says of a payment, brought into the books and to the top-up that it was for.

Owns what a payment's state means for its top-up, which only goes forward: once it is paid, only
what is taken back of it counts. The postings are `payment_books.py`'s.
"""

import msgspec
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.ledger import lock_account
from app.billing.payments import mirror
from app.billing.payments.cents import write_cents
from app.billing.payments.notices import alarm, end, end_alarm, notify
from app.billing.payments.payment_books import PaymentBooks
from app.billing.payments.profile import (
    keep_card,
    mark_card,
    open_profile,
    pause_recharge,
)
from app.billing.payments.tables import Invoice, StripeOperation, TopUp
from app.billing.stripe import Stripe
from app.billing.stripe_objects import BalanceTransaction, Dispute, Payment, Refund
from app.core import clock

MAX_ERROR_CHARS = 300
_DECIDED = ("won", "lost", "warning_closed")  # of disputes
# A payment in these was refused, and waits for somebody to pay in another way.
_REFUSED = ("requires_payment_method", "requires_action", "canceled")


class Seen(msgspec.Struct, frozen=True):
    """A payment with all that came of it. `charge` is its own movement of Stripe's balance,
    `stripe_invoice_id` the invoice that it pays."""

    payment: Payment
    stripe_invoice_id: str = ""
    charge: BalanceTransaction | None = None
    refunds: tuple[Refund, ...] = ()
    disputes: tuple[Dispute, ...] = ()


def look_up(stripe: Stripe, payment_id: str) -> Seen:
    """As it is at Stripe now. Blocks."""
    payment = stripe.get_payment(payment_id)
    is_of_others = not payment.top_up_id and not payment.customer_id
    if not payment.is_paid or is_of_others:
        return Seen(payment)
    stripe_invoice_id = "" if payment.top_up_id else stripe.find_paid_invoice(payment_id)
    charge = None
    if payment.balance_transaction_id:  # it comes a little after the payment
        charge = stripe.get_balance_transaction(payment.balance_transaction_id)
    refunds, disputes = stripe.list_refunds(payment_id), stripe.list_disputes(payment_id)
    return Seen(payment, stripe_invoice_id, charge, tuple(refunds), tuple(disputes))


async def settle(session: AsyncSession, seen: Seen) -> bool:
    """Brings a payment into the books. False where it is none of ours: neither for a top-up nor
    for an invoice, even though a customer of ours paid it."""
    payment = seen.payment
    top_up = await _top_up_of(session, payment)
    if top_up is None:
        organization_id = await _organization_of_invoice(session, seen.stripe_invoice_id)
    else:
        organization_id = top_up.organization_id
    if organization_id is None:
        return False
    account = await lock_account(session, organization_id, payment.currency)
    await mirror.store(session, payment)
    if top_up is not None:
        await session.refresh(top_up)
        await _follow(session, top_up, payment)
    books = PaymentBooks(session, organization_id, payment.id, account.currency)
    if not payment.is_paid or not books.is_own(payment.currency):
        return True  # nothing was credited that could be taken back
    if seen.charge is not None:
        await books.pay_fee(seen.charge)
    refunded_cents = sum([await books.refund(refund) for refund in seen.refunds])
    disputed_cents = sum([await books.dispute(dispute) for dispute in seen.disputes])
    if top_up is not None:
        _take_back(top_up, refunded_cents, disputed_cents)
    if disputed_cents > 0:
        await _tell_of_dispute(session, organization_id, payment, disputed_cents)
    is_decided = bool(seen.disputes) and all(d.status in _DECIDED for d in seen.disputes)
    if disputed_cents < 0 or is_decided:
        await end(session, organization_id, "payment_disputed", payment.id)
    if seen.disputes and payment.payment_method_id:
        await mark_card(session, payment.payment_method_id, payment.id, seen.disputes)
    if refunded_cents > 0 or disputed_cents > 0:
        await _stop_recharging(session, organization_id, payment.id)
    await session.flush()
    return True


async def settle_refund(session: AsyncSession, top_up: TopUp, refund: Refund) -> None:
    """A refund of a top-up that Stripe has just made. The account is locked."""
    assert top_up.payment_intent_id is not None, "only what was paid is refunded"
    books = PaymentBooks(session, top_up.organization_id, top_up.payment_intent_id, top_up.currency)
    refunded_cents = await books.refund(refund)
    _take_back(top_up, refunded_cents, 0)
    if refunded_cents > 0:
        await _stop_recharging(session, top_up.organization_id, top_up.payment_intent_id)
    await session.flush()


async def fail(session: AsyncSession, top_up: TopUp, state: str, reason: str) -> None:
    """It was not paid, as far as is known: should it be after all, it is credited all the same.
    The account is locked."""
    if top_up.paid_at is not None or top_up.state == state:
        return
    top_up.state, top_up.error = state, reason[:MAX_ERROR_CHARS]
    if top_up.kind == "recharge":
        await pause_recharge(session, top_up.organization_id, reason, {"top_up_id": top_up.id})


async def _top_up_of(session: AsyncSession, payment: Payment) -> TopUp | None:
    if payment.top_up_id and (top_up := await session.get(TopUp, payment.top_up_id)):
        return top_up
    return await session.scalar(select(TopUp).where(TopUp.payment_intent_id == payment.id))


async def _organization_of_invoice(session: AsyncSession, stripe_invoice_id: str) -> str | None:
    query = select(Invoice.organization_id).where(Invoice.stripe_invoice_id == stripe_invoice_id)
    return await session.scalar(query)


async def _follow(session: AsyncSession, top_up: TopUp, payment: Payment) -> None:
    """What the payment's own state means for its top-up."""
    if payment.is_paid:
        await _credit(session, top_up, payment)
    elif top_up.paid_at is not None:
        return  # by another payment than this one
    elif payment.status in _REFUSED and (top_up.kind == "recharge" or payment.status == "canceled"):
        top_up.payment_intent_id = payment.id
        await fail(session, top_up, "failed", payment.error_message or "The payment was refused.")
    elif top_up.state == "created":
        top_up.payment_intent_id = payment.id
        top_up.state = "pending"


async def _credit(session: AsyncSession, top_up: TopUp, payment: Payment) -> None:
    books = PaymentBooks(session, top_up.organization_id, payment.id, top_up.currency)
    if not books.is_own(payment.currency):
        await alarm(
            session,
            "payment_currency",
            f"Payment {payment.id} for {top_up.id} was made in {payment.currency.upper()}, not in "
            f"{top_up.currency.upper()}: it is not credited. Refund it at Stripe.",
            {"payment_id": payment.id, "top_up_id": top_up.id},
            subject=payment.id,
        )
        return
    if payment.amount_received_cents <= 0 or not await books.credit(payment.amount_received_cents):
        return
    # What came in is what counts, should a top-up be paid twice by some fault.
    top_up.payment_intent_id, top_up.error = payment.id, ""
    top_up.paid_at = clock.now()
    top_up.state = "paid"
    if payment.payment_method_id and payment.is_card_kept:
        await keep_card(
            session, top_up.organization_id, payment.payment_method_id, payment.card_label
        )
    await _end_doubt(session, top_up, payment.id)


async def _end_doubt(session: AsyncSession, top_up: TopUp, payment_id: str) -> None:
    """Whatever became of asking for the payment: it is there."""
    rows = await session.scalars(
        select(StripeOperation.id).where(
            StripeOperation.subject_id == top_up.id,
            StripeOperation.kind == "charge_card",
            StripeOperation.state.in_(("sent", "unknown", "quarantined")),
        )
    )
    for operation_id in rows.all():
        await session.execute(
            update(StripeOperation)
            .where(StripeOperation.id == operation_id)
            .values(state="confirmed", stripe_id=payment_id, error="")
        )
        await end_alarm(session, "payment_in_doubt", operation_id)


def _take_back(top_up: TopUp, refunded_cents: int, disputed_cents: int) -> None:
    top_up.refunded_cents += refunded_cents
    top_up.disputed_cents += disputed_cents
    if top_up.disputed_cents > 0:
        top_up.state = "disputed"
    else:
        is_refunded = top_up.refunded_cents >= top_up.amount_cents
        top_up.state = "refunded" if is_refunded else "paid"


async def _stop_recharging(session: AsyncSession, organization_id: str, payment_id: str) -> None:
    """What is taken back leaves little credit, which the card would pay for again."""
    profile = await open_profile(session, organization_id)
    if profile.recharge_below_nano is not None:
        reason = "a payment was refunded or is disputed. Set it again to go on."
        await pause_recharge(session, organization_id, reason, {"payment_id": payment_id})


async def _tell_of_dispute(
    session: AsyncSession, organization_id: str, payment: Payment, cents: int
) -> None:
    await notify(
        session,
        organization_id,
        "payment_disputed",
        f"A payment of {write_cents(payment.amount_received_cents, payment.currency)} is disputed: "
        f"{write_cents(cents, payment.currency)} of credit is taken back until that is decided.",
        {"payment_id": payment.id, "amount_cents": cents},
        subject=payment.id,
    )
