"""The operator's page Earnings: revenue, device cost and margin by model, and what prices would
have to be."""

from datetime import timedelta
from typing import Any

from litestar import Response, Router, get, post
from litestar.params import FromQuery
from litestar.response import Stream
from markupsafe import Markup

from app.api.earnings import as_csv, make_target, read_earnings
from app.api.writing import writing
from app.billing.costs import parse_hour, set_device_hour
from app.billing.earnings import Earnings, ModelEarnings, Target
from app.billing.prices import Item, PriceTable, draft_book
from app.console.charts import Length, grouped_lengths
from app.console.prices_form import MAX_ROWS, fields_of, form_of
from app.console.prices_view import DIMENSION_NAMES, UNITS
from app.console.sessions import form_field, go, signed_in
from app.console.templating import PageRequest, page
from app.core import clock
from app.core.money import format_nano, price_of, write_amount
from app.settings import Settings

PERIODS = (7, 30, 90)
MAX_CHARTED = 8
MAX_LISTED = 50  # all are in the file


@get("/earnings")
async def show_earnings(
    request: PageRequest,
    days: FromQuery[int] = 30,
    utilisation: FromQuery[int] = 50,
    margin: FromQuery[int] = 30,
) -> Response[str]:
    """The last days up to now."""
    signed_in(request).principal.require_operator()
    num_days = days if days in PERIODS else 30
    target = make_target(utilisation, margin)
    found = await _read(request, num_days, target)
    return page(
        request,
        "earnings/earnings.html",
        found=found,
        chart=_chart(found),
        periods=PERIODS,
        num_days=num_days,
        target=target,
        hour="" if found.hour_nano is None else write_amount(found.hour_nano),
        suggestions=[_suggestion(request, found, row) for row in found.models[:MAX_LISTED]],
        max_listed=MAX_LISTED,
    )


@get("/earnings.csv")
async def download_earnings(request: PageRequest, days: FromQuery[int] = 30) -> Stream:
    """The same as a file for spreadsheets."""
    signed_in(request).principal.require_operator()
    return as_csv(await _read(request, days if days in PERIODS else 30, Target()))


@post("/earnings/device-cost", status_code=200)
async def change_device_cost(request: PageRequest) -> Response[Any]:
    """Sets what an hour of the device costs."""
    principal = signed_in(request).principal
    principal.require_operator()
    hour_nano = parse_hour(await form_field(request, "hour"))
    settings: Settings = request.app.state.settings
    async with writing(request, principal, "admin", operator=True) as session:
        await set_device_hour(session, settings.device, hour_nano)
    return go(request, "/console/earnings?notice=device-cost")


async def _read(request: PageRequest, num_days: int, target: Target) -> Earnings:
    now = clock.now()
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    return await read_earnings(request, today - timedelta(days=num_days - 1), now, target)


def _chart(found: Earnings) -> Markup:
    """What each model brought beside what its device time cost."""

    def length(label: str, nano: int, *, is_marked: bool) -> Length:
        text = format_nano(nano, found.currency, 6)
        return Length(label, text, nano, is_marked)

    groups = [
        (
            row.model,
            [
                length("Billed", row.revenue_nano, is_marked=True),
                length("Device cost", row.cost_nano or 0, is_marked=False),
            ],
        )
        for row in found.models[:MAX_CHARTED]
    ]
    return grouped_lengths(groups, title="What was billed and what it cost, by model")


# --- suggested prices -------------------------------------------------------------------


def _suggestion(request: PageRequest, found: Earnings, row: ModelEarnings) -> dict[str, Any]:
    """For the template: prices as people quote them, and the form that opens them as a book."""
    standard = [price for price in row.suggestion.prices if price.service_class == "standard"]
    return {
        "model": row.model,
        "suggestion": row.suggestion,
        "device_ms": row.device_ms,
        "num_requests": row.num_requests,
        "rows": [
            (
                DIMENSION_NAMES[price.dimension],
                _quote(price.dimension, price.current_nano, price.unit_scale, found.currency),
                _quote(price.dimension, price.price_nano, price.unit_scale, found.currency),
                UNITS[price.dimension][1],
            )
            for price in standard
        ],
        "fields": _fields(request, row),
    }


def _quote(dimension: str, price_nano: int, unit_scale: int, currency: str) -> str:
    """Per million tokens or per hour, whatever the book's own scale is."""
    return format_nano(price_of(UNITS[dimension][0], price_nano, unit_scale), currency, 4)


def _fields(request: PageRequest, row: ModelEarnings) -> dict[str, str]:
    """The last price book with the suggested prices in it, as the page of prices reads it; empty
    where it would be too long for a page."""
    prices: PriceTable = request.app.state.prices
    last = prices.books[0]
    if not row.suggestion.prices:
        return {}
    suggested = {(price.dimension, price.service_class): price for price in row.suggestion.prices}
    items = [
        item
        for item in last.items
        if item.endpoint_name != row.model
        or (item.dimension, item.service_class) not in suggested
        or item.above_tokens
        or not item.is_all_day
    ] + [
        Item(
            endpoint_name=row.model,
            dimension=price.dimension,
            service_class=price.service_class,
            price_nano=price.price_nano,
            unit_scale=price.unit_scale,
        )
        for price in row.suggestion.prices
    ]
    if len(items) > MAX_ROWS:
        return {}
    book = draft_book(items, last.currency, last.effective_at, last.policy)
    return fields_of(form_of(book, last.id))


router = Router("", route_handlers=[show_earnings, download_earnings, change_device_cost])
