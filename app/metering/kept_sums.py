"""What pages show of an organization's usage, from sums that are kept once their hours have ended.

The same numbers as `hours.py` gives for whole hours, in a fraction of the time where there are many
models and keys.
"""

from datetime import datetime
from typing import Any, Literal

import msgspec
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from app.metering.closed_hours import HOURS_PER_DAY, open_day, read_in_parts
from app.metering.hours import Cell, period
from app.metering.service import UsageCells
from app.metering.tables import UsageHour, UsageSeries

Column = Literal["dimension", "endpoint_name", "api_key_name", "service_class"]


class Sums(msgspec.Struct, frozen=True):
    """The same usage three times: of each model, key (with its name) and class, by dimension. What
    else a cell names is empty. Days before the hour `open_from` are one; later cells are of the
    day of their hour."""

    open_from: int

    by_model: UsageCells
    by_key: UsageCells
    by_class: UsageCells


async def read_sums(
    session: AsyncSession,
    organization_id: str,
    start: datetime,
    end: datetime,
    *,
    api_key_id: str | None = None,
    endpoint_name: str | None = None,
    now: datetime,
) -> Sums:
    """Of the period's whole hours together, of one key or model where given."""

    async def read(first: int, until: int) -> list[tuple[Any, ...]]:
        query = (
            select(
                UsageSeries.api_key_id,
                UsageSeries.api_key_name,
                UsageSeries.endpoint_name,
                UsageSeries.service_class,
                UsageSeries.dimension,
                func.sum(UsageHour.quantity),
                func.sum(UsageHour.amount_nano),
                func.sum(UsageHour.saved_nano),
            )
            .join(UsageHour, UsageHour.series_id == UsageSeries.id)
            .where(
                UsageSeries.organization_id == organization_id,
                UsageHour.hour >= first,
                UsageHour.hour < until,
            )
            .group_by(UsageSeries.id)
        )
        if api_key_id is not None:
            query = query.where(UsageSeries.api_key_id == api_key_id)
        if endpoint_name is not None:
            query = query.where(UsageSeries.endpoint_name == endpoint_name)
        return _added_up(first, [tuple(row) for row in await session.execute(query)])

    within = period(start, end, now=now)
    name = ("sums", organization_id, api_key_id, endpoint_name)
    cells: dict[str, list[Cell]] = {"model": [], "key": [], "class": []}
    for by, cell in await read_in_parts(session, name, within.first, within.until, read, now):
        cells[by].append(cell)
    groups = (UsageCells(cells[by]) for by in ("model", "key", "class"))
    return Sums(open_day(now), *groups)


def _added_up(hour: int, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Cells with what they are of."""
    sums: dict[tuple[str, ...], list[int]] = {}
    for key_id, key_name, model, service_class, dimension, *numbers in rows:
        for group in (
            ("model", "", "", model, "", dimension),
            ("key", key_id, key_name, "", "", dimension),
            ("class", "", "", "", service_class, dimension),
        ):
            own = sums.setdefault(group, [0, 0, 0])
            for index, number in enumerate(numbers):
                own[index] += int(number)
    return [(names[0], Cell._make((hour, *names[1:], *numbers))) for names, numbers in sums.items()]


async def read_spend(
    session: AsyncSession,
    organization_id: str,
    start: datetime,
    end: datetime,
    column: Column,
    *,
    api_key_id: str | None = None,
    endpoint_name: str | None = None,
    now: datetime,
) -> list[tuple[int, str, int]]:
    """Of days that have ended for good: nano-units by the first hour of each UTC day (since 1970)
    and a column of the series, of one key or model where given."""
    group = getattr(UsageSeries, column)

    async def read(first: int, until: int) -> list[tuple[Any, ...]]:
        day = (UsageHour.hour - UsageHour.hour % HOURS_PER_DAY).label("day")
        query = (
            select(day, group, func.sum(UsageHour.amount_nano))
            .join(UsageHour, UsageHour.series_id == UsageSeries.id)
            .where(
                UsageSeries.organization_id == organization_id,
                UsageHour.hour >= first,
                UsageHour.hour < until,
            )
            .group_by(text("day"), group)
        )
        if api_key_id is not None:
            query = query.where(UsageSeries.api_key_id == api_key_id)
        if endpoint_name is not None:
            query = query.where(UsageSeries.endpoint_name == endpoint_name)
        return [(row[0], row[1], int(row[2])) for row in await session.execute(query)]

    within = period(start, end, now=now)
    until = min(within.until, open_day(now))
    if within.first >= until:
        return []
    name = ("spend", organization_id, column, api_key_id, endpoint_name)
    rows = await read_in_parts(session, name, within.first, until, read, now)
    return [(row[0], row[1], row[2]) for row in rows]
