"""Price books: the first one, looking prices up, immutability and editing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing import price_changes
from app.billing.price_changes import cancel_prices, change_prices, check_items, write_minute
from app.billing.prices import (
    Book,
    Item,
    PriceTable,
    draft_book,
    first_items,
    items_sha256,
)
from app.billing.tables import PriceBook, PriceItem
from app.core import clock
from app.core.database import Database
from app.core.errors import Conflict, InvalidRequest, NotFound
from app.metering.records import AdmitRecord


@pytest.fixture
async def prices(database: Database):
    table = PriceTable(database)
    await table.start()
    yield table
    await table.close()


def item(
    endpoint_name: str = "*",
    dimension: str = "output",
    service_class: str = "standard",
    price_nano: int = 5,
    unit_scale: int = 1_000_000,
    above_tokens: int = 0,
    from_minute: int = 0,
    until_minute: int = 1440,
) -> Item:
    return Item(
        endpoint_name=endpoint_name,
        dimension=dimension,
        service_class=service_class,
        price_nano=price_nano,
        unit_scale=unit_scale,
        above_tokens=above_tokens,
        from_minute=from_minute,
        until_minute=until_minute,
    )


def book_of(*items: Item, policy: dict[str, str] | None = None) -> Book:
    """A book that is in no database."""
    return draft_book(items, "usd", datetime(2026, 1, 1, tzinfo=UTC), policy)


def at(hour: int, minute: int = 0) -> datetime:
    return datetime(2026, 3, 1, hour, minute, tzinfo=UTC)


def output_nano(book: Book, **request: object) -> int:
    asked = {"endpoint_name": "tiny", "service_class": "standard", "at": at(12), **request}
    return book.rates(**asked).prices["output"].price_nano  # type: ignore[arg-type]


async def test_a_new_box_gets_one_book_that_charges_for_everything_served(
    prices: PriceTable, database: Database
) -> None:
    second = PriceTable(database)
    await second.start()
    await second.close()
    async with database.read() as session:
        assert await session.scalar(select(func.count()).select_from(PriceBook)) == 1
        assert await session.scalar(select(func.min(PriceItem.price_nano))) > 0
    rates = prices.rates("anything", "standard")
    assert set(rates.prices) == {"input", "cached_input", "output", "request", "device_ms"}
    assert prices.rates("anything", "priority").prices["output"].price_nano == 800_000_000
    assert prices.rates("anything", "batch").prices["output"].price_nano == 200_000_000
    assert prices.active.sha256 == items_sha256("usd", first_items())


async def test_the_most_specific_price_counts(prices: PriceTable, database: Database) -> None:
    async with database.write() as session:
        await change_prices(
            session,
            [
                item(price_nano=1),
                item(service_class="batch", price_nano=2),
                item("tiny", price_nano=3),
                item("small", price_nano=4),
                item("small", service_class="batch", price_nano=5),
            ],
            "usd",
        )
    await prices.refresh()

    def output(endpoint: str, service_class: str) -> int:
        return prices.rates(endpoint, service_class).prices["output"].price_nano

    assert output("other", "standard") == 1
    assert output("other", "batch") == 2
    assert output("tiny", "standard") == 3
    assert output("small", "standard") == 4
    assert output("small", "batch") == 5
    assert output("small", "priority") == 4


async def test_a_change_leaves_earlier_books_and_pinned_rates_alone(
    prices: PriceTable, database: Database
) -> None:
    pinned = prices.rates("tiny", "standard")
    first = prices.active
    async with database.write() as session:
        await change_prices(session, [item(price_nano=1)], "usd")
    await prices.refresh()
    assert prices.active.number == 2
    assert pinned.prices["output"].price_nano == 400_000_000
    book = prices.book(pinned.book_id)
    assert book is first
    assert book.rates("tiny", "standard") == pinned


async def test_a_book_for_later_waits(prices: PriceTable, database: Database) -> None:
    later = clock.now() + timedelta(hours=1)
    async with database.write() as session:
        await change_prices(session, [item(price_nano=1)], "usd", later)
    await prices.refresh()
    assert prices.active.number == 1
    with pytest.raises(Conflict, match="later price book"):
        async with database.write() as session:
            await change_prices(session, [item(price_nano=2)], "usd")


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([], "items"),
        ([item(dimension="tokens")], "items[0].dimension"),
        ([item(), item()], "items[1].dimension"),
        ([item(service_class="gold")], "items[0].service_class"),
        ([item(price_nano=-1)], "items[0].price_nano"),
        ([item(price_nano=10**16)], "items[0].price_nano"),
        ([item(unit_scale=0)], "items[0].unit_scale"),
        ([item(endpoint_name="")], "items[0].endpoint_name"),
        ([item(above_tokens=-1)], "items[0].above_tokens"),
        ([item(dimension="request", above_tokens=5)], "items[0].above_tokens"),
        ([item(from_minute=1440)], "items[0].from_minute"),
        ([item(until_minute=0)], "items[0].until_minute"),
        ([item(from_minute=60, until_minute=60)], "items[0].until_minute"),
        ([item(above_tokens=5), item(above_tokens=5)], "items[1].dimension"),
        (
            [item(), item(from_minute=60, until_minute=120), item(from_minute=119)],
            "items[2].from_minute",
        ),
        (
            [item(from_minute=1380, until_minute=120), item(until_minute=1)],
            "items[1].from_minute",
        ),
    ],
)
async def test_bad_prices_are_named(database: Database, items: list[Item], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        async with database.write() as session:
            await change_prices(session, items, "usd")
    assert caught.value.param == param


MINUTE = st.integers(0, 1439)


def minutes_of(window: tuple[int, int]) -> set[int]:
    """Over midnight where it ends before it begins."""
    start, end = window
    return {minute % 1440 for minute in range(start, end if start < end else end + 1440)}


@given(st.lists(st.tuples(MINUTE, MINUTE).filter(lambda ends: ends[0] != ends[1]), max_size=4))
def test_windows_that_overlap_are_told_with_a_minute_of_both(
    windows: list[tuple[int, int]],
) -> None:
    items = [item(from_minute=start, until_minute=end or 1440) for start, end in windows]
    taken: set[int] = set()
    for index, window in enumerate(windows):
        if in_two := taken & minutes_of(window):
            said = rf"items\[{index}\].from_minute .* {write_minute(min(in_two))} UTC is in two"
            with pytest.raises(InvalidRequest, match=said):
                check_items(items)
            return
        taken |= minutes_of(window)
    if items:
        check_items(items)


async def test_a_book_cannot_start_in_the_past(prices: PriceTable, database: Database) -> None:
    past = clock.now() - timedelta(seconds=5)
    with pytest.raises(InvalidRequest, match="past"):
        async with database.write() as session:
            await change_prices(session, [item()], "usd", past)


async def test_prices_changed_meanwhile_are_not_overwritten(
    prices: PriceTable, database: Database
) -> None:
    seen = prices.active.id
    async with database.write() as session:
        await change_prices(session, [item(price_nano=1)], "usd", based_on=seen)
    with pytest.raises(Conflict, match="changed since you began"):
        async with database.write() as session:
            await change_prices(session, [item(price_nano=2)], "usd", based_on=seen)


async def test_changes_at_the_same_moment_never_share_a_number(
    prices: PriceTable, database: Database
) -> None:
    async def change(price_nano: int) -> None:
        async with database.write() as session:
            await change_prices(session, [item(price_nano=price_nano)], "usd")

    found = await asyncio.gather(*map(change, range(5)), return_exceptions=True)
    assert all(each is None or isinstance(each, Conflict) for each in found), found
    await prices.refresh()
    numbers = [book.number for book in prices.books]
    assert sorted(numbers) == list(range(1, 2 + found.count(None)))
    assert found.count(None) > 0


async def test_a_book_that_requests_may_name_is_found_after_it_was_cancelled(
    prices: PriceTable, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was in force, then the clock was set back, then it was cancelled, then the box ended."""
    first, started_at = prices.active, clock.now()
    async with database.write() as session:
        book = await change_prices(session, [item()], "usd", started_at + timedelta(hours=1))
    await prices.refresh()
    monkeypatch.setattr(clock, "now", lambda: started_at + timedelta(hours=2))
    assert prices.rates("tiny", "standard").book_id == book.id
    monkeypatch.setattr(clock, "now", lambda: started_at)
    async with database.write() as session:
        await cancel_prices(session, book.id)
    monkeypatch.setattr(clock, "now", lambda: started_at + timedelta(hours=2))
    again = PriceTable(database)
    await again.refresh()
    for table in (prices, again):
        await table.refresh()
        found = table.book(book.id)
        assert found is not None
        assert found.items == [item()]
        assert table.active.id == first.id


