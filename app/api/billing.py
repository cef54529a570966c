"""Money paid to the box over HTTP: balance, credit, top-ups, saved card, refunds, and the webhook
of Stripe. What the payments are: `app.billing.payments`."""

from datetime import datetime
from typing import Any

import msgspec
from litestar import Request, Router, get, post, put
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from sqlalchemy.ext.asyncio import AsyncSession

from app.api.auth import allowed, authenticated, dependencies
from app.api.bodies import body_deadline
from app.api.writing import writing
from app.billing.credits import open_lots
from app.billing.ledger import lock_account
from app.billing.payments import profile as profiles
from app.billing.payments import recharge, top_ups
from app.billing.payments.cents import NANO_PER_CENT, parse_cents
from app.billing.payments.service import Payments
from app.billing.payments.tables import BillingProfile, TopUp
from app.billing.service import read_account
from app.billing.stripe_errors import BadSignature
from app.billing.tables import CreditLot
from app.core.database import Database
from app.core.errors import InvalidRequest
from app.core.money import write_amount
from app.organizations.principal import Principal
from app.settings import Settings

AnyRequest = Request[object, object, State]
MAX_WEBHOOK_BYTES = 1024**2
MAX_SHOWN = 50


class TopUpState(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: created, pending, paid, failed, expired, refunded or disputed. `url` is the page of
    Stripe where it is paid; null until there is one, and once it is over. Amounts are as people
    write them."""

    id: str
    kind: str
    state: str
    amount: str
    refunded: str
    disputed: str
    currency: str
    url: str | None
    error: str
    created_at: datetime
    paid_at: datetime | None


class Lot(msgspec.Struct, frozen=True, kw_only=True):
    """Credit that is left, in the order of use. `kind`: paid or promotional."""

    kind: str
    amount_nano: int
    remaining_nano: int
    expires_at: datetime | None
    note: str


class Recharge(msgspec.Struct, frozen=True, kw_only=True):
    """Below `below`, the saved card pays `amount`. `paused` says why it does not, after the card
    was declined."""

    below: str | None
    amount: str | None
    paused: str


class BillingState(msgspec.Struct, frozen=True, kw_only=True):
    """`balance_nano` is credit less what is owed; `held_nano` of it is reserved for running
    requests. Amounts in nano-units are 10^-9 of `currency`."""

    currency: str
    balance_nano: int
    held_nano: int
    spending_limit_nano: int | None
    takes_payments: bool
    email: str
    card: str | None
    recharge: Recharge
    lots: list[Lot]
    top_ups: list[TopUpState]


class NewTopUp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`amount` such as "25.00"."""

    amount: str


class NewRefund(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`amount` such as "25.00", of the top-up."""

    top_up_id: str
    amount: str


class RefundState(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: planned, sent, unknown (being looked for), confirmed, rejected, or quarantined (for
    a person to look at)."""

    id: str
    top_up_id: str
    state: str
    error: str


class NewRecharge(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Amounts such as "10.00"; null for both ends recharging."""

    below: str | None
    amount: str | None


class Contact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where bills go; may be empty."""

    email: str


class Portal(msgspec.Struct, frozen=True):
    """A page of Stripe, good for one visit soon."""

    url: str


@get("/", guards=[allowed("admin")], summary="Show balance, credit and how you pay")
async def show_billing(request: AnyRequest, principal: NamedDependency[Principal]) -> BillingState:
    """The newest top-ups come first."""
    database: Database = request.app.state.database
    async with database.read() as session:
        return await _state(session, principal.organization_id, request)


@post("/top-ups", guards=[allowed("admin")], summary="Pay ahead")
async def create_top_up(
    request: AnyRequest, principal: NamedDependency[Principal], data: JSONBody[NewTopUp]
) -> TopUpState:
    """The answer's `url` is the page of Stripe where it is paid, and where the card is kept for
    later. While Stripe is slow it is null: ask for the top-up again."""
    payments, settings = _payments(request), _settings(request)
    cents = parse_cents(
        data.amount, "amount", top_ups.MIN_CENTS, top_ups.MAX_CENTS, settings.currency
    )
    transaction = writing(request, principal, "admin")
    return _top_up(await payments.begin_top_up(transaction, principal.organization_id, cents))


@get("/top-ups/{top_up_id:str}", guards=[allowed("admin")], summary="Show one top-up")
async def show_top_up(
    request: AnyRequest, principal: NamedDependency[Principal], top_up_id: FromPath[str]
) -> TopUpState:
    """One that is not paid yet is looked at with Stripe first."""
    payments = _payments(request)
    return _top_up(await payments.refresh_top_up(principal.organization_id, top_up_id))


@post("/portal", guards=[allowed("admin")], summary="Open Stripe's page for cards and invoices")
async def open_portal(request: AnyRequest, principal: NamedDependency[Principal]) -> Portal:
    """Send the person there at once: the address is good for one visit."""
    transaction = writing(request, principal, "admin")
    return Portal(await _payments(request).open_portal(transaction, principal.organization_id))


@put("/recharge", guards=[allowed("admin")], summary="Recharge by the saved card")
async def set_recharge(
    request: AnyRequest, principal: NamedDependency[Principal], data: JSONBody[NewRecharge]
) -> Recharge:
    """Whenever less than `below` is left, `amount` is charged to the saved card. Goes on too, if
    it was paused after the card was declined."""
    currency = _settings(request).currency
    highest, lowest = top_ups.MAX_CENTS, top_ups.MIN_CENTS
    below = None if data.below is None else parse_cents(data.below, "below", 0, highest, currency)
    amount = data.amount
    cents = None if amount is None else parse_cents(amount, "amount", lowest, highest, currency)
    _ = _payments(request).link
    async with writing(request, principal, "admin") as session:
        profile = await recharge.set_recharge(
            session,
            principal.organization_id,
            None if below is None else below * NANO_PER_CENT,
            cents,
            currency,
        )
    return _recharge(profile)


@put("/contact", guards=[allowed("admin")], summary="Set where bills go")
async def set_contact(
    request: AnyRequest, principal: NamedDependency[Principal], data: JSONBody[Contact]
) -> Contact:
    """The address that Stripe gets with your next first payment."""
    email = profiles.parse_email(data.email)
    async with writing(request, principal, "admin") as session:
        await lock_account(session, principal.organization_id, _settings(request).currency)
        await profiles.set_email(session, principal.organization_id, email)
    return Contact(email=email)


@post("/refunds", guards=[allowed("admin")], summary="Refund a top-up (operator)")
async def create_refund(
    request: AnyRequest, principal: NamedDependency[Principal], data: JSONBody[NewRefund]
) -> RefundState:
    """Of any organization's. The credit is taken back once Stripe has made the refund; what was
    used up already is owed."""
    principal.require_operator()
    currency = _settings(request).currency
    cents = parse_cents(data.amount, "amount", 1, top_ups.MAX_CENTS, currency)
    transaction = writing(request, principal, "admin", operator=True)
    operation = await _payments(request).refund(transaction, data.top_up_id, cents)
    return RefundState(
        id=operation.id,
        top_up_id=operation.subject_id,
        state=operation.state,
        error=operation.error,
    )


@post(
    "/stripe",
    request_max_body_size=MAX_WEBHOOK_BYTES,
    summary="Webhook of Stripe",
    status_code=200,
)
async def receive_stripe(request: AnyRequest) -> dict[str, str]:
    """Only Stripe calls this: its signature is what lets it in. The event is stored and followed
    up later."""
    payments = _payments(request)
    _ = payments.link
    async with body_deadline():
        body = await request.body()
    try:
        event_id = await payments.receive(body, request.headers.get("stripe-signature", ""))
    except BadSignature as error:
        raise InvalidRequest(f"{error}.", code="bad_signature") from None
    request.app.state.clerk.wake("webhooks")
    return {"id": event_id}


async def _state(session: AsyncSession, organization_id: str, request: AnyRequest) -> BillingState:
    account = await read_account(session, organization_id, _settings(request).currency)
    profile = await profiles.read_profile(session, organization_id)
    shown = await top_ups.list_top_ups(session, organization_id, MAX_SHOWN)
    card = profile.card_label or ("saved card" if profile.payment_method_id else None)
    return BillingState(
        currency=account.currency,
        balance_nano=-account.owed_nano,
        held_nano=account.held_nano,
        spending_limit_nano=account.spending_limit_nano,
        takes_payments=_payments(request).is_configured,
        email=profile.email,
        card=card,
        recharge=_recharge(profile),
        lots=[_lot(lot) for lot in await open_lots(session, organization_id)],
        top_ups=[_top_up(top_up) for top_up in shown],
    )


def _recharge(profile: BillingProfile) -> Recharge:
    below, cents = profile.recharge_below_nano, profile.recharge_cents
    return Recharge(
        below=None if below is None else write_amount(below),
        amount=None if cents is None else _written(cents),
        paused=profile.recharge_paused,
    )


def _lot(lot: CreditLot) -> Lot:
    return Lot(**{name: getattr(lot, name) for name in Lot.__struct_fields__})


def _top_up(top_up: TopUp) -> TopUpState:
    is_open = top_up.state in ("created", "pending")
    return TopUpState(
        id=top_up.id,
        kind=top_up.kind,
        state=top_up.state,
        amount=_written(top_up.amount_cents),
        refunded=_written(top_up.refunded_cents),
        disputed=_written(top_up.disputed_cents),
        currency=top_up.currency,
        url=top_up.checkout_url if is_open else None,
        error=top_up.error,
        created_at=top_up.created_at,
        paid_at=top_up.paid_at,
    )


def _written(cents: int) -> str:
    return write_amount(cents * NANO_PER_CENT)


def _payments(request: AnyRequest) -> Payments:
    payments: Any = request.app.state.payments
    return payments


def _settings(request: AnyRequest) -> Settings:
    settings: Any = request.app.state.settings
    return settings


router = Router(
    "/api/billing",
    route_handlers=[
        show_billing,
        create_top_up,
        show_top_up,
        open_portal,
        set_recharge,
        set_contact,
        create_refund,
    ],
    guards=[authenticated],
    dependencies=dependencies,
    tags=["Billing"],
)
webhook_router = Router("/webhooks", route_handlers=[receive_stripe], tags=["Billing"])
