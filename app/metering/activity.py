"""Usage for the eye: what was asked lately, spend by day and dimension, what caching saved.

Sums by one group are in `service.py`, one request's lines in `receipts.py`.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, String, cast, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from app.metering.tables import UsageEvent, UsageLine


async def recent_events(
    session: AsyncSession, organization_id: str, start: datetime, end: datetime, limit: int
) -> Sequence[UsageEvent]:
    """The last requests that finished in [start, end), newest first."""
    rows = await session.scalars(
        select(UsageEvent)
        .where(
            UsageEvent.organization_id == organization_id,
            UsageEvent.finished_at >= start,
            UsageEvent.finished_at < end,
        )
        .order_by(UsageEvent.finished_at.desc())
        .limit(limit)
    )
    return rows.all()


async def spend_by_day(
    session: AsyncSession, organization_id: str, start: datetime, end: datetime
) -> dict[str, dict[str, int]]:
    """Nano-units by UTC day (`YYYY-MM-DD`) and dimension, of requests that finished in
    [start, end)."""
    day = _day(session)
    rows = await session.execute(
        select(day, UsageLine.dimension, func.sum(UsageLine.amount_nano))
        .join(UsageLine, UsageLine.event_id == UsageEvent.id)
        .where(
            UsageEvent.organization_id == organization_id,
            UsageEvent.finished_at >= start,
            UsageEvent.finished_at < end,
        )
        .group_by(day, UsageLine.dimension)
    )
    spend: dict[str, dict[str, int]] = {}
    for name, dimension, amount in rows:
        spend.setdefault(str(name), {})[dimension] = int(amount)
    return spend


async def saved_by_caching_nano(
    session: AsyncSession, organization_id: str, start: datetime, end: datetime
) -> int:
    """How much more the cached tokens would have cost at the input price of the same request.
    Waived requests saved nothing, because they cost nothing."""
    cached, fresh = aliased(UsageLine), aliased(UsageLine)
    at_input_price = cast(cached.quantity, BigInteger) * fresh.price_nano / fresh.unit_scale
    total = await session.scalar(
        select(func.sum(at_input_price - cached.amount_nano))
        .select_from(UsageEvent)
        .join(cached, (cached.event_id == UsageEvent.id) & (cached.dimension == "cached_input"))
        .join(fresh, (fresh.event_id == UsageEvent.id) & (fresh.dimension == "input"))
        .where(
            UsageEvent.organization_id == organization_id,
            UsageEvent.finished_at >= start,
            UsageEvent.finished_at < end,
            cached.disposition == "billed",
        )
    )
    return int(total or 0)


def _day(session: AsyncSession) -> ColumnElement[Any]:
    """The UTC day of a request as `YYYY-MM-DD`."""
    finished_at = UsageEvent.finished_at.expression
    if session.get_bind().dialect.name == "sqlite":
        return func.substr(cast(finished_at, String), 1, 10)
    return func.to_char(func.timezone("UTC", finished_at), "YYYY-MM-DD")
