"""The page Billing, and its forms about the account: limit, recharging, card and address."""

from typing import Any

from litestar import Response, Router, get, post
from litestar.params import FromQuery

from app.api.writing import writing
from app.billing.ledger import lock_account
from app.billing.payments import profile as profiles
from app.billing.payments import recharge
from app.billing.payments.cents import NANO_PER_CENT, parse_cents
from app.billing.payments.service import Payments, StripeNotConfigured
from app.billing.payments.top_ups import MAX_CENTS, MIN_CENTS
from app.billing.service import parse_spending_limit, set_spending_limit
from app.console.billing_view import INVOICE_LAMPS, PRESETS, TOP_UP_LAMPS, read_billing
from app.console.sessions import form_field, go, signed_in
from app.console.templating import PageRequest, page
from app.core.database import Database
from app.core.errors import AppError
from app.core.money import write_amount
from app.settings import Settings

HERE = "/console/billing"


@get("/billing")
async def show_billing(
    request: PageRequest, top_up: FromQuery[str] = "", after: FromQuery[str] = ""
) -> Response[str]:
    """Where the organization stands; `top_up` is one that the person comes back from paying, and
    `after` where the page of invoices before ended."""
    return await billing_page(request, top_up_id=top_up, invoices_after=after)


@post("/billing/limit", status_code=200)
async def change_limit(request: PageRequest) -> Response[Any]:
    """How much the organization may owe; an empty field takes the limit away."""
    principal = signed_in(request).principal
    principal.require_operator()
    text = (await form_field(request, "spending_limit")).strip()
    settings: Settings = request.app.state.settings
    try:
        limit_nano = parse_spending_limit(text) if text else None
        async with writing(request, principal, "admin", operator=True) as session:
            await set_spending_limit(
                session, principal.organization_id, limit_nano, settings.currency
            )
    except AppError as error:
        return await billing_page(request, error=error, sent={"spending_limit": text})
    return go(request, f"{HERE}?notice=limit")


@post("/billing/recharge", status_code=200)
async def change_recharge(request: PageRequest) -> Response[Any]:
    """Below what the saved card pays how much; both empty to stop."""
    principal = signed_in(request).principal
    principal.require("admin")
    sent = {name: (await form_field(request, name)).strip() for name in ("below", "amount")}
    is_stop = await form_field(request, "stop") or not any(sent.values())
    settings: Settings = request.app.state.settings
    try:
        if not payments_of(request).is_configured:
            raise StripeNotConfigured
        below_nano = cents = None
        if not is_stop:
            currency = settings.currency
            below = parse_cents(sent["below"], "below", 0, MAX_CENTS, currency)
            below_nano = below * NANO_PER_CENT
            cents = parse_cents(sent["amount"], "amount", MIN_CENTS, MAX_CENTS, currency)
        async with writing(request, principal, "admin") as session:
            await recharge.set_recharge(
                session, principal.organization_id, below_nano, cents, settings.currency
            )
    except AppError as error:
        return await billing_page(request, error=error, sent=sent)
    return go(request, f"{HERE}?notice={'recharge-off' if is_stop else 'recharge'}#recharge")


@post("/billing/contact", status_code=200)
async def change_contact(request: PageRequest) -> Response[Any]:
    """Where bills go."""
    principal = signed_in(request).principal
    principal.require("admin")
    text = await form_field(request, "email")
    settings: Settings = request.app.state.settings
    try:
        email = profiles.parse_email(text)
    except AppError as error:
        return await billing_page(request, error=error, sent={"email": text})
    async with writing(request, principal, "admin") as session:
        await lock_account(session, principal.organization_id, settings.currency)
        await profiles.set_email(session, principal.organization_id, email)
    return go(request, f"{HERE}?notice=saved")


async def billing_page(
    request: PageRequest,
    *,
    top_up_id: str = "",
    invoices_after: str = "",
    error: AppError | None = None,
    sent: dict[str, str] | None = None,
    notify_secret: str = "",
) -> Response[str]:
    """The page; after a form that was refused with what it held, and why."""
    principal = signed_in(request).principal
    principal.require("read")
    settings: Settings = request.app.state.settings
    database: Database = request.app.state.database
    payments = payments_of(request)
    top_up = None
    if top_up_id:
        top_up = await payments.refresh_top_up(principal.organization_id, top_up_id)
    async with database.read() as session:
        view = await read_billing(
            session,
            principal,
            settings.currency,
            takes_payments=payments.is_configured,
            invoices_after=invoices_after,
        )
    limit_nano = view.limit_nano
    held = {
        "spending_limit": "" if limit_nano is None else write_amount(limit_nano),
        "below": view.recharge_below,
        "amount": view.recharge_amount,
        "email": view.profile.email,
        "low_balance": view.low_balance,
        "notify_url": view.profile.notify_url,
        "top_up": "",
        "of": "organization",
        "period": "month",
        "limit": "",
    }
    return page(
        request,
        "billing/billing.html",
        status_code=error.status if error else 200,
        view=view,
        invoices_after=invoices_after,
        top_up=top_up,
        lamp=TOP_UP_LAMPS[top_up.state] if top_up else None,
        lamps=TOP_UP_LAMPS,
        invoice_lamps=INVOICE_LAMPS,
        presets=PRESETS,
        may_change="admin" in principal.scopes,
        held=held | (sent or {}),
        error=error.message if error else "",
        param=(error.param or "") if error else "",
        notify_secret=notify_secret,
    )


def payments_of(request: PageRequest) -> Payments:
    payments: Payments = request.app.state.payments
    return payments


router = Router("", route_handlers=[show_billing, change_limit, change_recharge, change_contact])
