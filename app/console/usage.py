"""The page Usage and spend, and one request's receipt."""

from litestar import Response, Router, get
from litestar.params import FromPath, FromQuery

from app.console.sessions import signed_in
from app.console.templating import PageRequest, page
from app.console.usage_view import DIMENSION_NAMES, read_usage, spend_chart
from app.core.database import Database
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
    chart = spend_chart(view)
    return page(request, "usage/usage.html", view=view, chart=chart, periods=PERIODS)


@get("/receipts/{request_id:str}")
async def show_receipt(request: PageRequest, request_id: FromPath[str]) -> Response[str]:
    """What one request used, at which prices."""
    principal = signed_in(request).principal
    principal.require("read")
    database: Database = request.app.state.database
    async with database.read() as session:
        receipt = await read_receipt(session, principal.organization_id, request_id)
    return page(request, "receipts/receipt.html", receipt=receipt, dimensions=DIMENSION_NAMES)


router = Router("", route_handlers=[show_usage, show_receipt])
