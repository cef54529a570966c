"""Transactions behave alike on both databases: atomic, isolated, and aware of time zones."""

import asyncio
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import select, text

from app.billing.tables import AccountBalance
from app.core.database import Database
from app.registry.tables import Artifact


async def test_a_failed_block_leaves_nothing(database: Database) -> None:
    moment = datetime(2026, 1, 2, 12, tzinfo=timezone(timedelta(hours=5)))

    async def fail() -> None:
        async with database.write() as session:
            session.add(Artifact(id="art_1", digest="d", size_bytes=1, created_at=moment))
            await session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail()
    async with database.read() as session:
        assert (await session.scalars(select(Artifact))).all() == []


async def test_an_instant_keeps_its_meaning(database: Database) -> None:
    moment = datetime(2026, 1, 2, 12, tzinfo=timezone(timedelta(hours=5)))
    async with database.write() as session:
        session.add(Artifact(id="art_1", digest="d", size_bytes=1, created_at=moment))
    async with database.read() as session:
        stored = (await session.scalars(select(Artifact))).one().created_at
    assert stored == moment
    assert stored.utcoffset() == timedelta(0)


async def test_concurrent_read_then_write_loses_no_update(database: Database) -> None:
    async with database.write() as session:
        session.add(AccountBalance(organization_id="org_1", currency="usd"))

    async def add_one() -> None:
        async with database.write() as session:
            query = select(AccountBalance).with_for_update()
            balance = (await session.scalars(query)).one()
            balance.posted_nano += 1

    await asyncio.gather(*(add_one() for _ in range(30)))
    async with database.read() as session:
        assert (await session.scalars(select(AccountBalance.posted_nano))).one() == 30


async def test_a_cancelled_transaction_lets_go_of_its_lock(database: Database) -> None:
    """Wherever its task is cancelled: while it begins, works, or ends."""
    for turn in range(60):

        async def change() -> None:
            async with database.write() as session:
                await session.execute(text("UPDATE organization SET name = name"))

        tasks = [asyncio.create_task(change()) for _ in range(3)]
        await asyncio.sleep(turn / 20_000)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        async with asyncio.timeout(2), database.write() as session:
            await session.execute(text("UPDATE organization SET name = name"))


async def test_a_cancelled_read_of_what_it_wrote_lets_go_of_its_lock(tmp_path: Path) -> None:
    """Also while a statement, kept by the traceback of its task, still has rows to give."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/a.db")
    async with database.write() as session:
        await session.execute(text("CREATE TABLE t (x INTEGER)"))
    connection = await database.engine.raw_connection()
    driver = connection.driver_connection
    assert driver is not None
    await driver.execute("BEGIN IMMEDIATE")
    cursor = await driver.execute("INSERT INTO t VALUES (1), (2), (3) RETURNING x")
    await cursor.fetchone()
    connection.invalidate()
    async with asyncio.timeout(2), database.write() as session:
        await session.execute(text("INSERT INTO t VALUES (4)"))
    async with database.read() as session:
        assert (await session.scalars(text("SELECT x FROM t"))).all() == [4]
    del cursor
    await database.close()
