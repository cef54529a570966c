"""What a time that is past would have cost under another price book, and how books differ.

Requests are rated again one by one from the quantities of their settled lines, exactly: under the
book that they were charged by, the amounts are the same to the nano-unit. Where there are too many
of them, the sums by the hour are rated instead, and the answer says that it is an estimate.
"""

from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

import msgspec
from sqlalchemy import and_, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.policy import WAIVED
from app.billing.prices import Book, Item
from app.billing.rating import PROMPT_DIMENSIONS, TOKEN_DIMENSIONS, lines_of
from app.billing.tables import AccountBalance
from app.billing.usage_archive import NOTHING_ARCHIVED, detail_from
from app.core import clock
from app.core.database import Database
from app.metering.hours import period
from app.metering.tables import DIMENSIONS, UsageEvent, UsageHour, UsageLine, UsageSeries

MAX_EVENTS = 200_000
MAX_SECONDS = 20.0  # then the hours have to do
CHUNK = 200  # events rated in one go: a few milliseconds of the event loop

ALL_DIMENSIONS = frozenset(DIMENSIONS)


class ModelChange(msgspec.Struct, frozen=True):
    """What one endpoint's usage cost, and what it would have cost."""

    endpoint_name: str
    old_nano: int
    new_nano: int

    @property
    def difference_nano(self) -> int:
        return self.new_nano - self.old_nano


class Repricing(msgspec.Struct, frozen=True):
    """A period under another book. `num_events` is None for an estimate."""

    since: datetime
    until: datetime
    models: list[ModelChange]
    num_events: int | None

    @property
    def is_estimate(self) -> bool:
        return self.num_events is None

    @property
    def old_nano(self) -> int:
        return sum(model.old_nano for model in self.models)

    @property
    def new_nano(self) -> int:
        return sum(model.new_nano for model in self.models)


class ItemChange(msgspec.Struct, frozen=True):
    """An item that only one of two books has, or that both have with other prices."""

    kind: Literal["new", "changed", "removed"]
    item: Item
    old: Item | None = None


def compare_items(old: Iterable[Item], new: Iterable[Item]) -> list[ItemChange]:
    """In the order of what they are for."""
    before = {_key(item): item for item in old}
    after = {_key(item): item for item in new}
    changes: list[ItemChange] = []
    for key in sorted(before.keys() | after.keys()):
        was, item = before.get(key), after.get(key)
        if item is None:
            assert was is not None
            changes.append(ItemChange("removed", was, was))
        elif was is None:
            changes.append(ItemChange("new", item))
        elif was != item:
            changes.append(ItemChange("changed", item, was))
    return changes


def _key(item: Item) -> tuple[str, str, str, int, int, int]:
    scope = (item.endpoint_name, item.dimension, item.service_class)
    return (*scope, item.above_tokens, item.from_minute, item.until_minute)


async def reprice_last_month(
    database: Database,
    book: Book,
    detail_days: int,
    archived_until: datetime = NOTHING_ARCHIVED,
) -> Repricing:
    """The last whole month (UTC) under `book`; this month so far on a box that served nothing
    then. Requests are on record one by one as `detail_from` says."""
    now = clock.now()
    this_month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    last_month = (this_month - timedelta(days=1)).replace(day=1)
    kept = (detail_days, archived_until)
    found = await reprice(database, book, last_month, this_month, *kept)
    return found if found.models else await reprice(database, book, this_month, now, *kept)


async def reprice(
    database: Database,
    book: Book,
    since: datetime,
    until: datetime,
    detail_days: int,
    archived_until: datetime = NOTHING_ARCHIVED,
) -> Repricing:
    """The requests that ended from `since` until before `until`, of all organizations."""
    if since >= detail_from(detail_days, archived_until):
        exact = await _reprice_events(database, book, since, until)
        if exact is not None:
            return exact
    return await _reprice_hours(database, book, since, until)


# --- one by one -------------------------------------------------------------------------


async def _reprice_events(
    database: Database, book: Book, since: datetime, until: datetime
) -> Repricing | None:
    """None when there are too many, or it takes too long."""
    deadline_seconds = clock.monotonic_ns() / 1e9 + MAX_SECONDS
    sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    num_events = 0
    async with database.read() as session:
        organizations = (await session.scalars(select(AccountBalance.organization_id))).all()
        if await _has_too_many(session, organizations, since, until):
            return None
    for organization_id in organizations:
        async for events, quantities in _chunks(database, organization_id, since, until):
            for event in events:
                sums_of_model = sums[event.endpoint_name]
                sums_of_model[0] += event.amount_nano
                sums_of_model[1] += rate_again(book, event, quantities.get(event.id, {}))
            num_events += len(events)
            if num_events > MAX_EVENTS or clock.monotonic_ns() / 1e9 > deadline_seconds:
                return None
    return Repricing(since, until, _model_changes(sums), num_events)


