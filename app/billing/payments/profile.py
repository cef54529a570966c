"""Billing profiles: how an organization pays, its customer at Stripe and its saved card.

Owns their rows and the making of the customer. Charging the card is `recharge.py`'s.
"""

import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.payments import mirror
from app.billing.payments.notices import end, notify
from app.billing.payments.operations import (
    Answer,
    Kind,
    NotNeeded,
    Operation,
    Refusal,
    hasten,
    open_operations,
    plan,
)
from app.billing.payments.tables import BillingProfile, StripeOperation, TopUp
from app.billing.stripe import Stripe
from app.billing.stripe_objects import Customer, Dispute
from app.core import clock
from app.core.errors import InvalidRequest
from app.core.ids import new_id
from app.organizations.tables import Organization

MAX_EMAIL_CHARS = 254
EMAIL_REFUSED = "email_refused"  # a notice
MAX_REASON_CHARS = 200
_EMAIL = re.compile(r"[^@\s]+@[^@\s.]+(\.[^@\s.]+)+")


async def read_profile(session: AsyncSession, organization_id: str) -> BillingProfile:
    """The organization's, or an empty one that is not stored."""
    row = await session.get(BillingProfile, organization_id)
    return row or _empty(organization_id)


async def open_profile(session: AsyncSession, organization_id: str) -> BillingProfile:
    """The organization's, made if there is none, as it is now. The caller has locked its
    account."""
    row = await session.scalar(
        select(BillingProfile)
        .where(BillingProfile.organization_id == organization_id)
        .execution_options(populate_existing=True)
    )
    if row is None:
        row = _empty(organization_id)
        session.add(row)
        await session.flush()
    return row


def _empty(organization_id: str) -> BillingProfile:
    return BillingProfile(
        organization_id=organization_id,
        email="",
        card_label="",
        recharge_paused="",
        notify_url="",
        notify_secret="",
        updated_at=clock.now(),
    )


def parse_email(text: str) -> str:
    """Raises `InvalidRequest`. Empty is accepted: no address."""
    email = text.strip()
    if email and (len(email) > MAX_EMAIL_CHARS or not _EMAIL.fullmatch(email)):
        raise InvalidRequest(f"{text[:80]!r} is not an e-mail address.", param="email")
    return email


async def set_email(session: AsyncSession, organization_id: str, email: str) -> BillingProfile:
    """Where bills go. The customer at Stripe gets it when it is made, or now if it is there."""
    profile = await open_profile(session, organization_id)
    is_new = email != profile.email
    profile.email, profile.updated_at = email, clock.now()
    if is_new:
        await end(session, organization_id, EMAIL_REFUSED)
    if is_new and profile.stripe_customer_id is not None:
        await _plan_update(session, organization_id)
    return profile


async def keep_card(
    session: AsyncSession, organization_id: str, payment_method_id: str, card_label: str
) -> None:
    """The card that is charged from now on. A recharge that an older one stopped goes on."""
    profile = await open_profile(session, organization_id)
    if payment_method_id == profile.payment_method_id and not card_label:
        return
    if payment_method_id != profile.payment_method_id:
        profile.recharge_paused = ""
        await end(session, organization_id, "recharge_failed")
    profile.payment_method_id, profile.card_label = payment_method_id, card_label
    profile.updated_at = clock.now()


async def forget_card(session: AsyncSession, payment_method_id: str) -> None:
    """A card that was taken away at Stripe, which never comes back."""
    await session.execute(
        update(BillingProfile)
        .where(BillingProfile.payment_method_id == payment_method_id)
        .values(payment_method_id=None, card_label="", updated_at=clock.now())
    )


async def mark_card(
    session: AsyncSession, payment_method_id: str, payment_id: str, disputes: Sequence[Dispute]
) -> None:
    """What became of the disputes of a payment by this card. One that ended in our favour stays
    so: an older reading of it may be applied after a newer one."""
    id = f"card:{payment_method_id}"
    card = await mirror.read(session, id)
    known: dict[str, bool] = {} if card is None else dict(card.data)
    known.pop(payment_id, None)  # as was noted before disputes had their own
    for dispute in disputes:
        is_open = not dispute.is_in_our_favour
        known[dispute.id] = is_open and known.get(dispute.id, True)
    await mirror.put(session, id, "card", known)


async def is_card_disputed(session: AsyncSession, payment_method_id: str) -> bool:
    """Whether a payment by this card is disputed, or was with success."""
    card = await mirror.read(session, f"card:{payment_method_id}")
    return card is not None and any(card.data.values())


async def pause_recharge(
    session: AsyncSession, organization_id: str, reason: str, data: dict[str, Any]
) -> None:
    """The saved card is not charged again until a person has done something about it."""
    profile = await open_profile(session, organization_id)
    profile.recharge_paused, profile.updated_at = reason[:MAX_REASON_CHARS], clock.now()
    await notify(
        session,
        organization_id,
        "recharge_failed",
        f"Automatic recharging is paused: {reason}",
        data,
    )


async def follow_customer(session: AsyncSession, organization_id: str, customer: Customer) -> None:
    """After its state at Stripe: deleted, or with another card as the default. The caller has
    locked the account."""
    profile = await open_profile(session, organization_id)
    if customer.is_deleted:
        _forget_customer(profile)
    elif customer.default_payment_method:
        await keep_card(session, organization_id, customer.default_payment_method, "")


