"""Usage for the eye: what was asked lately, spend by day and dimension, what caching saved.

Sums by one group are in `service.py`, one request's lines in `receipts.py`.
"""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.metering.service import read_usage_days
from app.metering.tables import UsageEvent


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
    """Nano-units by UTC day (`YYYY-MM-DD`) and dimension, of what was posted in [start, end)."""
    cells = await read_usage_days(session, organization_id, start, end)
    return cells.spend_by_day()


async def saved_by_caching_nano(
    session: AsyncSession, organization_id: str, start: datetime, end: datetime
) -> int:
    """How much more the cached tokens would have cost at the input price of the same request.
    To be asked of whole hours."""
    cells = await read_usage_days(session, organization_id, start, end)
    return cells.saved_nano
