"""Usage added up for people: by key, model, day or dimension."""

from datetime import datetime
from typing import Any, Literal

import msgspec
from sqlalchemy import ColumnElement, String, case, cast, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from app.metering.tables import UsageEvent, UsageLine

GroupBy = Literal["model", "key", "day", "dimension"]
COUNTED = ("input", "cached_input", "output", "device_ms")


class UsageRow(msgspec.Struct, frozen=True):
    """What one group used. Waived usage counts as used, not as owed."""

    group: str
    requests: int
    input: int
    cached_input: int
    output: int
    device_ms: int
    amount_nano: int


async def usage_by(
    session: AsyncSession,
    organization_id: str,
    group_by: GroupBy,
    start: datetime,
    end: datetime,
) -> list[UsageRow]:
    """Usage of requests that finished in [start, end): days in order, others the dearest first.
    In the group of a dimension only that dimension is counted."""
    group, label = _group(session, group_by)
    in_range = (
        UsageEvent.organization_id == organization_id,
        UsageEvent.finished_at >= start,
        UsageEvent.finished_at < end,
    )
    statement = (
        select(
            label,
            func.count(func.distinct(UsageEvent.id)),
            *(
                func.sum(case((UsageLine.dimension == name, UsageLine.quantity), else_=0))
                for name in COUNTED
            ),
            func.sum(UsageLine.amount_nano),
        )
        .join(UsageLine, UsageLine.event_id == UsageEvent.id)
        .where(*in_range)
        .group_by(group)
    )
    rows = [_row(tuple(row)) for row in await session.execute(statement)]
    if group_by == "day":
        return sorted(rows, key=lambda row: row.group)
    return sorted(rows, key=lambda row: (-row.amount_nano, row.group))


async def total_nano(
    session: AsyncSession, organization_id: str, start: datetime, end: datetime
) -> int:
    """What the requests that finished in [start, end) cost."""
    total = await session.scalar(
        select(func.sum(UsageEvent.amount_nano)).where(
            UsageEvent.organization_id == organization_id,
            UsageEvent.finished_at >= start,
            UsageEvent.finished_at < end,
        )
    )
    return int(total or 0)


def _group(
    session: AsyncSession, group_by: GroupBy
) -> tuple[ColumnElement[Any], ColumnElement[Any]]:
    """What to group by, and how a group is called: two keys may have one name."""
    if group_by == "key":
        return _column(UsageEvent.api_key_id), func.max(UsageEvent.api_key_name)
    group = {
        "model": lambda: _column(UsageEvent.endpoint_name),
        "dimension": lambda: _column(UsageLine.dimension),
        "day": lambda: _day(session.get_bind().dialect.name),
    }[group_by]()
    return group, group


def _column(attribute: InstrumentedAttribute[str]) -> ColumnElement[Any]:
    return attribute.expression


def _day(dialect_name: str) -> ColumnElement[Any]:
    """The UTC day as `YYYY-MM-DD`."""
    if dialect_name == "sqlite":
        return func.substr(cast(UsageEvent.finished_at, String), 1, 10)
    return func.to_char(func.timezone("UTC", UsageEvent.finished_at), "YYYY-MM-DD")


def _row(values: tuple[Any, ...]) -> UsageRow:
    """PostgreSQL sums big integers to a decimal."""
    group, *numbers = values
    return UsageRow(str(group), *(int(number) for number in numbers))
