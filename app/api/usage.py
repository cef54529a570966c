"""`GET /api/usage`: what the organization used and owes, as JSON or CSV."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, cast

import msgspec
from litestar import Request, Response, Router, get
from litestar.params import FromQuery, QueryParameter
from litestar.response import Stream

from app.api.auth import bearer_principal
from app.api.relay import Relay
from app.billing.records import Records
from app.billing.service import read_account
from app.core import clock
from app.core.csv_text import csv_blocks
from app.core.database import Database
from app.core.errors import InvalidRequest
from app.core.money import write_amount
from app.metering.hours import Period, hour_of, period, start_of
from app.metering.service import COUNTED, GroupBy, UsageCells, UsageRow, read_usage
from app.settings import Settings

AnyRequest = Request[Any, Any, Any]
Since = Annotated[str, QueryParameter(name="from", required=False)]
Until = Annotated[str, QueryParameter(name="to", required=False)]
DEFAULT_DAYS = 30


class UsageAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`total_nano` is of the range; `owed_nano` is what the account owes now. `from` and `to` are
    what was added up: whole hours where single requests are no longer kept."""

    group_by: str
    start: datetime = msgspec.field(name="from")
    end: datetime = msgspec.field(name="to")
    currency: str
    rows: list[UsageRow]
    total_nano: int
    owed_nano: int
    held_nano: int
    spending_limit_nano: int | None


@get("/usage", summary="Usage and what is owed")
async def get_usage(
    request: AnyRequest,
    start: Since = "",
    end: Until = "",
    group_by: FromQuery[GroupBy] = "model",
    format: FromQuery[Literal["json", "csv"]] = "json",
) -> Response[UsageAnswer]:
    """What was charged from `from` (30 days ago, at the hour) until before `to` (now): a request
    is, within moments of its end. With `format=csv` as a file for spreadsheets."""
    principal = await bearer_principal(request)
    principal.require("read")
    within = await _period(request, start, end)
    database: Database = request.app.state.database
    settings: Settings = request.app.state.settings
    organization_id = principal.organization_id
    async with database.read() as session:
        account = await read_account(session, organization_id, settings.currency)
        cells = await read_usage(session, organization_id, within, group_by)
    if format == "csv":  # documented by the route of its own
        return cast("Any", _csv(within, cells, group_by, account.currency))
    return Response(
        UsageAnswer(
            group_by=group_by,
            start=within.start,
            end=within.end,
            currency=account.currency,
            rows=cells.rows(group_by),
            total_nano=cells.total_nano,
            owed_nano=account.owed_nano,
            held_nano=account.held_nano,
            spending_limit_nano=account.spending_limit_nano,
        )
    )


@get("/usage.csv", summary="Usage as a file for spreadsheets")
async def get_usage_csv(
    request: AnyRequest,
    start: Since = "",
    end: Until = "",
    group_by: FromQuery[GroupBy] = "model",
) -> Stream:
    """The same rows as `/api/usage`. Names that a spreadsheet would take for a formula are
    preceded by an apostrophe."""
    principal = await bearer_principal(request)
    principal.require("read")
    within = await _period(request, start, end)
    database: Database = request.app.state.database
    settings: Settings = request.app.state.settings
    organization_id = principal.organization_id
    async with database.read() as session:
        account = await read_account(session, organization_id, settings.currency)
        cells = await read_usage(session, organization_id, within, group_by)
    return _csv(within, cells, group_by, account.currency)


def _csv(within: Period, cells: UsageCells, group_by: GroupBy, currency: str) -> Stream:
    header = [group_by, "requests", *COUNTED, "amount", "currency"]
    rows = (
        [
            row.group,
            row.requests,
            *(getattr(row, name) for name in COUNTED),
            write_amount(row.amount_nano),
            currency,
        ]
        for row in cells.rows(group_by)
    )
    name = f"usage-{within.start:%Y%m%dT%H%M}-{within.end:%Y%m%dT%H%M}-by-{group_by}.csv"
    return Stream(
        csv_blocks(header, rows),
        media_type="text/csv",
        headers={
            "Content-Disposition": f'attachment; filename="{name}"',
            "X-Content-Type-Options": "nosniff",
        },
    )


async def _period(request: AnyRequest, start: str, end: str) -> Period:
    """What is asked for, once all that has ended until now is posted."""
    relay: Relay = request.app.state.relay
    await relay.settled()
    settings: Settings = request.app.state.settings
    records: Records = request.app.state.records
    detail_from = await records.detail_from(settings.usage_detail_days)
    now = clock.now()
    until = _instant("to", end) if end else now
    since = _instant("from", start) if start else _days_before(until)
    if since >= until:
        raise InvalidRequest("from must be before to.", param="from")
    return period(since, until, detail_from, now)


def _instant(name: str, text: str) -> datetime:
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(
            f"{name}: {text!r} is not a time such as 2026-01-31T00:00:00Z.", param=name
        ) from None
    try:
        return clock.in_utc(instant)
    except ValueError as error:
        raise InvalidRequest(f"{name} {error}.", param=name) from None


def _days_before(until: datetime) -> datetime:
    """At the hour, so that nothing but sums has to be read."""
    first = datetime.min.replace(tzinfo=UTC)
    since = max(until, first + timedelta(days=DEFAULT_DAYS)) - timedelta(days=DEFAULT_DAYS)
    return start_of(hour_of(since))


router = Router("/api", route_handlers=[get_usage, get_usage_csv], tags=["Usage"])
