"""The operator's page Books: the numbers that must agree, side by side, and what ever differed."""

from datetime import datetime
from typing import Any

from litestar import Response, Router, get, post
from litestar.params import FromQuery

from app.api.writing import writing
from app.billing.payments import steady_clock
from app.billing.reconciliation.check import Check
from app.billing.reconciliation.reconciler import SECONDS, Reconciler
from app.billing.reconciliation.runs import find_run, past_differences
from app.console.lamps import Lamp
from app.console.sessions import go, signed_in
from app.console.templating import PageRequest, page
from app.core import clock
from app.core.database import Database
from app.core.errors import InvalidRequest
from app.core.money import format_nano
from app.settings import Settings

NUM_PAST = 25


@get("/books")
async def show_books(request: PageRequest, run: FromQuery[str] = "") -> Response[str]:
    """The last comparison, or the one that is asked for."""
    signed_in(request).principal.require_operator()
    settings: Settings = request.app.state.settings
    database: Database = request.app.state.database
    reconciler: Reconciler = request.app.state.reconciler
    latest = await reconciler.latest()
    async with database.read() as session:
        shown = await find_run(session, run) if run else latest
        past = await past_differences(session, NUM_PAST)
        clock_waits_since = await steady_clock.waits_since(session)

    def amount(check: Check, number: int) -> str:
        return format_number(check, number, settings.currency)

    return page(
        request,
        "books/books.html",
        run=shown,
        is_latest=shown is None or latest is None or shown.id == latest.id,
        past=past,
        lamp=lamp,
        amount=amount,
        every_seconds=round(SECONDS),
        now=clock.now(),
        clock_waits_since=clock_waits_since,
    )


@post("/books", status_code=200)
async def compare_now(request: PageRequest) -> Response[Any]:
    """Compares, then shows the page."""
    signed_in(request).principal.require_operator()
    reconciler: Reconciler = request.app.state.reconciler
    await reconciler.run()
    return go(request, "/console/books?notice=compared")


@post("/books/clock", status_code=200)
async def confirm_clock(request: PageRequest) -> Response[Any]:
    """The operator says that the time which the page showed is right."""
    principal = signed_in(request).principal
    principal.require_operator()
    try:
        told = datetime.fromisoformat(str((await request.form()).get("now", "")))
    except ValueError:
        raise InvalidRequest("now is an instant such as 2026-03-01T12:00Z.", param="now") from None
    async with writing(request, principal, "admin", operator=True) as session:
        await steady_clock.confirm(session, told)
    request.app.state.clerk.wake("months")
    return go(request, "/console/books?notice=clock-confirmed")


def lamp(check: Check) -> Lamp:
    """What two comparisons in a row found is an alarm; what one found may be a moment's."""
    if check.skipped and check.is_clean:
        return Lamp("", "not compared")
    if check.is_clean:
        return Lamp("good", "agree")
    return Lamp("bad", "differ") if check.confirmed else Lamp("busy", "looking again")


def format_number(check: Check, number: int, currency: str) -> str:
    """In the check's unit, to its last digit."""
    if check.unit == "nano":
        return format_nano(number, currency, 9)
    if check.unit == "cents":
        return format_nano(number * 10_000_000, currency, 2)
    return f"{number:,} ms" if check.unit == "ms" else f"{number:,}"


router = Router("", route_handlers=[show_books, compare_now, confirm_clock])
