"""Rating again what was settled: the same book gives the same amounts, another its own."""

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from app.billing import repricing
from app.billing.accounts import AccountWriter
from app.billing.policy import OUTCOMES
from app.billing.prices import Book, Item, first_items
from app.billing.rating import Settlement, rate
from app.billing.repricing import compare_items, reprice, reprice_last_month
from app.core import clock
from app.core.database import Database
from app.metering.records import AdmitRecord, Usage
from tests.app.billing.test_prices import book_of, item

NOW = clock.now()
SINCE, UNTIL = NOW - timedelta(days=2), NOW + timedelta(hours=2)  # a suite takes its time
DETAIL_DAYS = 62


def intricate_book() -> Book:
    """Thresholds, windows, a model and a class of their own, a policy, prices that do not divide
    evenly."""
    return book_of(
        item("*", "input", price_nano=100_000_007, unit_scale=1_000_003),
        item("*", "input", price_nano=333_333_333, unit_scale=999_983, above_tokens=5_000),
        item("*", "cached_input", price_nano=1, unit_scale=3),
        item("*", "output", price_nano=400_000_000),
        item("*", "output", price_nano=123_456_789, from_minute=600, until_minute=1_200),
        item("own", "output", price_nano=77, unit_scale=13),
        item("*", "output", "batch", price_nano=5, unit_scale=7),
        item("*", "request", price_nano=11, unit_scale=2),
        item("*", "device_ms", price_nano=1_000_000_000, unit_scale=3_600_000),
        policy={"cancelled.output": "waived", "lost": "billed"},
    )


def settled(book: Book, i: int, chance: random.Random) -> Settlement:
    """A request of any kind at any time of the last day. Some never ran."""
    kind = chance.choice(("decoder", "decoder", "embedder", "tensor"))
    started_at_ns = int(NOW.timestamp()) * 10**9 - chance.randrange(1, 86_000 * 10**9)
    prompt = 0 if kind == "tensor" else chance.choice((1, 5_000, 5_001, 80_000))
    ran = prompt if chance.random() < 0.9 else 0
    cached = chance.randrange(ran + 1) if kind == "decoder" else 0
    admitted = AdmitRecord(
        *(f"req_{i}", chance.choice(("org_1", "org_2")), "key_1", "key"),
        *(f"{kind}-{i % 2}" if i % 3 else "own", 1, "/v1/completions", kind),
        *(chance.choice(("standard", "batch")), book.id, started_at_ns, prompt),
    )
    usage = Usage(
        admitted=admitted,
        outcome=chance.choice(OUTCOMES),  # type: ignore[arg-type]
        finish_reason="stop",
        input_tokens=ran - cached,
        cached_tokens=cached,
        output_tokens=chance.randrange(3_000) if ran and kind == "decoder" else 0,
        device_ms=chance.randrange(1, 500) if ran or kind == "tensor" else 0,
        finished_at_ns=started_at_ns + (i % 5) * 10**6,
        first_token_ns=None,
    )
    return rate(usage, book.rates_of(admitted))


@pytest.fixture
async def settlements(accounts: AccountWriter) -> list[Settlement]:
    """600 requests of two organizations under the intricate book: several chunks of each."""
    chance = random.Random(5)  # noqa: S311
    book = intricate_book()
    made = [settled(book, i, chance) for i in range(600)]
    for settlement in made:
        accounts.settle(settlement)
    await accounts.flush()
    return made


