"""Usage added up by key, model, class, hour, day and dimension, and receipts."""

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from msgspec.structs import replace

from app.billing.accounts import AccountWriter
from app.billing.rating import Settlement, rate
from app.core import clock
from app.core.database import Database
from app.core.errors import NotFound
from app.metering.activity import saved_by_caching_nano, spend_by_day
from app.metering.hours import hour_of, period, start_of
from app.metering.receipts import read_receipt
from app.metering.service import UsageRow, read_usage, total_nano, usage_by
from tests.app.billing.conftest import ORGANIZATION, RATES, accounts, settlement
from tests.app.plans import sqlite_plans

__all__ = ["accounts", "settlement"]  # fixtures

JANUARY = datetime(2026, 1, 1, tzinfo=UTC)
MARCH = datetime(2026, 3, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.fixture
def clock_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime], None]:
    """Sets what the process takes for now."""

    def set_now(now: datetime) -> None:
        monkeypatch.setattr(clock, "now", lambda: now)

    return set_now


@pytest.fixture
async def month(
    accounts: AccountWriter,
    settlement: Callable[..., Settlement],
    clock_at: Callable[[datetime], None],
) -> None:
    """Three requests of one organization over two days, one of another, one out of range."""
    late = at("2026-01-31T23:59:59")
    for settled, now in (
        (settlement("req_1", 1_000), at("2026-01-30T00:00:00")),
        (settlement("req_2", 2_000, endpoint_name="big", cached_tokens=7), late),
        (settlement("req_3", 500, api_key_id="key_2", outcome="failed"), late),
        (settlement("req_4", 500, organization_id="org_2"), late),
        (settlement("req_5", 500), at("2026-03-01T00:00:00")),
    ):
        clock_at(now)
        accounts.settle(settled)
        await accounts.flush()
    clock_at(MARCH + 30 * 24 * HOUR)


@pytest.mark.usefixtures("month")
async def test_usage_by_group(database: Database) -> None:
    async with database.read() as session:

        async def by(group_by: str) -> list[UsageRow]:
            return await usage_by(session, ORGANIZATION, group_by, JANUARY, MARCH)  # type: ignore[arg-type]

        assert await by("model") == [
            UsageRow("big", 1, 100, 7, 2_000, 3, 810_170),
            UsageRow("tiny", 2, 200, 0, 1_500, 6, 410_100),
        ]
        assert await by("key") == [
            UsageRow("name of key_1", 2, 200, 7, 3_000, 6, 1_220_270),
            UsageRow("name of key_2", 1, 100, 0, 500, 3, 0),
        ]
        assert await by("class") == [UsageRow("standard", 3, 300, 7, 3_500, 9, 1_220_270)]
        assert [(row.group, row.requests) for row in await by("day")] == [
            ("2026-01-30", 1),
            ("2026-01-31", 2),
        ]
        assert [(row.group, row.requests) for row in await by("hour")] == [
            ("2026-01-30T00:00Z", 1),
            ("2026-01-31T23:00Z", 2),
        ]
        dimensions = {row.group: row for row in await by("dimension")}
        assert dimensions["output"] == UsageRow("output", 0, 0, 0, 3_500, 0, 1_200_000)
        assert dimensions["request"].requests == 3
        assert await total_nano(session, ORGANIZATION, JANUARY, MARCH) == 1_220_270
        assert await usage_by(session, "org_none", "day", JANUARY, MARCH) == []
        assert await spend_by_day(session, ORGANIZATION, JANUARY, at("2026-01-31T00:00:00")) == {
            "2026-01-30": {"input": 10_000, "output": 400_000, "request": 100, "device_ms": 0}
        }
        # Seven tokens at a tenth of the price.
        assert await saved_by_caching_nano(session, ORGANIZATION, JANUARY, MARCH) == 630


async def test_a_prompt_that_was_cached_to_its_end_saved_its_whole_price(
    accounts: AccountWriter, settlement: Callable[..., Settlement], database: Database
) -> None:
    """No line tells the input price then."""
    for outcome in ("completed", "failed"):
        usage = settlement(f"req_{outcome}", outcome=outcome, cached_tokens=7).usage
        settled = rate(replace(usage, input_tokens=0), RATES)
        assert "input" not in {line.dimension for line in settled.lines}
        accounts.settle(settled)
    await accounts.flush()
    start, end = clock.now() - HOUR, clock.now() + HOUR
    async with database.read() as session:
        cells = await read_usage(session, ORGANIZATION, period(start, end, end), "model")
    assert cells.saved_nano == 630