def _forget_customer(profile: BillingProfile) -> None:
    """With its card, which is gone as well."""
    profile.stripe_customer_id = profile.payment_method_id = None
    profile.card_label, profile.updated_at = "", clock.now()


async def organization_of_customer(session: AsyncSession, customer_id: str) -> str | None:
    """Whose customer at Stripe this is."""
    if not customer_id:
        return None
    query = select(BillingProfile.organization_id).where(
        BillingProfile.stripe_customer_id == customer_id
    )
    return await session.scalar(query)


async def need_customer(session: AsyncSession, organization_id: str) -> str | None:
    """The customer's id at Stripe; None while it is being made, which this begins. The caller has
    locked the account."""
    profile = await open_profile(session, organization_id)
    if profile.stripe_customer_id is None and not await open_operations(
        session, organization_id, CreateCustomer.name
    ):
        key = f"customer:{organization_id}:{new_id('op')}"
        await plan(session, CreateCustomer.name, key, organization_id, organization_id, {})
    return profile.stripe_customer_id


class CreateCustomer(Kind):
    """Makes the customer. A second one would never be paid by or charged."""

    name = "create_customer"
    is_harmless_twice = True

    async def prepare(self, session: AsyncSession, operation: Operation) -> dict[str, Any] | None:
        profile = await open_profile(session, operation.organization_id)
        if profile.stripe_customer_id is not None:
            raise NotNeeded("The customer is there.")
        organization = await session.get(Organization, operation.organization_id)
        name = operation.organization_id if organization is None else organization.name
        return {"name": name, "email": profile.email}

    def send(self, stripe: Stripe, operation: Operation) -> Answer:
        return stripe.create_customer(
            operation.id, organization_id=operation.organization_id, **operation.params
        )

    def find(self, stripe: Stripe, operation: Operation) -> Answer | None:
        return stripe.find_customer(operation.organization_id, operation.searched_from)

    async def confirmed(
        self, session: AsyncSession, operation: Operation, answer: Customer
    ) -> None:
        profile = await open_profile(session, operation.organization_id)
        profile.stripe_customer_id, profile.updated_at = answer.id, clock.now()
        await session.flush()
        if profile.email != operation.params["email"]:  # changed while it was being made
            await _plan_update(session, operation.organization_id)
        await hasten(session, operation.organization_id)

    async def refused(self, session: AsyncSession, operation: Operation, why: Refusal) -> None:
        """What waited for the customer has failed with it."""
        await _fail_waiting(session, operation.organization_id, why.message)


async def _plan_update(session: AsyncSession, organization_id: str) -> None:
    key = f"customer_update:{organization_id}:{new_id('op')}"
    await plan(session, UpdateCustomer.name, key, organization_id, organization_id, {})


class UpdateCustomer(Kind):
    """Brings a changed e-mail address to the customer: invoices are sent to that one."""

    name = "update_customer"
    is_harmless_twice = True

    async def prepare(self, session: AsyncSession, operation: Operation) -> dict[str, Any] | None:
        profile = await open_profile(session, operation.organization_id)
        if profile.stripe_customer_id is None:
            raise NotNeeded("The customer is gone.")
        return {"customer_id": profile.stripe_customer_id, "email": profile.email}

    def send(self, stripe: Stripe, operation: Operation) -> Answer:
        return stripe.update_customer(operation.id, **operation.params)

    def find(self, stripe: Stripe, operation: Operation) -> Answer | None:
        customer = stripe.get_customer(operation.params["customer_id"])
        is_done = customer.is_deleted or customer.email == operation.params["email"]
        return customer if is_done else None

    async def confirmed(
        self, session: AsyncSession, operation: Operation, answer: Customer
    ) -> None:
        """One that was long in doubt may have undone a later one."""
        await end(session, operation.organization_id, EMAIL_REFUSED)
        profile = await open_profile(session, operation.organization_id)
        if not answer.is_deleted and profile.email != operation.params["email"]:
            await _plan_update(session, operation.organization_id)

    async def refused(self, session: AsyncSession, operation: Operation, why: Refusal) -> None:
        """A customer that is gone is made again, with the address, when one is needed. An address
        that Stripe does not take is told of: bills would go on to the one before."""
        profile = await open_profile(session, operation.organization_id)
        email, customer_id = operation.params["email"], operation.params["customer_id"]
        if why.code == "resource_missing":
            if profile.stripe_customer_id == customer_id:
                _forget_customer(profile)
        elif profile.email == email:
            await notify(
                session,
                operation.organization_id,
                EMAIL_REFUSED,
                f"Bills do not go to {email!r} but to the address before: {why.message} Set "
                "another one under Billing.",
                {"email": email},
            )


async def _fail_waiting(session: AsyncSession, organization_id: str, reason: str) -> None:
    waiting = await session.scalars(
        select(TopUp).where(
            TopUp.organization_id == organization_id,
            TopUp.state == "created",
            TopUp.kind == "checkout",
        )
    )
    for top_up in waiting:
        top_up.state, top_up.error = "failed", reason[:300]
        await session.execute(
            update(StripeOperation)
            .where(StripeOperation.subject_id == top_up.id, StripeOperation.state == "planned")
            .values(state="rejected", error="The customer could not be made.")
        )