def by_model(settlements: list[Settlement]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for settlement in settlements:
        name = settlement.usage.admitted.endpoint_name
        sums[name] = sums.get(name, 0) + settlement.amount_nano
    return sums


async def test_the_same_book_gives_the_same_amounts(
    database: Database, settlements: list[Settlement], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repricing, "CHUNK", 64)
    found = await reprice(database, intricate_book(), SINCE, UNTIL, DETAIL_DAYS)
    assert found.num_events == 600
    assert not found.is_estimate
    assert {model.endpoint_name: model.old_nano for model in found.models} == by_model(settlements)
    assert [model.difference_nano for model in found.models] == [0] * len(found.models)


async def test_requests_that_ended_together_are_all_counted(
    database: Database,
    accounts: AccountWriter,
    settlement: Callable[..., Settlement],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(repricing, "CHUNK", 2)
    at_ns = _ns(NOW) - 10**9
    for i in range(7):
        accounts.settle(settlement(f"req_{i}", finished_at_ns=at_ns + 10**9 * (i == 6)))
    await accounts.flush()
    found = await reprice(database, book_of(*first_items()), SINCE, UNTIL, DETAIL_DAYS)
    assert (found.num_events, found.new_nano) == (7, found.old_nano)
    assert found.old_nano == 7 * (10_000 + 400_000 + 100)


async def test_each_event_gives_its_amount_again(settlements: list[Settlement]) -> None:
    book = intricate_book()
    for settlement in settlements:
        usage = settlement.usage
        admitted = usage.admitted
        quantities = {line.dimension: line.quantity for line in settlement.lines}

        class Event:
            endpoint_name, service_class = admitted.endpoint_name, admitted.service_class
            outcome = usage.outcome
            started_at = datetime.fromtimestamp(admitted.started_at_ns // 10**9, UTC)

        assert repricing.rate_again(book, Event, quantities) == settlement.amount_nano


async def test_another_book_gives_what_it_would_have_charged(
    database: Database, settlements: list[Settlement]
) -> None:
    other = book_of(*first_items(), policy={"failed": "billed"})
    wanted = [
        rate(settlement.usage, other.rates_of(settlement.usage.admitted))
        for settlement in settlements
    ]
    # A request that did not run counts no prompt; nothing in this book depends on it.
    found = await reprice(database, other, SINCE, UNTIL, DETAIL_DAYS)
    assert {model.endpoint_name: model.new_nano for model in found.models} == by_model(wanted)
    assert found.old_nano == sum(settlement.amount_nano for settlement in settlements)
    assert found.new_nano == sum(settlement.amount_nano for settlement in wanted)


async def test_only_requests_of_the_period_count(
    database: Database, settlements: list[Settlement]
) -> None:
    middle = NOW - timedelta(hours=12)
    parts = [
        await reprice(database, intricate_book(), since, until, DETAIL_DAYS)
        for since, until in ((SINCE, middle), (middle, UNTIL))
    ]
    early = [each for each in settlements if _finished_at(each) < middle]
    assert [part.num_events for part in parts] == [len(early), 600 - len(early)]
    assert parts[0].old_nano == sum(each.amount_nano for each in early)


def _finished_at(settlement: Settlement) -> datetime:
    return datetime.fromtimestamp(settlement.usage.finished_at_ns // 10**9, UTC)


@pytest.mark.parametrize("reason", ["too many", "too long", "no longer on record"])
async def test_the_hours_stand_in_and_it_says_so(
    database: Database,
    accounts: AccountWriter,
    settlement: Callable[..., Settlement],
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
) -> None:
    """For plain prices the estimate is exact but for rounding."""
    for i, outcome in enumerate(("completed", "completed", "failed")):
        accounts.settle(settlement(f"req_{i}", outcome=outcome, cached_tokens=10))
    await accounts.flush()
    if reason == "too many":
        monkeypatch.setattr(repricing, "MAX_EVENTS", 2)
    elif reason == "too long":
        monkeypatch.setattr(repricing, "MAX_SECONDS", -1.0)
    days = 1 if reason == "no longer on record" else DETAIL_DAYS
    doubled = [replace(each, price_nano=2 * each.price_nano) for each in first_items()]
    found = await reprice(database, book_of(*doubled), SINCE, UNTIL, days)
    assert found.is_estimate
    # Input 100, cached 10, output 1,000, a request, each twice; the failed one is waived.
    old_nano = 2 * (10_000 + 100 + 400_000 + 100)
    assert [(model.old_nano, model.new_nano) for model in found.models] == [
        (old_nano, 2 * old_nano)
    ]


async def test_hours_are_rated_by_their_windows(
    database: Database, accounts: AccountWriter, settlement: Callable[..., Settlement]
) -> None:
    accounts.settle(settlement("req_1", finished_at_ns=int(NOW.timestamp() * 1e9)))
    await accounts.flush()
    hour = NOW.hour
    window: dict[str, Any] = {"from_minute": hour * 60, "until_minute": (hour + 1) * 60}
    in_it = book_of(item(price_nano=1), item(price_nano=1_000_000, **window))
    until = clock.now() + timedelta(minutes=1)
    found = await reprice(database, in_it, SINCE, until, 0)
    assert found.new_nano in (1_000, 0)  # 0: the hour was over when it was posted


@pytest.mark.parametrize("after_the_hour", [timedelta(microseconds=1), timedelta(minutes=1)])
async def test_an_hour_that_has_just_begun_is_in_the_estimate(
    database: Database,
    accounts: AccountWriter,
    settlement: Callable[..., Settlement],
    monkeypatch: pytest.MonkeyPatch,
    after_the_hour: timedelta,
) -> None:
    hour = NOW.replace(minute=0, second=0, microsecond=0)
    monkeypatch.setattr(clock, "now", lambda: hour)
    accounts.settle(settlement("req_1", finished_at_ns=_ns(hour)))
    await accounts.flush()
    found = await reprice(database, book_of(item()), SINCE, hour + after_the_hour, 0)
    assert found.is_estimate
    assert found.old_nano > 0
    assert not (await reprice(database, book_of(item()), SINCE, hour, 0)).models


async def test_a_box_that_is_new_shows_this_month(
    database: Database, accounts: AccountWriter, settlement: Callable[..., Settlement]
) -> None:
    empty = await reprice_last_month(database, book_of(item()), DETAIL_DAYS)
    assert (empty.models, empty.num_events) == ([], 0)
    accounts.settle(settlement("req_1"))
    await accounts.flush()
    found = await reprice_last_month(database, book_of(item()), DETAIL_DAYS)
    assert found.since.day == 1
    assert found.num_events in (0, 1)  # 0 in the first instant of a month
    month_start = clock.now().replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    accounts.settle(settlement("req_2", finished_at_ns=_ns(month_start) - 10**9))
    await accounts.flush()
    last = await reprice_last_month(database, book_of(item()), DETAIL_DAYS)
    assert (last.until, last.num_events) == (month_start, 1)


def _ns(instant: datetime) -> int:
    return int(instant.timestamp()) * 10**9


def test_books_are_compared_item_by_item() -> None:
    kept, cheap, tiered, gone = (
        item(dimension="request"),
        item(price_nano=1),
        item(price_nano=9, above_tokens=100),
        item("own", dimension="input"),
    )
    dear = replace(cheap, price_nano=2)
    rescaled: Item = replace(tiered, unit_scale=5)
    changes = compare_items([gone, kept, cheap, tiered], [rescaled, dear, kept, item("new")])
    assert [(change.kind, change.item, change.old) for change in changes] == [
        ("changed", dear, cheap),
        ("changed", rescaled, tiered),
        ("new", item("new"), None),
        ("removed", gone, gone),
    ]
