"""Single requests of an organization, newest first, page after page. For as long as they are kept;
sums are in `service.py`.
"""

from collections.abc import Sequence
from datetime import datetime

import msgspec
from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.core.errors import InvalidRequest
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

    @property
    def text(self) -> str:
        """As `read` takes it; it needs no quoting in an address."""
        return f"{self.finished_at.isoformat().replace('+00:00', 'Z')}~{self.event_id}"

    @staticmethod
    def read(text: str) -> "Place":
        """Raises `InvalidRequest`."""
        instant, _, event_id = text.partition("~")
        try:
            return Place(clock.in_utc(datetime.fromisoformat(instant)), event_id)
        except ValueError:
            raise InvalidRequest(
                "This page of requests does not exist: after is the next of the page before.",
                param="after",
            ) from None

    def older(self) -> ColumnElement[bool]:
        """The condition of what comes on the next page, the newest being first."""
        return and_(
            UsageEvent.finished_at <= self.finished_at,  # what an index can find
            or_(UsageEvent.finished_at < self.finished_at, UsageEvent.id < self.event_id),
        )


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
        query = query.where(after.older())
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
