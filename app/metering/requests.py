"""Single requests of an organization, newest first, page after page. For as long as they are kept;
sums are in `service.py`.
"""

from collections.abc import Sequence
from datetime import datetime

import msgspec
from sqlalchemy import and_, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.metering.tables import UsageEvent, UsageLine


class RequestFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that ended in [start, end), of one key or model where given. The console's own key
    id is empty, and so not the same as None."""

    start: datetime
    end: datetime
    api_key_id: str | None = None
    endpoint_name: str | None = None


class Place(msgspec.Struct, frozen=True):
    """Where a page ended: requests that ended at the same instant are told apart by their id."""

    finished_at: datetime
    event_id: str


async def read_requests(
    session: AsyncSession,
    organization_id: str,
    wanted: RequestFilter,
    limit: int,
    after: Place | None = None,
) -> Sequence[UsageEvent]:
    """The newest, or those that come `after` a place."""
    query = select(UsageEvent).where(
        UsageEvent.organization_id == organization_id,
        UsageEvent.finished_at >= wanted.start,
        UsageEvent.finished_at < wanted.end,
    )
    if wanted.api_key_id is not None:
        query = query.where(UsageEvent.api_key_id == wanted.api_key_id)
    if wanted.endpoint_name is not None:
        query = query.where(UsageEvent.endpoint_name == wanted.endpoint_name)
    if after is not None:
        query = query.where(
            UsageEvent.finished_at <= after.finished_at,
            or_(
                UsageEvent.finished_at < after.finished_at,
                and_(UsageEvent.finished_at == after.finished_at, UsageEvent.id < after.event_id),
            ),
        )
    newest_first = (UsageEvent.finished_at.desc(), UsageEvent.id.desc())
    rows = await session.scalars(query.order_by(*newest_first).limit(limit))
    return rows.all()


async def quantities_of(
    session: AsyncSession, events: Sequence[UsageEvent]
) -> dict[str, dict[str, int]]:
    """What each event used, by its id and the dimension."""
    found: dict[str, dict[str, int]] = {event.id: {} for event in events}
    rows = await session.execute(
        select(UsageLine.event_id, UsageLine.dimension, UsageLine.quantity).where(
            UsageLine.event_id.in_(found)
        )
    )
    for event_id, dimension, quantity in rows:
        found[event_id][dimension] = quantity
    return found
