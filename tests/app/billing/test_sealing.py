"""Seals: nothing is left out or sealed twice, and whatever is changed later is found."""

import stat
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text

from app.billing import sealing
from app.billing.accounts import AccountWriter
from app.billing.digests import merkle_path, merkle_root, root_of
from app.billing.hash_tree import HashTree
from app.billing.ledger import post
from app.billing.rating import Settlement
from app.billing.sealing import seal_all, seal_some
from app.billing.signing import is_signed, open_key
from app.core import clock
from app.core.database import Database, create_writer_engine
from app.core.errors import Conflict
from app.core.failpoints import Countdown, Reached, observed
from app.settings import Settings
from tests.app.billing.books import Books


@pytest.fixture
async def books(
    settings: Settings, accounts: AccountWriter, settlement: Callable[..., Settlement]
) -> AsyncIterator[Books]:
    books = Books(settings, accounts, settlement)
    yield books
    await books.close()


async def settle_some(books: Books, num_batches: int, size: int = 3) -> list[str]:
    made: list[str] = []
    for batch in range(num_batches):
        ids = [books.new_request(clock.now()) for _ in range(size)]
        made += await books.settle(
            *(books.settlement(name, 100 + batch, cached_tokens=index)
              for index, name in enumerate(ids))
        )  # fmt: skip
    return made


@pytest.mark.parametrize("num_leaves", [0, 1, 2, 3, 5, 8, 33, 100])
def test_the_kept_tree_is_that_of_rfc_6962(num_leaves: int) -> None:
    leaves = [bytes([index]) * 3 for index in range(num_leaves)]
    tree = HashTree(leaves)
    assert tree.root == merkle_root(leaves)
    for index, leaf in enumerate(leaves):
        assert tree.path(index) == merkle_path(leaves, index)
        assert root_of(leaf, tree.path(index)) == tree.root


async def test_everything_is_sealed_once_in_a_chain(books: Books, database: Database) -> None:
    await settle_some(books, 5)
    async with database.write() as session:
        await post(
            session,
            key="paid",
            kind="top_up",
            organization_id="org_1",
            currency="usd",
            entries={"customer:org_1": 5, "stripe_clearing": -5},
        )
    assert [seal_some(books.engine, books.key, limit=2) for _ in range(4)] == [2, 2, 2, 0]
    checked = books.check()
    assert checked.problem is None
    assert checked.is_complete
    assert (checked.num_seals, checked.num_transactions, checked.num_receipts) == (3, 6, 15)
    assert checked.num_unsealed == 0
    await settle_some(books, 1)
    assert books.check().num_unsealed == 1
    assert books.seal() == 1
    again = books.check(after=3)
    assert (again.num_seals, again.last_number, again.problem) == (1, 4, None)
    assert books.count("unsealed_transaction") == 0


async def test_many_sealers_make_one_chain(books: Books, settings: Settings) -> None:
    await settle_some(books, 24, size=1)
    engines = [create_writer_engine(settings.sync_database_url) for _ in range(4)]
    together = threading.Barrier(4)

    def seal(engine: object) -> int:
        together.wait()
        return sum(iter(lambda: seal_some(engine, books.key, limit=3), 0))  # type: ignore[arg-type]

    with ThreadPoolExecutor(4) as pool:
        num_sealed = sum(pool.map(seal, engines))
    for engine in engines:
        engine.dispose()
    num_sealed += books.seal()  # what a sealer gave up on after many attempts
    assert num_sealed == books.count("sealed_transaction") == 24
    assert books.count("unsealed_transaction") == 0
    assert books.check().problem is None


async def test_a_crash_seals_all_or_nothing(books: Books) -> None:
    await settle_some(books, 3)

    def crash(name: str) -> None:
        raise Reached(name)

    for place, num_left in (("sealing.before_commit", 3), ("sealing.after_commit", 0)):
        with observed(Countdown(place, crash)), pytest.raises(Reached):
            seal_all(books.engine, books.key)
        assert books.count("unsealed_transaction") == num_left
        assert books.check().problem is None
    assert books.count("seal") == 1


