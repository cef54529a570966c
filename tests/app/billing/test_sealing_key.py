"""The key at a start: made once, and never replaced unless somebody says so."""

from collections.abc import AsyncIterator, Callable

import pytest

from app.billing.accounts import AccountWriter
from app.billing.rating import Settlement
from app.billing.sealing_key import open_sealing_key
from app.billing.signing import SigningKey, open_key
from app.core import clock
from app.core.errors import Conflict
from app.core.storage import Storage
from app.settings import Settings
from tests.app.billing.books import Books


@pytest.fixture
async def books(
    settings: Settings, accounts: AccountWriter, settlement: Callable[..., Settlement]
) -> AsyncIterator[Books]:
    books = Books(settings, accounts, settlement)
    yield books
    await books.close()


async def seal_one(books: Books) -> None:
    await books.settle(books.settlement(books.new_request(clock.now())))
    assert books.seal() == 1


def start(settings: Settings) -> SigningKey:
    return open_sealing_key(settings.sync_database_url, Storage(settings.data_dir).receipt_key)


async def test_the_key_that_sealed_is_taken(books: Books, settings: Settings) -> None:
    assert start(settings).public_hex == books.key.public_hex
    await seal_one(books)
    assert start(settings).public_hex == books.key.public_hex


async def test_a_box_without_seals_makes_its_key(books: Books, settings: Settings) -> None:
    Storage(settings.data_dir).receipt_key.unlink()
    assert start(settings).public_hex != books.key.public_hex


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_a_lost_key_stops_the_start(
    books: Books, settings: Settings, is_replaced: bool
) -> None:
    await seal_one(books)
    path = Storage(settings.data_dir).receipt_key
    path.unlink()
    if is_replaced:
        open_key(path)
    wanted = "is not the key that signed seal 1" if is_replaced else "is missing"
    for _ in range(2):
        with pytest.raises(Conflict, match=wanted) as refusal:
            start(settings)
        assert "restore it from a backup" in refusal.value.message
        assert path.exists() == is_replaced, "none is made in its place"


async def test_another_key_is_taken_when_somebody_says_so(books: Books, settings: Settings) -> None:
    await seal_one(books)
    path = Storage(settings.data_dir).receipt_key
    path.unlink()
    accepting = path.with_name("accept-new-key")
    accepting.touch()
    books.key = start(settings)
    assert start(settings).public_hex == books.key.public_hex, "made once, still accepted"
    assert accepting.exists()
    await seal_one(books)
    start(settings)
    assert not accepting.exists(), "the last seal is the new key's: from now on it must be there"
    path.unlink()
    with pytest.raises(Conflict, match="is missing"):
        start(settings)
