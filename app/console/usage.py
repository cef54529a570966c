"""The page Usage and spend, and one request's receipt."""

from typing import Any

from litestar import Response, Router, get, post
from litestar.params import FromPath, FromQuery

from app.billing.service import parse_spending_limit, set_spending_limit
from app.console.sessions import form_field, go, signed_in
from app.console.templating import PageRequest, page
from app.console.usage_view import DIMENSION_NAMES, read_usage, spend_chart
from app.core.database import Database
from app.core.money import write_amount
from app.deployments.serving_notes import serving_note
from app.metering.receipts import read_receipt
from app.settings import Settings

PERIODS = (7, 30, 90)


@get("/usage")
async def show_usage(request: PageRequest, days: FromQuery[int] = 30) -> Response[str]:
    """What was used in the last days, what it cost and what is owed."""
    principal = signed_in(request).principal
    principal.require("read")
    settings: Settings = request.app.state.settings
    database: Database = request.app.state.database
    num_days = days if days in PERIODS else 30
    async with database.read() as session:
        view = await read_usage(session, principal.organization_id, num_days, settings.currency)
    limit_nano = view.account.spending_limit_nano
    return page(
        request,
        "usage/usage.html",
        view=view,
        chart=spend_chart(view),
        periods=PERIODS,
        limit="" if limit_nano is None else write_amount(limit_nano),
    )


@post("/usage/limit", status_code=200)
async def change_limit(request: PageRequest) -> Response[Any]:
    """Sets how much the organization may owe; an empty field takes the limit away."""
    principal = signed_in(request).principal
    principal.require("admin")
    text = (await form_field(request, "spending_limit")).strip()
    limit_nano = parse_spending_limit(text) if text else None
    settings: Settings = request.app.state.settings
    database: Database = request.app.state.database
    async with database.write() as session:
        await set_spending_limit(session, principal.organization_id, limit_nano, settings.currency)
    return go(request, "/console/usage?notice=limit")


@get("/receipts/{request_id:str}")
async def show_receipt(request: PageRequest, request_id: FromPath[str]) -> Response[str]:
    """What one request used, at which prices."""
    principal = signed_in(request).principal
    principal.require("read")
    database: Database = request.app.state.database
    async with database.read() as session:
        receipt = await read_receipt(session, principal.organization_id, request_id)
        note = await serving_note(session, receipt.model, receipt.version)
    return page(
        request, "receipts/receipt.html", receipt=receipt, note=note, dimensions=DIMENSION_NAMES
    )


router = Router("", route_handlers=[show_usage, change_limit, show_receipt])
