"""What is kept of Stripe's objects: one row of each, the newest."""

import asyncio

from app.billing.payments import mirror
from app.core.database import Database


async def _put(database: Database, state: str) -> None:
    async with database.write() as session:
        await mirror.put(session, "cus_1", "customer", {"state": state})
        await asyncio.sleep(0.1)  # until another waits for this row


async def _state(database: Database) -> str:
    async with database.read() as session:
        row = await mirror.read(session, "cus_1")
    assert row is not None
    return row.data["state"]


async def test_two_may_keep_the_first_state_of_an_object_at_once(database: Database) -> None:
    await asyncio.gather(_put(database, "a"), _put(database, "b"))
    assert await _state(database) in {"a", "b"}
    await _put(database, "c")
    assert await _state(database) == "c"


async def test_a_row_that_was_read_before_shows_what_was_put_since(database: Database) -> None:
    await _put(database, "a")
    async with database.write() as session:
        row = await mirror.read(session, "cus_1")
        await mirror.put(session, "cus_1", "customer", {"state": "b"})
        assert row is not None
        assert row.data == {"state": "b"}
