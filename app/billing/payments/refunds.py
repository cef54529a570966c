"""Refunds of top-ups by the operator. What Stripe made of one is posted by `payment_books.py`."""

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.ledger import lock_account
from app.billing.payments.cents import write_cents
from app.billing.payments.notices import alarm
from app.billing.payments.operations import Answer, Kind, Operation, Refusal, plan
from app.billing.payments.settling import settle_refund
from app.billing.payments.tables import StripeOperation, TopUp
from app.billing.stripe import Stripe
from app.billing.stripe_objects import Refund
from app.core.errors import Conflict, InvalidRequest, NotFound
from app.core.ids import new_id

_UNDECIDED = ("planned", "sent", "unknown", "quarantined")


async def ask_refund(session: AsyncSession, top_up_id: str, amount_cents: int) -> str:
    """Has Stripe give back part of what a top-up paid; its credit is taken once Stripe says that
    it did. Returns the operation's id. Raises `NotFound`, `Conflict`, `InvalidRequest`."""
    assert amount_cents > 0
    top_up = await session.get(TopUp, top_up_id)
    if top_up is None:
        raise NotFound(f"There is no top-up {top_up_id!r}.", code="top_up_not_found")
    await lock_account(session, top_up.organization_id, top_up.currency)
    await session.refresh(top_up)
    if top_up.paid_at is None or top_up.payment_intent_id is None:
        raise Conflict(
            f"This top-up is {top_up.state}: only what was paid can be refunded.", code="not_paid"
        )
    left_cents = top_up.amount_cents - top_up.refunded_cents - top_up.disputed_cents
    left_cents -= await _asked_cents(session, top_up_id)
    if amount_cents > left_cents:
        raise InvalidRequest(
            f"{write_cents(max(0, left_cents), top_up.currency)} of this top-up can be refunded.",
            param="amount",
            code="refund_too_large",
        )
    key = f"{top_up.id}:refund:{new_id('op')}"
    params = {"payment_id": top_up.payment_intent_id, "amount_cents": amount_cents}
    await plan(session, MakeRefund.name, key, top_up.organization_id, top_up.id, params)
    return key


async def _asked_cents(session: AsyncSession, top_up_id: str) -> int:
    """What is asked for and may still happen."""
    rows = await session.scalars(
        select(StripeOperation.params).where(
            StripeOperation.subject_id == top_up_id,
            StripeOperation.kind == MakeRefund.name,
            StripeOperation.state.in_(_UNDECIDED),
        )
    )
    return sum(int(params["amount_cents"]) for params in rows)


class MakeRefund(Kind):
    """Never done again once it is in doubt: Stripe allows several refunds of one payment."""

    name = "refund"

    def send(self, stripe: Stripe, operation: Operation) -> Answer:
        return stripe.refund(operation.id, top_up_id=operation.subject_id, **operation.params)

    def find(self, stripe: Stripe, operation: Operation) -> Answer | None:
        return stripe.find_refund(operation.params["payment_id"], operation.id)

    async def confirmed(self, session: AsyncSession, operation: Operation, answer: Refund) -> None:
        top_up = await session.get_one(TopUp, operation.subject_id)
        await settle_refund(session, top_up, answer)

    async def refused(self, session: AsyncSession, operation: Operation, why: Refusal) -> None:
        await alarm(
            session,
            "refund_refused",
            f"Stripe did not refund {operation.subject_id}: {why.message}",
            {"operation_id": operation.id, "top_up_id": operation.subject_id},
            subject=operation.id,
        )
