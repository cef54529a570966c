"""`GET /api/usage`: what the organization used and owes."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, Router, get
from litestar.params import FromQuery, QueryParameter

from app.api.auth import bearer_principal
from app.api.relay import Relay
from app.billing.service import read_account
from app.core import clock
from app.core.database import Database
from app.core.errors import InvalidRequest
from app.metering.service import GroupBy, UsageRow, total_nano, usage_by
from app.settings import Settings

AnyRequest = Request[Any, Any, Any]
DEFAULT_DAYS = 30


class UsageAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`total_nano` is of the range; `owed_nano` is what the account owes now."""

    group_by: str
    start: datetime = msgspec.field(name="from")
    end: datetime = msgspec.field(name="to")
    currency: str
    rows: list[UsageRow]
    total_nano: int
    owed_nano: int
    held_nano: int
    spending_limit_nano: int | None


@get("/", summary="Usage and what is owed")
async def get_usage(
    request: AnyRequest,
    start: Annotated[str, QueryParameter(name="from", required=False)] = "",
    end: Annotated[str, QueryParameter(name="to", required=False)] = "",
    group_by: FromQuery[GroupBy] = "model",
) -> Response[UsageAnswer]:
    """Requests that ended from `from` (30 days ago) until before `to` (now)."""
    principal = await bearer_principal(request)
    principal.require("read")
    await _settled(request)
    until = _instant("to", end) if end else clock.now()
    since = _instant("from", start) if start else _days_before(until)
    if since >= until:
        raise InvalidRequest("from must be before to.", param="from")
    database: Database = request.app.state.database
    settings: Settings = request.app.state.settings
    organization_id = principal.organization_id
    async with database.read() as session:
        account = await read_account(session, organization_id, settings.currency)
        return Response(
            UsageAnswer(
                group_by=group_by,
                start=since,
                end=until,
                currency=account.currency,
                rows=await usage_by(session, organization_id, group_by, since, until),
                total_nano=await total_nano(session, organization_id, since, until),
                owed_nano=account.owed_nano,
                held_nano=account.held_nano,
                spending_limit_nano=account.spending_limit_nano,
            )
        )


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
    first = datetime.min.replace(tzinfo=UTC)
    return max(until, first + timedelta(days=DEFAULT_DAYS)) - timedelta(days=DEFAULT_DAYS)


async def _settled(request: AnyRequest) -> None:
    relay: Relay = request.app.state.relay
    await relay.settled()


router = Router("/api/usage", route_handlers=[get_usage], tags=["Usage"])