def rate_again(book: Book, event: Any, quantities: Mapping[str, int]) -> int:
    """Nano-units of one event's lines under `book`. Device time is billed of what counts no tokens
    only: a decoder's is in the price of its tokens."""
    num_prompt_tokens = sum(quantities.get(name, 0) for name in PROMPT_DIMENSIONS)
    rates = book.rates(
        event.endpoint_name, event.service_class, num_prompt_tokens, event.started_at
    )
    has_tokens = not TOKEN_DIMENSIONS.isdisjoint(quantities)
    billed = ALL_DIMENSIONS - {"device_ms"} if has_tokens else ALL_DIMENSIONS
    return sum(line.amount_nano for line in lines_of(quantities, event.outcome, billed, rates))


async def _has_too_many(
    session: AsyncSession, organizations: Sequence[str], since: datetime, until: datetime
) -> bool:
    left = MAX_EVENTS
    for organization_id in organizations:
        few = (
            select(UsageEvent.id)
            .where(
                UsageEvent.organization_id == organization_id,
                UsageEvent.finished_at >= since,
                UsageEvent.finished_at < until,
            )
            .limit(left + 1)
        )
        left -= await session.scalar(select(func.count()).select_from(few.subquery())) or 0
        if left < 0:
            return True
    return False


async def _chunks(
    database: Database, organization_id: str, since: datetime, until: datetime
) -> AsyncIterator[tuple[Sequence[Any], dict[str, dict[str, int]]]]:
    """Events in the order of their end, each chunk in a short transaction of its own."""
    columns = (
        UsageEvent.id,
        UsageEvent.endpoint_name,
        UsageEvent.service_class,
        UsageEvent.outcome,
        UsageEvent.amount_nano,
        UsageEvent.started_at,
        UsageEvent.finished_at,
    )
    first = (
        select(*columns)
        .where(UsageEvent.organization_id == organization_id, UsageEvent.finished_at < until)
        .order_by(UsageEvent.finished_at, UsageEvent.id)
        .limit(CHUNK)
    )
    after = UsageEvent.finished_at >= since
    while True:
        async with database.read() as session:
            events = (await session.execute(first.where(after))).all()
            quantities = await _quantities(session, [event.id for event in events])
        if events:
            yield events, quantities
        if len(events) < CHUNK:
            return
        last = events[-1]
        after = and_(
            UsageEvent.finished_at >= last.finished_at,  # what an index can find
            or_(UsageEvent.finished_at > last.finished_at, UsageEvent.id > last.id),
        )


async def _quantities(session: AsyncSession, event_ids: list[str]) -> dict[str, dict[str, int]]:
    rows = await session.execute(
        select(UsageLine.event_id, UsageLine.dimension, UsageLine.quantity).where(
            UsageLine.event_id.in_(event_ids)
        )
    )
    quantities: dict[str, dict[str, int]] = {}
    for event_id, dimension, quantity in rows:
        quantities.setdefault(event_id, {})[dimension] = quantity
    return quantities


# --- by the hour ------------------------------------------------------------------------


async def _reprice_hours(
    database: Database, book: Book, since: datetime, until: datetime
) -> Repricing:
    """From sums over all requests of a model and class, by hour of the day: every prompt counts
    as a short one, and what was waived as waived."""
    async with database.read() as session:
        rows = (await session.execute(_sums_by_hour(since, until))).all()
    with_tokens = {
        (row.endpoint_name, row.version_number) for row in rows if row.dimension in TOKEN_DIMENSIONS
    }
    sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        billed = ALL_DIMENSIONS
        if (row.endpoint_name, row.version_number) in with_tokens:
            billed = ALL_DIMENSIONS - {"device_ms"}
        sums_of_model = sums[row.endpoint_name]
        sums_of_model[0] += int(row.amount_nano)
        if row.disposition == WAIVED:
            continue
        in_hour = since.replace(hour=int(row.hour_of_day), minute=30)
        rates = book.rates(row.endpoint_name, row.service_class, 0, in_hour)
        counts = {row.dimension: int(row.quantity)}
        sums_of_model[1] += sum(
            line.amount_nano for line in lines_of(counts, "completed", billed, rates)
        )
    return Repricing(since, until, _model_changes(sums), None)


def _sums_by_hour(since: datetime, until: datetime) -> Any:
    series, hours = UsageSeries, UsageHour
    hour_of_day = (hours.hour % 24).label("hour_of_day")
    group = (
        series.endpoint_name,
        series.version_number,
        series.service_class,
        series.dimension,
        series.disposition,
        hour_of_day,
    )
    within = period(since, until, detail_from=until)  # hours that it cuts are taken as a whole
    return (
        select(
            *group,
            func.sum(hours.quantity).label("quantity"),
            func.sum(hours.amount_nano).label("amount_nano"),
        )
        .join(series, series.id == hours.series_id)
        .where(hours.hour >= within.first, hours.hour < within.until)
        .group_by(*group)
    )


def _model_changes(sums: Mapping[str, list[int]]) -> list[ModelChange]:
    return [ModelChange(name, *sums[name]) for name in sorted(sums)]