async def test_a_slow_refresh_forgets_nothing_that_is_newer(
    prices: PriceTable, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, gates = database.read, [asyncio.Event()]
    has_read, gate = asyncio.Event(), gates[0]

    @asynccontextmanager
    async def slow_once() -> AsyncIterator[AsyncSession]:
        is_first = bool(gates)
        gates.clear()
        async with read() as session:
            yield session
        if is_first:
            has_read.set()
            await gate.wait()

    monkeypatch.setattr(database, "read", slow_once)
    slow = asyncio.create_task(prices.refresh())
    await has_read.wait()
    async with database.write() as session:
        book = await change_prices(session, [item()], "usd")
    quick = asyncio.create_task(prices.refresh())
    await asyncio.wait([quick], timeout=0.2)  # it ends meanwhile, or waits for the slow one
    gate.set()
    await asyncio.gather(slow, quick)
    assert prices.active.id == book.id


async def test_a_scheduled_book_can_be_taken_back_until_it_is_near(
    prices: PriceTable, database: Database
) -> None:
    first = prices.active
    later = clock.now() + timedelta(hours=1)
    async with database.write() as session:
        book = await change_prices(session, [item()], "usd", later)
    await prices.refresh()
    assert prices.book(book.id) is not None
    async with database.write() as session:
        await cancel_prices(session, book.id)
    await prices.refresh()
    assert prices.books == [first]
    assert prices.active is first
    with pytest.raises(NotFound):
        async with database.write() as session:
            await cancel_prices(session, book.id)

    near = clock.now() + timedelta(seconds=price_changes.CANCEL_MARGIN_SECONDS - 1)
    async with database.write() as session:
        book = await change_prices(session, [item()], "usd", near)
    for book_id in (first.id, book.id):
        with pytest.raises(Conflict, match="stays on record"):
            async with database.write() as session:
                await cancel_prices(session, book_id)
    with pytest.raises(NotFound):
        async with database.write() as session:
            await cancel_prices(session, "pb_none")


def test_the_fingerprint_of_a_plain_book_is_what_it_always_was() -> None:
    assert items_sha256("usd", first_items()) == (
        "db22023c8d573e07ac316919ef6a4b29b8c6e1880b2357a6a3cdd578826cbe36"
    )
    plain = items_sha256("eur", [item("m", service_class="batch", unit_scale=7)])
    assert plain == "51d5c9860656e0dd81117ce4183abc4f8298562086857543a6d525e2f7d413e4"
    read_again = item("m", service_class="batch", unit_scale=7, until_minute=int("1440"))
    assert items_sha256("eur", [read_again]) == plain
    tiered = items_sha256("eur", [item("m", service_class="batch", unit_scale=7, above_tokens=1)])
    assert tiered != plain


def test_only_what_a_policy_sets_apart_is_in_the_fingerprint() -> None:
    plain = items_sha256("usd", [item()])
    assert items_sha256("usd", [item()], {"failed": "waived", "completed": "billed"}) == plain
    assert items_sha256("usd", [item()], {"cancelled": "waived"}) != plain


def test_a_threshold_counts_above_it_and_the_highest_that_is_passed() -> None:
    book = book_of(
        item(price_nano=1),
        item(price_nano=2, above_tokens=200_000),
        item(price_nano=3, above_tokens=1_000_000),
        item(dimension="request", price_nano=9),
    )
    counts = (0, 200_000, 200_001, 1_000_000, 1_000_001, 10**12)
    assert [output_nano(book, num_prompt_tokens=n) for n in counts] == [1, 1, 2, 2, 3, 3]
    assert book.rates("tiny", "batch", 10**12).prices["request"].price_nano == 9


def test_a_window_counts_from_its_first_minute_until_before_its_last() -> None:
    book = book_of(
        item(price_nano=1),
        item(price_nano=2, from_minute=30, until_minute=16 * 60 + 30),
        item("night", price_nano=3, from_minute=22 * 60, until_minute=6 * 60),
    )
    times = (at(0, 29), at(0, 30), at(16, 29), at(16, 30), at(23, 59))
    assert [output_nano(book, at=each) for each in times] == [1, 2, 2, 1, 1]
    times = (at(21, 59), at(22), at(0), at(5, 59), at(6))
    named = [output_nano(book, endpoint_name="night", at=each) for each in times]
    assert named == [1, 3, 3, 3, 2]  # at other times any endpoint's prices


def test_an_endpoint_comes_before_a_threshold_and_that_before_a_window() -> None:
    peak: dict[str, Any] = {"from_minute": 600, "until_minute": 900}
    book = book_of(
        item(price_nano=1),
        item(price_nano=2, above_tokens=100),
        item(price_nano=3, **peak),
        item(price_nano=4, above_tokens=1_000, **peak),
        item("own", price_nano=5),
        item(service_class="batch", price_nano=6),
    )
    assert output_nano(book, num_prompt_tokens=500) == 2
    assert output_nano(book) == 3
    assert output_nano(book, num_prompt_tokens=5_000) == 4
    assert output_nano(book, num_prompt_tokens=5_000, at=at(9)) == 2
    assert output_nano(book, endpoint_name="own", num_prompt_tokens=5_000) == 5
    assert output_nano(book, endpoint_name="own", service_class="batch") == 6


def test_rates_are_found_again_from_a_request_s_record() -> None:
    book = book_of(
        item(price_nano=1),
        item(price_nano=2, above_tokens=100, from_minute=600, until_minute=601),
    )
    started_at_ns = int(at(10).timestamp()) * 10**9 + 59_999_999_999
    record = AdmitRecord(
        "req_1", "org_1", "key_1", "test", "tiny", 1, "/v1/completions", "decoder", "standard",
        book.id, started_at_ns, 101,
    )  # fmt: skip
    rates = book.rates_of(record)
    assert rates.prices["output"].price_nano == 2
    assert book.rates("tiny", "standard", 101, started_at_ns) is rates
    assert book.rates("tiny", "standard", 101, started_at_ns + 1).prices["output"].price_nano == 1
    assert book.rates("tiny", "standard", 100, at(10)).prices["output"].price_nano == 1


def test_a_price_that_holds_at_times_alone_leaves_a_gap() -> None:
    night: dict[str, Any] = {"from_minute": 1_380, "until_minute": 120}
    day: dict[str, Any] = {"from_minute": 120, "until_minute": 1_380}
    never = book_of(item(above_tokens=5), item("own", "request", **night), item(dimension="input"))
    gaps = [(gap.endpoint_name, gap.dimension) for gap in never.gaps()]
    assert gaps == [("*", "output"), ("own", "request")]
    assert book_of(item(**night), item(**day)).gaps() == []
    whole = book_of(item(), item("own", above_tokens=5), item(service_class="batch", **day))
    assert whole.gaps() == []
