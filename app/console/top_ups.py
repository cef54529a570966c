"""Paying ahead from the console: to Stripe and back, and what became of it.

A form may not lead to another site, not even by a redirect: the content security policy forbids
it. So it leads to a page of ours that the browser leaves by itself.
"""

from typing import Any

from litestar import Response, Router, get, post
from litestar.params import FromPath, FromQuery

from app.api.writing import writing
from app.billing.payments.cents import parse_cents
from app.billing.payments.tables import TopUp
from app.billing.payments.top_ups import MAX_CENTS, MIN_CENTS
from app.console.billing import HERE, billing_page, payments_of
from app.console.billing_view import TOP_UP_LAMPS
from app.console.sessions import form_field, go, signed_in
from app.console.templating import PageRequest, page, render
from app.core.errors import AppError
from app.settings import Settings


@post("/billing/top-ups", status_code=200)
async def begin_top_up(request: PageRequest) -> Response[Any]:
    """Begins one and goes on to where it is paid."""
    principal = signed_in(request).principal
    principal.require("admin")
    settings: Settings = request.app.state.settings
    text = await form_field(request, "preset") or await form_field(request, "top_up")
    try:
        cents = parse_cents(text, "amount", MIN_CENTS, MAX_CENTS, settings.currency)
        transaction = writing(request, principal, "admin")
        made = await payments_of(request).begin_top_up(
            transaction, principal.organization_id, cents
        )
    except AppError as error:
        return await billing_page(request, error=error, sent={"top_up": text})
    return go(request, f"{HERE}/top-ups/{made.id}?pay=1")


@get("/billing/top-ups/{top_up_id:str}")
async def show_top_up(
    request: PageRequest, top_up_id: FromPath[str], pay: FromQuery[str] = ""
) -> Response[Any]:
    """How far it is; with `pay`, on to Stripe's page as soon as there is one."""
    top_up = await _top_up(request, top_up_id)
    shown = page(
        request,
        "billing/top_up.html",
        top_up=top_up,
        lamp=TOP_UP_LAMPS[top_up.state],
        pay=bool(pay),
    )
    if pay and is_open(top_up):
        # Stripe may still be making the page: then this one is asked for again.
        shown.headers["Refresh"] = f"0; url={top_up.checkout_url}" if top_up.checkout_url else "3"
    return shown


@get("/billing/top-ups/{top_up_id:str}/state")
async def show_state(request: PageRequest, top_up_id: FromPath[str]) -> Response[str]:
    """The part of a page that asks for itself until the top-up is over, and then for the page."""
    top_up = await _top_up(request, top_up_id)
    html = render("billing/_top_up.html", top_up=top_up, lamp=TOP_UP_LAMPS[top_up.state])
    headers = {} if is_open(top_up) else {"HX-Refresh": "true"}
    return Response(html, media_type="text/html; charset=utf-8", headers=headers)


@post("/billing/portal", status_code=200)
async def open_portal(request: PageRequest) -> Response[Any]:
    """To Stripe's page of cards and invoices."""
    principal = signed_in(request).principal
    principal.require("admin")
    try:
        transaction = writing(request, principal, "admin")
        url = await payments_of(request).open_portal(transaction, principal.organization_id)
    except AppError as error:
        return await billing_page(request, error=error)
    shown = page(request, "billing/leaving.html", url=url)
    shown.headers["Refresh"] = f"0; url={url}"
    return shown


def is_open(top_up: TopUp) -> bool:
    """Whether it may still be paid."""
    return top_up.state in ("created", "pending")


async def _top_up(request: PageRequest, top_up_id: str) -> TopUp:
    """After a look at Stripe. Raises `NotFound`."""
    principal = signed_in(request).principal
    principal.require("admin")
    return await payments_of(request).refresh_top_up(principal.organization_id, top_up_id)


router = Router("", route_handlers=[begin_top_up, show_top_up, show_state, open_portal])