async def test_a_seal_is_bounded(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sealing.MAX_TRANSACTIONS == 4_096
    await settle_some(books, 3, size=1)
    monkeypatch.setattr(seal_some, "__defaults__", (2,))
    assert books.seal() == 3
    assert books.count("seal") == 2


TAMPERED = {
    "UPDATE usage_line SET quantity = quantity + 1 WHERE dimension = 'output' AND event_id = "
    "(SELECT min(id) FROM usage_event)": "event req_",
    "UPDATE usage_line SET quantity = 4, price_nano = 0 WHERE dimension = 'device_ms' AND "
    "event_id = (SELECT min(id) FROM usage_event)": "is not what was posted",
    "UPDATE usage_event SET api_key_id = 'key_9' WHERE id = (SELECT max(id) FROM usage_event)": (
        "is not what was posted"
    ),
    "UPDATE ledger_entry SET amount_nano = amount_nano + 1 WHERE account = 'revenue' AND "
    "transaction_id = (SELECT min(id) FROM ledger_transaction)": "do not sum to zero",
    "UPDATE ledger_transaction SET kind = 'gift' WHERE id = "
    "(SELECT min(id) FROM ledger_transaction)": "or an entry of one, is not what was sealed",
    "DELETE FROM sealed_transaction WHERE ledger_transaction_id = "
    "(SELECT min(id) FROM ledger_transaction)": "are marked as its",
    "UPDATE seal SET created_at = '2020-01-01 00:00:00.000000+00:00' WHERE number = 1": (
        "the hash of seal 1"
    ),
    "UPDATE seal SET previous_sha256 = 'ff' WHERE number = 2": "seal 2 does not follow",
    "UPDATE seal SET signature = '00' WHERE number = 2": "seal 2 is not signed",
    "DELETE FROM seal WHERE number = 1": "seal 1 is missing",
    "INSERT INTO ledger_transaction (id, idempotency_key, kind, organization_id, currency, "
    "content_sha256, created_at) VALUES ('lt_x', 'x', 'gift', 'org_1', 'usd', '', "
    "'2020-01-01 00:00:00.000000+00:00')": "lt_x is in no seal",
}


@pytest.mark.parametrize("statement", TAMPERED, ids=lambda text: text[:60])
async def test_what_is_changed_later_is_found(books: Books, statement: str) -> None:
    await settle_some(books, 2)
    assert seal_some(books.engine, books.key, limit=1) == seal_some(books.engine, books.key) == 1
    assert books.check().problem is None
    books.tamper(statement)
    problem = books.check().problem
    assert problem is not None
    assert TAMPERED[statement] in problem


async def test_another_key_did_not_sign(books: Books, tmp_path: Path) -> None:
    await settle_some(books, 1)
    books.seal()
    books.key = open_key(tmp_path / "other.key")
    assert books.check().problem == f"seal 1 is not signed by the key {books.key.public_hex}"


async def test_what_has_no_hash_of_its_own_is_sealed_too(books: Books) -> None:
    """As transactions of an earlier version, of which receipts were not hashed."""
    await settle_some(books, 1)
    books.tamper("UPDATE ledger_transaction SET content_sha256 = '', organization_id = ''")
    assert books.seal() == 1
    assert books.check().problem is None
    with books.engine.begin() as connection:
        request_id = connection.scalar(text("SELECT min(request_id) FROM usage_event"))
    assert await books.records.proof("org_1", request_id) is None


def test_the_key_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "receipts.key"
    key = open_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["receipts.key"]
    assert open_key(path).public_hex == key.public_hex
    digest = "ab" * 32
    assert is_signed(key.public_hex, digest, key.sign(digest))
    assert not is_signed(key.public_hex, "cd" * 32, key.sign(digest))
    assert not is_signed("not a key", digest, key.sign(digest))
    path.write_text("something else")
    with pytest.raises(Conflict, match="Restore it from a backup"):
        open_key(path)
