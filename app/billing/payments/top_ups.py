"""Top-ups through Checkout: a page at Stripe that takes a payment and keeps the card.

Owns their rows until they are paid. Credit comes only from the payment itself, in `settling.py`.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.ledger import lock_account
from app.billing.payments.cents import require_cents
from app.billing.payments.operations import (
    Answer,
    Kind,
    NotNeeded,
    Operation,
    Refusal,
    plan,
)
from app.billing.payments.profile import need_customer
from app.billing.payments.settling import fail
from app.billing.payments.tables import TopUp
from app.billing.stripe import Stripe
from app.billing.stripe_objects import Checkout, Payment
from app.core import clock
from app.core.errors import Conflict, NotFound, RateLimited
from app.core.ids import new_id

MIN_CENTS = 500
MAX_CENTS = 1_000_000
MAX_OPEN = 20  # of one organization, begun in the last day and not paid
MAX_LISTED = 200


async def begin(
    session: AsyncSession,
    organization_id: str,
    amount_cents: int,
    currency: str,
    return_url: str,
) -> TopUp:
    """A top-up whose page is being asked for. `return_url` gets `?top_up=` and its id. Raises
    `Conflict` and `RateLimited`."""
    assert MIN_CENTS <= amount_cents <= MAX_CENTS
    account = await lock_account(session, organization_id, currency)
    if account.currency != currency:
        raise Conflict(
            f"This account is kept in {account.currency.upper()}, and cannot be paid in "
            f"{currency.upper()}. Ask the operator of this box.",
            code="currency_differs",
        )
    require_cents(currency)
    await _refuse_too_many(session, organization_id)
    top_up = TopUp(
        id=new_id("top"),
        organization_id=organization_id,
        kind="checkout",
        state="created",
        amount_cents=amount_cents,
        currency=currency,
        refunded_cents=0,
        disputed_cents=0,
        error="",
        created_at=clock.now(),
    )
    session.add(top_up)
    await session.flush()
    await need_customer(session, organization_id)
    url = f"{return_url}?top_up={top_up.id}"
    params = {
        "amount_cents": amount_cents,
        "currency": currency,
        "success_url": url,
        "cancel_url": f"{url}&cancelled=1",
    }
    await plan(
        session, CreateCheckout.name, f"{top_up.id}:checkout", organization_id, top_up.id, params
    )
    return top_up


async def get_top_up(session: AsyncSession, organization_id: str, top_up_id: str) -> TopUp:
    """Raises `NotFound`, also for another organization's."""
    top_up = await session.get(TopUp, top_up_id)
    if top_up is None or top_up.organization_id != organization_id:
        raise NotFound(f"There is no top-up {top_up_id!r}.", code="top_up_not_found")
    return top_up


async def list_top_ups(
    session: AsyncSession, organization_id: str, limit: int = MAX_LISTED
) -> Sequence[TopUp]:
    """The newest first."""
    rows = await session.scalars(
        select(TopUp)
        .where(TopUp.organization_id == organization_id)
        .order_by(TopUp.created_at.desc(), TopUp.id.desc())
        .limit(limit)
    )
    return rows.all()


async def follow_checkout(
    session: AsyncSession, top_up: TopUp, checkout: Checkout, payment: Payment | None
) -> None:
    """After the page's state at Stripe, and that of its payment where it has one. The account is
    locked and `top_up` read since."""
    if top_up.paid_at is not None:
        return
    top_up.checkout_session_id = checkout.id
    top_up.checkout_url = checkout.url or None
    if checkout.status == "expired":
        await fail(session, top_up, "expired", "The page was left open for too long.")
    elif checkout.status == "complete" and payment is not None and _is_refused(payment):
        reason = payment.error_message or "The payment was refused."
        await fail(session, top_up, "failed", reason)
    elif top_up.state == "created":
        top_up.state = "pending"


def _is_refused(payment: Payment) -> bool:
    """Of a completed page, which no longer asks for another card."""
    return payment.status in ("requires_payment_method", "canceled")


async def _refuse_too_many(session: AsyncSession, organization_id: str) -> None:
    query = select(func.count()).where(
        TopUp.organization_id == organization_id,
        TopUp.kind == "checkout",
        TopUp.state.in_(("created", "pending")),
        TopUp.created_at > clock.now() - timedelta(days=1),
    )
    if (await session.scalar(query) or 0) >= MAX_OPEN:
        raise RateLimited(
            f"{MAX_OPEN} top-ups were begun in the last day and not paid. Pay one of those, or "
            "wait until they expire.",
            code="too_many_top_ups",
            retry_after_seconds=3600,
        )


class CreateCheckout(Kind):
    """Makes the page. A second one does no harm: nobody has the first one's address."""

    name = "create_checkout"
    is_harmless_twice = True

    async def prepare(self, session: AsyncSession, operation: Operation) -> dict[str, Any] | None:
        top_up = await session.get_one(TopUp, operation.subject_id)
        if top_up.state not in ("created", "pending") or top_up.checkout_session_id:
            raise NotNeeded(f"The top-up is {top_up.state}.")
        customer_id = await need_customer(session, operation.organization_id)
        return None if customer_id is None else operation.params | {"customer_id": customer_id}

    def send(self, stripe: Stripe, operation: Operation) -> Answer:
        return stripe.create_checkout(
            operation.id, top_up_id=operation.subject_id, **operation.params
        )

    def find(self, stripe: Stripe, operation: Operation) -> Answer | None:
        return stripe.find_checkout(
            operation.subject_id, operation.searched_from, operation.params["customer_id"]
        )

    async def confirmed(
        self, session: AsyncSession, operation: Operation, answer: Checkout
    ) -> None:
        top_up = await session.get_one(TopUp, operation.subject_id)
        await follow_checkout(session, top_up, answer, None)

    async def refused(self, session: AsyncSession, operation: Operation, why: Refusal) -> None:
        top_up = await session.get_one(TopUp, operation.subject_id)
        await fail(session, top_up, "failed", why.message)
