"""One currency for good: no start with another, and no posting in one."""

from collections.abc import Callable

import msgspec
import pytest

from app.billing.accounts import AccountWriter
from app.billing.credits import add_lot
from app.billing.currency import WrongCurrency, require_currency
from app.billing.ledger import STRIPE_CLEARING, open_account
from app.billing.price_changes import change_prices
from app.billing.prices import PriceTable, first_items
from app.billing.rating import Settlement
from app.billing.service import read_account
from app.core.database import Database
from app.core.errors import Conflict
from tests.app.billing.conftest import ORGANIZATION


async def test_a_new_box_takes_any_currency(database: Database) -> None:
    async with database.read() as session:
        await require_currency(session, "eur")


@pytest.mark.parametrize("has", ["prices", "account"])
async def test_what_exists_decides(database: Database, has: str) -> None:
    async with database.write() as session:
        if has == "prices":
            await change_prices(session, first_items(), "usd")
        else:
            await open_account(session, ORGANIZATION, "usd")
    async with database.read() as session:
        await require_currency(session, "usd")
        with pytest.raises(WrongCurrency, match="Set it to usd again"):
            await require_currency(session, "eur")


async def test_the_newest_prices_count(database: Database) -> None:
    for currency in ("usd", "eur"):
        async with database.write() as session:
            await change_prices(session, first_items(), currency)
    prices = PriceTable(database, "eur")
    await prices.start()
    await prices.close()
    async with database.read() as session:
        await require_currency(session, "eur")


async def test_nothing_is_posted_in_another_currency(
    accounts: AccountWriter, database: Database, settlement: Callable[..., Settlement]
) -> None:
    await accounts.hold("req_1", ORGANIZATION, 10**9)
    with pytest.raises(Conflict, match="kept in USD"):
        async with database.write() as session:
            await add_lot(
                session,
                ORGANIZATION,
                "paid",
                10**9,
                source="x",
                currency="eur",
                from_account=STRIPE_CLEARING,
            )
    foreign = msgspec.structs.replace(settlement("req_1"), currency="eur")
    right = settlement("req_2")
    accounts.settle(foreign)
    accounts.settle(right)
    await accounts.flush()
    async with database.read() as session:
        account = await read_account(session, ORGANIZATION, "usd")
    assert (account.owed_nano, account.held_nano) == (right.amount_nano, 10**9)