@pytest.mark.usefixtures("month")
async def test_parts_of_hours_are_exact_while_requests_are_kept(database: Database) -> None:
    start, end = at("2026-01-31T23:59:59"), at("2026-01-31T23:59:59.5")
    async with database.read() as session:

        async def num_requests(since: datetime, until: datetime, detail_from: datetime) -> int:
            within = period(since, until, detail_from)
            rows = (await read_usage(session, ORGANIZATION, within, "model")).rows("model")
            return sum(row.requests for row in rows)

        assert await num_requests(start, end, JANUARY) == 2
        assert await num_requests(start + 0.1 * HOUR / 3600, end, JANUARY) == 0
        assert await num_requests(JANUARY + HOUR / 2, start, JANUARY) == 1
        assert await num_requests(JANUARY + HOUR / 2, start, MARCH) == 3  # the whole hour
    rounded = period(start, end, MARCH)
    assert (rounded.start, rounded.end) == (at("2026-01-31T23:00:00"), at("2026-02-01T00:00:00"))
    exact = period(start, end, JANUARY)
    assert (exact.start, exact.end, exact.first, exact.until) == (
        start,
        end,
        exact.first,
        exact.first,
    )


async def test_any_range_adds_up_what_was_posted_in_it(
    accounts: AccountWriter,
    database: Database,
    settlement: Callable[..., Settlement],
    clock_at: Callable[[datetime], None],
) -> None:
    chance = random.Random(7)  # noqa: S311
    posted: list[tuple[datetime, int]] = []
    for index in range(60):
        now = JANUARY + timedelta(minutes=15 * chance.randrange(24))
        settled = settlement(f"req_{index}", chance.randrange(1, 4_000))
        clock_at(now)
        accounts.settle(settled)
        await accounts.flush()
        posted.append((now, settled.amount_nano))
    clock_at(MARCH)
    async with database.read() as session:
        for _ in range(60):
            first, last = sorted(
                JANUARY + timedelta(minutes=5 * each) for each in chance.sample(range(84), 2)
            )
            expected = sum(nano for at, nano in posted if first <= at < last)
            assert await total_nano(session, ORGANIZATION, first, last) == expected
            by_hour = await usage_by(session, ORGANIZATION, "hour", first, last)
            assert sum(row.amount_nano for row in by_hour) == expected
            hours = {hour_of(at) for at, _ in posted if first <= at < last}
            assert [row.group for row in by_hour] == [
                f"{start_of(hour):%Y-%m-%dT%H:00Z}" for hour in sorted(hours)
            ]


async def test_few_requests_are_found_without_reading_all(database: Database) -> None:
    """By their posting, their end or their name; SQLite is told no sizes that it could go by."""
    within = period(JANUARY + HOUR / 2, JANUARY + HOUR / 4 * 3, JANUARY, MARCH)
    with sqlite_plans(database) as plans:
        async with database.read() as session:
            await read_usage(session, ORGANIZATION, within, "model")
            with pytest.raises(NotFound):
                await read_receipt(session, ORGANIZATION, "req_1")
    posted, unposted, receipt = await plans("usage_event")
    assert "usage_event USING INDEX ix_usage_event_ledger_transaction_id" in posted
    assert "(organization_id=? AND finished_at>? AND finished_at<?)" in unposted
    assert "usage_event USING INDEX ix_usage_event_request_id" in receipt


@pytest.mark.usefixtures("month")
async def test_a_receipt_adds_up(database: Database) -> None:
    async with database.read() as session:
        receipt = await read_receipt(session, ORGANIZATION, "req_2")
    assert receipt.model == "big"
    assert [line.dimension for line in receipt.lines] == [
        "input",
        "cached_input",
        "output",
        "request",
        "device_ms",
    ]
    assert sum(line.amount_nano for line in receipt.lines) == receipt.amount_nano
    assert (receipt.duration_ns, receipt.first_token_ns) == (5_000_000, 1_000_000)


@pytest.mark.usefixtures("month")
async def test_another_organization_s_receipt_does_not_exist(database: Database) -> None:
    async with database.read() as session:
        with pytest.raises(NotFound):
            await read_receipt(session, ORGANIZATION, "req_4")
