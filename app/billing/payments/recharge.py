"""Automatic recharging: when little credit is left, the saved card pays some more.

Owns when that is, and that an organization has one recharge under way at most: whether there is
one is read, and another begun, under the lock of its account.
"""

from datetime import timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.ledger import lock_account
from app.billing.payments.cents import NANO_PER_CENT, require_cents
from app.billing.payments.notices import end
from app.billing.payments.operations import (
    Answer,
    Kind,
    NotNeeded,
    Operation,
    Refusal,
    plan,
)
from app.billing.payments.profile import is_card_disputed, open_profile, pause_recharge
from app.billing.payments.settling import MAX_ERROR_CHARS, Seen, fail, settle
from app.billing.payments.tables import BillingProfile, TopUp
from app.billing.payments.top_ups import MAX_CENTS, MIN_CENTS
from app.billing.stripe import Stripe
from app.billing.stripe_objects import Payment
from app.billing.tables import AccountBalance
from app.core import clock
from app.core.database import Database
from app.core.errors import InvalidRequest
from app.core.failpoints import failpoint
from app.core.ids import new_id

MAX_PER_DAY = 20  # of one organization: what spends by mistake is stopped by somebody's look at it
UNDER_WAY = ("created", "pending")
# A payment in these has no outcome yet, and was not even tried.
_UNTRIED = ("requires_confirmation",)


async def set_recharge(
    session: AsyncSession,
    organization_id: str,
    below_nano: int | None,
    amount_cents: int | None,
    currency: str,
) -> BillingProfile:
    """Below what, and by how much; both None to stop. Recharging goes on if it was paused."""
    account = await lock_account(session, organization_id, currency)
    if (below_nano is None) != (amount_cents is None):
        raise InvalidRequest("Give both below and amount, or neither.", param="amount")
    if below_nano is not None and amount_cents is not None:
        require_cents(account.currency)
        if not 0 <= below_nano <= MAX_CENTS * NANO_PER_CENT:
            raise InvalidRequest("below is out of range.", param="below")
        if not MIN_CENTS <= amount_cents <= MAX_CENTS:
            raise InvalidRequest("amount is out of range.", param="amount")
    profile = await open_profile(session, organization_id)
    profile.recharge_below_nano, profile.recharge_cents = below_nano, amount_cents
    profile.recharge_paused, profile.updated_at = "", clock.now()
    await end(session, organization_id, "recharge_failed")
    return profile


class Recharging:
    """Begins what is due."""

    def __init__(self, database: Database, currency: str) -> None:
        self._database = database
        self._currency = currency

    async def turn(self) -> list[str]:
        """Returns the organizations whose card is going to be charged."""
        async with self._database.read() as session:
            rows = await session.scalars(
                select(BillingProfile.organization_id)
                .join(
                    AccountBalance,
                    AccountBalance.organization_id == BillingProfile.organization_id,
                )
                .where(
                    BillingProfile.recharge_paused == "",
                    BillingProfile.payment_method_id.is_not(None),
                    AccountBalance.posted_nano - AccountBalance.held_nano
                    < BillingProfile.recharge_below_nano,
                )
            )
            low = rows.all()
        return [id for id in low if await self._begin(id)]

    async def _begin(self, organization_id: str) -> bool:
        async with self._database.write() as session:
            account = await lock_account(session, organization_id, self._currency)
            profile = await open_profile(session, organization_id)
            if not _is_due(account, profile) or await _is_under_way(session, organization_id):
                return False
            if await is_card_disputed(session, profile.payment_method_id or ""):
                reason = "a payment by this card is disputed. Pay with another one."
                await pause_recharge(session, organization_id, reason, {})
                return False
            if await _num_today(session, organization_id) >= MAX_PER_DAY:
                reason = f"{MAX_PER_DAY} recharges in one day: choose a larger amount."
                await pause_recharge(session, organization_id, reason, {})
                return False
            assert profile.recharge_cents is not None, "set together with what it is below"
            top_up = TopUp(
                id=new_id("top"),
                organization_id=organization_id,
                kind="recharge",
                state="created",
                amount_cents=profile.recharge_cents,
                currency=account.currency,
                refunded_cents=0,
                disputed_cents=0,
                error="",
                created_at=clock.now(),
            )
            session.add(top_up)
            await session.flush()
            params = {"amount_cents": top_up.amount_cents, "currency": top_up.currency}
            key = f"{top_up.id}:charge"
            await plan(session, ChargeCard.name, key, organization_id, top_up.id, params)
            failpoint("recharge.before_commit")
        failpoint("recharge.after_commit")
        return True


