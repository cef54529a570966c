"""What was used and not charged, because it was our fault or by the policy of its price book."""

from datetime import datetime

import msgspec
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.money import price_of
from app.metering.hours import period
from app.metering.tables import UsageHour, UsageSeries


class Waived(msgspec.Struct, frozen=True):
    """`worth_nano` is what it would have cost at its prices. `num_requests` counts those that
    would have had a price of their own."""

    num_requests: int
    worth_nano: int


async def read_waived(
    session: AsyncSession,
    organization_id: str,
    start: datetime,
    end: datetime,
    *,
    api_key_id: str | None = None,
    endpoint_name: str | None = None,
) -> Waived:
    """In the whole hours of [start, end), of one key or model where given."""
    hours = period(start, end)
    query = (
        select(
            UsageSeries.dimension,
            UsageSeries.price_nano,
            UsageSeries.unit_scale,
            func.sum(UsageHour.quantity),
        )
        .join(UsageHour, UsageHour.series_id == UsageSeries.id)
        .where(
            UsageSeries.organization_id == organization_id,
            UsageSeries.disposition == "waived",
            UsageHour.hour >= hours.first,
            UsageHour.hour < hours.until,
        )
        .group_by(UsageSeries.dimension, UsageSeries.price_nano, UsageSeries.unit_scale)
    )
    if api_key_id is not None:
        query = query.where(UsageSeries.api_key_id == api_key_id)
    if endpoint_name is not None:
        query = query.where(UsageSeries.endpoint_name == endpoint_name)
    num_requests = worth_nano = 0
    for dimension, price_nano, unit_scale, quantity in await session.execute(query):
        worth_nano += price_of(int(quantity), price_nano, unit_scale)
        if dimension == "request":
            num_requests += int(quantity)
    return Waived(num_requests, worth_nano)
