"""Processes that end at the commits of prices and of comparisons, or while the key is made."""

from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from app.billing.price_changes import cancel_prices, change_prices
from app.billing.prices import first_items
from app.billing.reconciliation.runs import latest_run
from app.billing.signing import open_key
from app.billing.tables import PriceBook
from app.core import clock
from app.core.database import Database
from app.core.failpoints import Countdown, Reached, observed
from tests.app.billing.reconciliation.conftest import Books, books  # noqa: F401 - a fixture


def crash(name: str) -> None:
    raise Reached(name)


async def test_prices_change_whole_or_not_at_all(database: Database) -> None:
    async def numbers() -> list[tuple[int, bool]]:
        async with database.read() as session:
            books = await session.scalars(select(PriceBook).order_by(PriceBook.number))
            return [(book.number, book.cancelled_at is None) for book in books]

    async def change() -> str:
        async with database.write() as session:
            start = clock.now() + timedelta(days=1)
            return (await change_prices(session, first_items(), "usd", effective_at=start)).id

    async def cancel() -> None:
        async with database.write() as session:
            await cancel_prices(session, book_id)

    before = await numbers()
    with pytest.raises(Reached), observed(Countdown("price_changes.before_commit", crash)):
        await change()
    assert await numbers() == before
    book_id = await change()
    changed = await numbers()
    assert len(changed) == len(before) + 1
    with pytest.raises(Reached), observed(Countdown("price_changes.before_cancel_commit", crash)):
        await cancel()
    assert await numbers() == changed
    await cancel()
    assert (await numbers())[-1] == (changed[-1][0], False)


@pytest.mark.parametrize("place", ["reconciler.before_store", "reconciler.after_store"])
async def test_a_comparison_is_kept_whole_or_not_at_all(books: Books, place: str) -> None:  # noqa: F811
    first = await books.reconciler.run()
    with pytest.raises(Reached), observed(Countdown(place, crash)):
        await books.reconciler.run()
    async with books.database.read() as session:
        latest = await latest_run(session, clock.now())
    assert latest is not None
    assert (latest.id == first.id) == (place == "reconciler.before_store")
    assert latest.num_differences == 0
    assert (await books.reconciler.run()).num_differences == 0


@pytest.mark.parametrize("place", ["signing.before_key_is_named", "signing.after_key_is_named"])
def test_a_key_that_was_being_made_is_there_whole_or_made_again(tmp_path: Path, place: str) -> None:
    path = tmp_path / "keys" / "sealing.pem"
    with pytest.raises(Reached), observed(Countdown(place, crash)):
        open_key(path)
    assert path.exists() == (place == "signing.after_key_is_named")
    made = path.read_bytes() if path.exists() else None
    public = open_key(path).public_hex
    assert made is None or path.read_bytes() == made
    assert open_key(path).public_hex == public
