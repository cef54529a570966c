"""`/api/earnings`: what the box earns and costs by model, for the operator, and what an hour of
its device costs."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, Response, Router, get, put
from litestar.params import FromQuery, QueryParameter
from litestar.response import Stream
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.api.auth import bearer_principal, principal_after_body
from app.api.bodies import decode
from app.api.relay import Relay
from app.api.writing import writing
from app.billing.costs import device_hour_nano, set_device_hour
from app.billing.earnings import Earnings, Question, Target, earnings, read_uses
from app.billing.prices import PriceTable
from app.core import clock
from app.core.csv_text import csv_blocks
from app.core.database import Database
from app.core.errors import InvalidRequest
from app.core.money import write_amount
from app.metering.hours import hour_of, start_of
from app.organizations.service import default_organization_id
from app.organizations.tables import Organization
from app.settings import Settings

AnyRequest = Request[Any, Any, Any]
Since = Annotated[str, QueryParameter(name="from", required=False)]
Until = Annotated[str, QueryParameter(name="to", required=False)]
DEFAULT_DAYS = 30
NUM_DEVICES = 1  # of a box; its workers share it
HEADER = (
    *("model", "requests", "prompt_tokens", "cached_tokens", "output_tokens", "device_ms"),
    *("revenue", "waived", "device_cost", "margin_nano", "currency"),
)


class DeviceHour(msgspec.Struct, frozen=True, kw_only=True):
    """What an hour of the box's device costs, in nano-units of its currency; None while nobody
    has said it."""

    device: str
    hour_nano: int | None
    currency: str


class NewDeviceHour(msgspec.Struct, frozen=True):
    hour_nano: int


_decoder = msgspec.json.Decoder(NewDeviceHour)


@get("/earnings", summary="Earnings, costs and margin by model")
async def get_earnings(
    request: AnyRequest,
    start: Since = "",
    end: Until = "",
    utilisation_percent: FromQuery[int] = 50,
    margin_percent: FromQuery[int] = 30,
    format: FromQuery[Literal["json", "csv"]] = "json",
) -> Response[Earnings] | Stream:
    """Whole hours from `from` (30 days ago) until `to` (now). Suggested prices are such that, if
    `utilisation_percent` of each device hour is sold, `margin_percent` remain above its cost.
    Only the operator sees them."""
    principal = await bearer_principal(request)
    principal.require_operator()
    now = clock.now()
    until = min(_instant("to", end), now) if end else now
    since = _instant("from", start) if start else until - timedelta(days=DEFAULT_DAYS)
    if since >= until:
        raise InvalidRequest("from must be before to.", param="from")
    target = make_target(utilisation_percent, margin_percent)
    found = await read_earnings(request, since, until, target)
    return as_csv(found) if format == "csv" else Response(found)


@get("/device-cost", summary="What an hour of the device costs")
async def get_device_cost(request: AnyRequest) -> Response[DeviceHour]:
    """As the operator has set it."""
    principal = await bearer_principal(request)
    principal.require_operator()
    database: Database = request.app.state.database
    async with database.read() as session:
        return Response(await _device_hour(request, session))


@put("/device-cost", summary="Set what an hour of the device costs")
async def put_device_cost(request: AnyRequest) -> Response[DeviceHour]:
    """Costs and margins of all periods are computed with it."""
    principal = await principal_after_body(request)
    principal.require_operator()
    hour_nano = decode(_decoder, await request.body()).hour_nano
    settings: Settings = request.app.state.settings
    async with writing(request, principal, "admin", operator=True) as session:
        await set_device_hour(session, settings.device, hour_nano)
        return Response(await _device_hour(request, session))


async def _device_hour(request: AnyRequest, session: AsyncSession) -> DeviceHour:
    settings: Settings = request.app.state.settings
    return DeviceHour(
        device=settings.device,
        hour_nano=await device_hour_nano(session, settings.device),
        currency=settings.currency,
    )


def make_target(utilisation_percent: int, margin_percent: int) -> Target:
    """Raises `InvalidRequest`."""
    if not 1 <= utilisation_percent <= 100:
        raise InvalidRequest("utilisation_percent is 1 to 100.", param="utilisation_percent")
    if not 0 <= margin_percent <= 1000:
        raise InvalidRequest("margin_percent is 0 to 1000.", param="margin_percent")
    return Target(utilisation_percent, margin_percent)


async def read_earnings(
    request: AnyRequest, since: datetime, until: datetime, target: Target
) -> Earnings:
    """Of whole hours, from when there was a box, once all that has ended until now is posted."""
    state = request.app.state
    settings: Settings = state.settings
    prices: PriceTable = state.prices
    relay: Relay = state.relay
    database: Database = state.database
    await relay.settled()
    async with database.read() as session:
        created_at = await session.scalar(
            select(Organization.created_at).where(
                Organization.id == await default_organization_id(session)
            )
        )
        start = start_of(hour_of(since))
        uses = await read_uses(session, start, until)
        hour_nano = await device_hour_nano(session, settings.device)
    question = Question(
        start=start if created_at is None else min(max(start, created_at), until),
        end=until,
        currency=settings.currency,
        device=settings.device,
        num_devices=NUM_DEVICES,
        hour_nano=hour_nano,
        target=target,
    )
    return earnings(uses, question, prices.active)


def _instant(name: str, text: str) -> datetime:
    try:
        instant = datetime.fromisoformat(text)
        return clock.in_utc(instant if instant.tzinfo else instant.replace(tzinfo=UTC))
    except ValueError:
        raise InvalidRequest(
            f"{name}: {text!r} is not a time such as 2026-01-31T00:00:00Z.", param=name
        ) from None


def as_csv(found: Earnings) -> Stream:
    """A row for each model. Names that a spreadsheet would take for a formula are preceded by an
    apostrophe."""
    name = f"earnings-{found.start:%Y%m%d}-{found.end:%Y%m%d}.csv"
    return Stream(
        csv_blocks(HEADER, _rows(found)),
        media_type="text/csv",
        headers={
            "Content-Disposition": f'attachment; filename="{name}"',
            "X-Content-Type-Options": "nosniff",
        },
    )


def _rows(found: Earnings) -> Iterator[list[str | int]]:
    for row in found.models:
        yield [
            *(row.model, row.num_requests, row.prompt_tokens, row.cached_tokens),
            *(row.output_tokens, row.device_ms),
            *(write_amount(nano) for nano in (row.revenue_nano, row.waived_nano)),
            "" if row.cost_nano is None else write_amount(row.cost_nano),
            "" if row.margin_nano is None else row.margin_nano,  # a number, for it may be below 0
            found.currency,
        ]


router = Router(
    "/api", route_handlers=[get_earnings, get_device_cost, put_device_cost], tags=["Earnings"]
)
