"""Price books: the first one, looking prices up, immutability and editing."""

from datetime import timedelta

import pytest
from sqlalchemy import func, select

from app.billing.prices import Item, PriceTable, first_items, items_sha256
from app.billing.service import change_prices
from app.billing.tables import PriceBook, PriceItem
from app.core import clock
from app.core.database import Database
from app.core.errors import Conflict, InvalidRequest


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
) -> Item:
    return Item(
        endpoint_name=endpoint_name,
        dimension=dimension,
        service_class=service_class,
        price_nano=price_nano,
        unit_scale=unit_scale,
    )


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
    ],
)
async def test_bad_prices_are_named(database: Database, items: list[Item], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        async with database.write() as session:
            await change_prices(session, items, "usd")
    assert caught.value.param == param


async def test_a_book_cannot_start_in_the_past(prices: PriceTable, database: Database) -> None:
    past = clock.now() - timedelta(seconds=5)
    with pytest.raises(InvalidRequest, match="past"):
        async with database.write() as session:
            await change_prices(session, [item()], "usd", past)
