"""The hours of a period, and what was used in them: sums of `usage_hour`, exact at the edges.

Owns what counts as within a period: what was posted to the ledger in it. Hours that a period
covers in part are added up from single requests, for as long as those are kept.
"""

from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Select, column, func, literal_column, select, table, text
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.core.database import Base, UtcDateTime
from app.metering.tables import UsageEvent, UsageHour, UsageLine, UsageSeries

HOUR = timedelta(hours=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
HOURS_PER_DAY = 24

_event, _line = (Base.metadata.tables[entity.__tablename__] for entity in (UsageEvent, UsageLine))
_series, _hour = (Base.metadata.tables[entity.__tablename__] for entity in (UsageSeries, UsageHour))
# Billing's, which tell when a request was posted: each of its transactions has one such entry.
_entry = table(
    "ledger_entry",
    column("transaction_id"),
    column("account"),
    column("created_at", UtcDateTime()),
)


class Cell(NamedTuple):
    """Sums of one key, model, class and dimension in one period of `num_hours`, that begins with
    `hour` (since 1970, UTC). Of single hours there are too many: those are sums of one dimension,
    and the rest is empty. A partial hour's `saved_nano` is zero."""

    hour: int
    api_key_id: str
    api_key_name: str
    endpoint_name: str
    service_class: str
    dimension: str
    quantity: int
    amount_nano: int
    saved_nano: int


class Edge(NamedTuple):
    """A part of one hour."""

    start: datetime
    end: datetime


class Period(msgspec.Struct, frozen=True):
    """Whole hours from `first` until before `until`, and parts of hours beside them."""

    first: int
    until: int
    edges: tuple[Edge, ...] = ()
    start: datetime = EPOCH
    end: datetime = EPOCH


def hour_of(at: datetime) -> int:
    return (at - EPOCH) // HOUR


def start_of(hour: int) -> datetime:
    return EPOCH + hour * HOUR


def period(
    start: datetime,
    end: datetime,
    detail_from: datetime | None = None,
    now: datetime | None = None,
) -> Period:
    """[start, end) as hours. Where it begins or ends within an hour, that hour is split if its
    single requests are kept (since `detail_from`; None: all are), else taken as a whole. Nothing
    is posted after `now` (None: this instant), so that the hour that has just begun needs no
    splitting at its end."""
    now = now or clock.now()
    first, until = hour_of(start), -((EPOCH - end) // HOUR)
    edges: list[Edge] = []

    def is_split(hour: int) -> bool:
        return detail_from is None or start_of(hour) >= detail_from

    if start > start_of(first) and is_split(first):
        edges.append(Edge(start, min(end, start_of(first + 1))))
        first += 1
    if end < now and first < until and end < start_of(until) and is_split(until - 1):
        edges.append(Edge(max(start, start_of(until - 1)), end))
        until -= 1
    exact_start = edges[0].start if edges and edges[0].start == start else start_of(first)
    exact_end = end if end >= now or (edges and edges[-1].end == end) else start_of(until)
    return Period(first, max(first, until), tuple(edges), exact_start, exact_end)


async def read_cells(
    session: AsyncSession, organization_id: str, within: Period, num_hours: int
) -> list[Cell]:
    """Everything used in a period, in order of time. `num_hours` is 1 or 24 for sums by hour or
    day, or 0 for those of the whole period, whose `hour` is 0."""
    cells = await _whole_hours(session, organization_id, within, num_hours)
    for edge in within.edges:
        cells += await _edge(session, organization_id, edge, num_hours)
    return sorted(cells)


async def _whole_hours(
    session: AsyncSession, organization_id: str, within: Period, num_hours: int
) -> list[Cell]:
    if within.first >= within.until:
        return []
    named: dict[Any, tuple[str, ...]] = {
        row[0]: row[1:] for row in await _series_of(session, organization_id)
    }
    grouping = _series.c.dimension if num_hours == 1 else _hour.c.series_id
    sums = (
        select(
            grouping,
            _beginning(_hour.c.hour, num_hours).label("at"),
            func.sum(_hour.c.quantity),
            func.sum(_hour.c.amount_nano),
            func.sum(_hour.c.saved_nano),
        )
        .join(_series, _series.c.id == _hour.c.series_id)
        .where(
            _series.c.organization_id == organization_id,
            _hour.c.hour >= within.first,
            _hour.c.hour < within.until,
        )
        .group_by(grouping, *([text("at")] if num_hours else []))
    )
    cells: list[Cell] = []
    for row in await session.execute(sums):
        group, hour, *numbers = tuple(row)
        names = named[group] if num_hours != 1 else ("", "", "", "", group)
        cells.append(Cell._make((hour, *names, *map(int, numbers))))
    return cells


async def _series_of(
    session: AsyncSession, organization_id: str
) -> list[tuple[str, str, str, str, str, str]]:
    """Id, key, its name, model, class and dimension."""
    rows = await session.execute(
        select(
            _series.c.id,
            _series.c.api_key_id,
            _series.c.api_key_name,
            _series.c.endpoint_name,
            _series.c.service_class,
            _series.c.dimension,
        ).where(_series.c.organization_id == organization_id)
    )
    return [tuple(row) for row in rows]


def _beginning(hour: ColumnElement[int], num_hours: int) -> ColumnElement[int]:
    """The first hour of the period that an hour belongs to."""
    if num_hours == 0:
        return literal_column("0")
    return hour if num_hours == 1 else hour - hour % num_hours


async def _edge(
    session: AsyncSession, organization_id: str, edge: Edge, num_hours: int
) -> list[Cell]:
    """From single requests. Some from before there were transactions without an amount belong to
    none: they count by when they ended, as their hours do.

    The account says whose the posted ones are. SQLite knows no sizes: were the organization named
    as well, it would go through all its events, and not through the few of each posting."""
    hour = hour_of(edge.start)
    at = hour - hour % num_hours if num_hours else 0
    posted = (
        _lines()
        .join(_entry, _entry.c.transaction_id == _event.c.ledger_transaction_id)
        .where(
            _entry.c.account == f"customer:{organization_id}",
            _entry.c.created_at >= edge.start,
            _entry.c.created_at < edge.end,
        )
    )
    unposted = _lines().where(
        _event.c.organization_id == organization_id,
        _event.c.ledger_transaction_id == "",
        _event.c.finished_at >= edge.start,
        _event.c.finished_at < edge.end,
    )
    cells: list[Cell] = []
    for query in (posted, unposted):
        for row in await session.execute(query):
            *names, quantity, amount_nano = tuple(row)
            cells.append(Cell._make((at, *names, int(quantity), int(amount_nano), 0)))
    return cells


def _lines() -> Select[*tuple[Any, ...]]:
    keys = (_event.c.endpoint_name, _event.c.service_class, _line.c.dimension)
    return (
        select(
            _event.c.api_key_id,
            func.max(_event.c.api_key_name),
            *keys,
            func.sum(_line.c.quantity),
            func.sum(_line.c.amount_nano),
        )
        .select_from(_event)
        .join(_line, _line.c.event_id == _event.c.id)
        .group_by(_event.c.api_key_id, *keys)
    )
