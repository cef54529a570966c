"""Sums for pages: the same as those that are added up anew, also while more is posted."""

from datetime import datetime, timedelta
from typing import cast

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.core.database import Database
from app.metering.hours import hour_of
from app.metering.kept_sums import Sums, read_spend, read_sums
from app.metering.series import SeriesKey
from app.metering.service import day_of, read_usage_days
from app.metering.tables import UsageHour, UsageSeries

OWNER = "org_1"
NOW = datetime.fromisoformat("2027-03-10T14:20:00+00:00")
START, END = NOW.replace(day=1, hour=0, minute=0), NOW.replace(day=11, hour=0, minute=0)


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> list[datetime]:
    told = [NOW]
    monkeypatch.setattr(clock, "now", lambda: told[0])
    return told


async def _post(
    session: AsyncSession, at: datetime, amount: int, key: str = "key_1", model: str = "a"
) -> None:
    series = SeriesKey(OWNER, key, model, 1, "standard", "input", "billed", "book", 7, 1)
    names = {name: getattr(series, name) for name in SeriesKey.__struct_fields__}
    await session.merge(UsageSeries(id=series.id, api_key_name=f"Key {key}", **names))
    await session.flush()
    row = await session.get(UsageHour, (series.id, hour_of(at)))
    if row is None:
        row = UsageHour(
            series_id=series.id, hour=hour_of(at), quantity=0, amount_nano=0, saved_nano=0
        )
        session.add(row)
    row.quantity += amount * 3
    row.amount_nano += amount
    row.saved_nano += amount * 2
    await session.flush()


async def _fill(database: Database) -> None:
    async with database.write() as session:
        for hours in range(0, 9 * 24, 5):
            key, model = f"key_{hours % 3}", "ab"[hours % 2]
            await _post(session, NOW - timedelta(hours=hours), 100 + hours, key, model)


async def _check(database: Database, **of: str) -> Sums:
    """Against what is added up anew, from the smallest cells."""
    async with database.read() as session:
        sums = await read_sums(session, OWNER, START, END, **of, now=clock.now())
        spend = await read_spend(session, OWNER, START, END, "dimension", **of, now=clock.now())
        cells = (await read_usage_days(session, OWNER, START, END)).cells
    cells = [cell for cell in cells if all(getattr(cell, name) == of[name] for name in of)]
    for field, shown in (("endpoint_name", sums.by_model), ("api_key_id", sums.by_key)):
        for numbers in ("quantity", "amount_nano", "saved_nano"):
            expected: dict[str, int] = {}
            found: dict[str, int] = {}
            for into, given in ((expected, cells), (found, shown.cells)):
                for cell in given:
                    name = getattr(cell, field)
                    into[name] = into.get(name, 0) + getattr(cell, numbers)
            assert found == expected
    days: dict[str, int] = {}
    for cell in sums.by_class.cells:
        if cell.hour >= sums.open_from:
            days[day_of(cell)] = days.get(day_of(cell), 0) + cell.amount_nano
    for hour, _, amount in spend:
        day = day_of(sums.by_class.cells[0]._replace(hour=hour))
        days[day] = days.get(day, 0) + amount
    by_day: dict[str, int] = {}
    for cell in cells:
        by_day[day_of(cell)] = by_day.get(day_of(cell), 0) + cell.amount_nano
    assert days == by_day
    return sums


async def test_pages_show_what_is_added_up_anew_whatever_is_posted_meanwhile(
    database: Database, now: list[datetime]
) -> None:
    await _fill(database)
    await _check(database)
    await _check(database, api_key_id="key_1")
    await _check(database, endpoint_name="b")
    # Through the hour, into the next, and over midnight with its first minutes.
    for minutes in (1, 41, 3, 560, 3, 2):
        now[0] += timedelta(minutes=minutes)
        async with database.write() as session:
            await _post(session, now[0], minutes)
        await _check(database)
        await _check(database, endpoint_name="a")


async def test_ended_hours_are_added_up_once(database: Database) -> None:
    await _fill(database)
    await _check(database)
    asked: list[tuple[int, ...]] = []

    def note(*arguments: object) -> None:
        if "usage_hour" in str(arguments[2]):
            given = arguments[3]  # by name on PostgreSQL, by place on SQLite
            values = given.values() if isinstance(given, dict) else cast("tuple[object]", given)
            asked.append(tuple(value for value in values if isinstance(value, int)))

    event.listen(database.engine.sync_engine, "before_cursor_execute", note)
    async with database.read() as session:
        await read_sums(session, OWNER, START, END, now=clock.now())
        await read_spend(session, OWNER, START, END, "dimension", now=clock.now())
    assert len(asked) == 1, "the running hour alone"
    assert hour_of(NOW) in asked[0]


async def test_a_clock_that_is_set_back_is_not_believed(
    database: Database, now: list[datetime]
) -> None:
    """What had ended by the wrong clock goes on."""
    await _fill(database)
    now[0] = NOW + timedelta(hours=9)
    await _check(database)
    now[0] = NOW
    async with database.write() as session:
        await _post(session, NOW + timedelta(hours=3), 5)
    now[0] = NOW + timedelta(hours=8)
    await _check(database)