def _is_due(account: AccountBalance, profile: BillingProfile) -> bool:
    return (
        profile.recharge_below_nano is not None
        and not profile.recharge_paused
        and profile.payment_method_id is not None
        and profile.stripe_customer_id is not None
        and account.posted_nano - account.held_nano < profile.recharge_below_nano
    )


async def _is_under_way(session: AsyncSession, organization_id: str) -> bool:
    query = select(TopUp.id).where(
        TopUp.organization_id == organization_id,
        TopUp.kind == "recharge",
        TopUp.state.in_(UNDER_WAY),
    )
    return (await session.scalar(query.limit(1))) is not None


async def _num_today(session: AsyncSession, organization_id: str) -> int:
    query = select(func.count()).where(
        TopUp.organization_id == organization_id,
        TopUp.kind == "recharge",
        TopUp.state != "expired",
        TopUp.created_at > clock.now() - timedelta(days=1),
    )
    return await session.scalar(query) or 0


class ChargeCard(Kind):
    """Charges the saved card while nobody is there. Never done again once it is in doubt."""

    name = "charge_card"

    async def prepare(self, session: AsyncSession, operation: Operation) -> dict[str, Any] | None:
        top_up = await session.get_one(TopUp, operation.subject_id)
        account = await session.get_one(AccountBalance, operation.organization_id)
        profile = await open_profile(session, operation.organization_id)
        card_id = profile.payment_method_id or ""
        if not _is_due(account, profile) or await is_card_disputed(session, card_id):
            top_up.state, top_up.error = "expired", "It was needed no longer when it could be made."
            raise NotNeeded(top_up.error)
        return operation.params | {
            "customer_id": profile.stripe_customer_id,
            "payment_method_id": profile.payment_method_id,
        }

    def send(self, stripe: Stripe, operation: Operation) -> Answer:
        return stripe.charge_saved_card(
            operation.id, top_up_id=operation.subject_id, **operation.params
        )

    def find(self, stripe: Stripe, operation: Operation) -> Answer | None:
        found = stripe.find_payment(
            operation.subject_id, operation.searched_from, operation.params["customer_id"]
        )
        return None if found is None or found.status in _UNTRIED else found

    async def confirmed(self, session: AsyncSession, operation: Operation, answer: Payment) -> None:
        await settle(session, Seen(answer))

    async def refused(self, session: AsyncSession, operation: Operation, why: Refusal) -> None:
        top_up = await session.get_one(TopUp, operation.subject_id)
        top_up.payment_intent_id = top_up.payment_intent_id or why.payment_id or None
        await fail(session, top_up, "failed", _in_words(why))

    async def doubted(self, session: AsyncSession, operation: Operation, reason: str) -> None:
        """It stays under way, so that no other begins beside it."""
        top_up = await session.get_one(TopUp, operation.subject_id)
        if top_up.paid_at is None:
            top_up.error = reason[:MAX_ERROR_CHARS]
            await pause_recharge(
                session,
                operation.organization_id,
                "It is not known whether Stripe took the last payment.",
                {"top_up_id": top_up.id},
            )


def _in_words(why: Refusal) -> str:
    if "authentication_required" in (why.code, why.decline_code):
        return (
            "The bank wants the payment to be confirmed. Top up once through the page of Stripe, "
            "which also renews the card."
        )
    return why.message
