"""Holds, limits and settlements on a real database, under concurrency and repetition."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from queue import SimpleQueue
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection, func, literal_column, select, text, update
from sqlalchemy.exc import DataError, IntegrityError, OperationalError

from app.billing import accounts as accounts_module
from app.billing import holds as holding
from app.billing import posting
from app.billing.accounts import AccountWriter
from app.billing.rating import Settlement
from app.billing.service import read_account, set_spending_limit
from app.billing.tables import (
    MAX_BALANCE_NANO,
    MAX_HOLD_NANO,
    AccountBalance,
    Hold,
    LedgerEntry,
    LedgerTransaction,
)
from app.core.database import Database
from app.core.errors import Conflict, PaymentRequired, Unavailable
from app.metering.tables import UsageEvent, UsageLine
from app.settings import Settings
from tests.app.billing.conftest import ORGANIZATION

MakeSettlement = Callable[..., Settlement]


async def limit(database: Database, nano: int | None) -> None:
    async with database.write() as session:
        await set_spending_limit(session, ORGANIZATION, nano, "usd")


async def balance(database: Database) -> AccountBalance:
    async with database.read() as session:
        row = await session.get(AccountBalance, ORGANIZATION)
        assert row is not None
        return row


async def count(database: Database, table: type) -> int:
    async with database.read() as session:
        return await session.scalar(select(func.count()).select_from(table)) or 0


async def test_an_unknown_organization_is_opened_without_limit(
    accounts: AccountWriter, database: Database
) -> None:
    await accounts.hold("req_1", ORGANIZATION, 10**14)
    row = await balance(database)
    assert (row.posted_nano, row.held_nano, row.credit_limit_nano) == (0, 10**14, None)


async def test_a_hold_becomes_a_settled_event(
    accounts: AccountWriter, database: Database, settlement: MakeSettlement
) -> None:
    await accounts.hold("req_1", ORGANIZATION, 10_000_000)
    settled = settlement("req_1")
    accounts.settle(settled)
    await accounts.flush()

    row = await balance(database)
    assert (row.posted_nano, row.held_nano) == (-settled.amount_nano, 0)
    assert accounts.settled_ids == ["req_1"]  # type: ignore[attr-defined]
    assert await count(database, Hold) == 0
    async with database.read() as session:
        event = await session.get(UsageEvent, "req_1:1")
        assert event is not None
        assert event.amount_nano == settled.amount_nano
        assert event.duration_ns == 5_000_000
        lines = (await session.scalars(select(UsageLine))).all()
        assert sum(line.amount_nano for line in lines) == settled.amount_nano
        entries = (await session.scalars(select(LedgerEntry))).all()
        assert {entry.account: entry.amount_nano for entry in entries} == {
            f"customer:{ORGANIZATION}": -settled.amount_nano,
            "revenue": settled.amount_nano,
        }


async def test_settling_twice_counts_once(
    accounts: AccountWriter, database: Database, settlement: MakeSettlement
) -> None:
    once = settlement("req_1")
    accounts.settle(once)
    await accounts.flush()
    accounts.settle(once)
    accounts.settle(settlement("req_2"))
    accounts.settle(settlement("req_2"))
    await accounts.flush()
    assert await count(database, UsageEvent) == 2
    assert await count(database, LedgerTransaction) == 2
    async with database.read() as session:
        account = await read_account(session, ORGANIZATION, "usd")
    assert account.owed_nano == 2 * once.amount_nano


async def test_concurrent_requests_cannot_pass_a_tiny_limit(
    accounts: AccountWriter, database: Database, settlement: MakeSettlement
) -> None:
    """200 at once, each may cost 1,000,000 and costs 410,100; the limit covers 7 at a time."""
    limit_nano = 7_500_000
    await limit(database, limit_nano)
    refusals: list[PaymentRequired] = []
    most_held = 0

    async def request(i: int) -> None:
        nonlocal most_held
        try:
            await accounts.hold(f"req_{i}", ORGANIZATION, 1_000_000)
        except PaymentRequired as error:
            refusals.append(error)
            return
        row = await balance(database)
        assert row.posted_nano - row.held_nano >= -limit_nano
        most_held = max(most_held, row.held_nano)
        accounts.settle(settlement(f"req_{i}"))

    await asyncio.gather(*(request(i) for i in range(200)))
    await accounts.flush()
    row = await balance(database)
    num_served = await count(database, UsageEvent)
    assert 7 <= num_served == 200 - len(refusals)
    assert row.held_nano == 0
    assert -row.posted_nano == num_served * 410_100 <= limit_nano
    assert 0 < most_held <= limit_nano
    assert refusals[0].code == "spending_limit_reached"


async def test_writers_of_several_processes_share_one_limit(
    accounts: AccountWriter, database: Database, settings: Settings
) -> None:
    """As with several apps on PostgreSQL: the database alone decides."""
    await limit(database, 25_000)
    others = [AccountWriter(settings.sync_database_url) for _ in range(3)]
    for i, other in enumerate(others):
        await other.start(f"jnl_{i}")
    writers = [accounts, *others]
    answers = await asyncio.gather(
        *(writers[i % 4].hold(f"req_{i}", ORGANIZATION, 1_000) for i in range(200)),
        return_exceptions=True,
    )
    assert answers.count(None) == 25
    assert all(isinstance(answer, PaymentRequired) for answer in answers if answer is not None)
    assert (await balance(database)).held_nano == 25_000
    for other in others:
        await other.close()


async def test_a_refusal_names_the_limit_and_the_shortfall(
    accounts: AccountWriter, database: Database
) -> None:
    await limit(database, 1_500_000_000)
    await accounts.hold("req_1", ORGANIZATION, 1_000_000_000)
    with pytest.raises(PaymentRequired) as caught:
        await accounts.hold("req_2", ORGANIZATION, 750_000_000)
    message = caught.value.message
    assert "limit of $1.500000000" in message
    assert "$0.500000000 is left" in message
    assert "$0.250000000 is missing" in message


async def test_the_next_request_sees_what_the_last_one_gave_back(
    accounts: AccountWriter,
    database: Database,
    settlement: MakeSettlement,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The limit fits one hold at a time: a settlement that still waits must count."""
    monkeypatch.setattr(accounts_module, "SETTLE_DELAY_SECONDS", 3600.0)
    await limit(database, 3_000_000)
    for i in range(4):
        await accounts.hold(f"req_{i}", ORGANIZATION, 1_700_000)
        accounts.settle(settlement(f"req_{i}"))
    with pytest.raises(PaymentRequired):
        await accounts.hold("req_4", ORGANIZATION, 1_700_000)


async def test_a_void_gives_everything_back(accounts: AccountWriter, database: Database) -> None:
    await accounts.hold("req_1", ORGANIZATION, 5)
    accounts.void("req_1")
    accounts.void("req_unknown")
    await accounts.flush()
    assert (await balance(database)).held_nano == 0


async def test_holds_of_an_earlier_process_are_freed(
    accounts: AccountWriter, database: Database, settings: Settings
) -> None:
    for name in ("req_ran", "req_never_ran"):
        await accounts.hold(name, ORGANIZATION, 5)
    await accounts.close()
    again = AccountWriter(settings.sync_database_url)
    await again.start("jnl_test")
    other = AccountWriter(settings.sync_database_url)
    await other.start("jnl_other")
    await other.hold("req_other", ORGANIZATION, 5)
    assert await again.release_orphans({"req_ran"}) == 1
    assert (await balance(database)).held_nano == 10
    await again.close()
    await other.close()


async def test_one_bad_settlement_does_not_hold_up_the_others(
    accounts: AccountWriter, database: Database, settlement: MakeSettlement
) -> None:
    bad = settlement("req_bad", outcome="unheard-of")
    for item in (settlement("req_1"), bad, settlement("req_2")):
        accounts.settle(item)
    await accounts.flush()
    assert accounts.settled_ids == ["req_1", "req_2"]  # type: ignore[attr-defined]
    assert await count(database, UsageEvent) == 2


async def test_settlements_wait_out_a_busy_database(
    accounts: AccountWriter,
    database: Database,
    settlement: MakeSettlement,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    post = posting.post_settlements
    failures = [0]

    def flaky(*arguments: object) -> None:
        failures[0] += 1
        if failures[0] < 3:
            raise OperationalError("insert", {}, sqlite3.OperationalError("database is locked"))
        post(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(posting, "post_settlements", flaky)
    await accounts.hold("req_1", ORGANIZATION, 10_000_000)
    accounts.settle(settlement("req_1"))
    await accounts.is_settled.wait()  # type: ignore[attr-defined]
    assert (await balance(database)).held_nano == 0


async def test_lost_connections_are_replaced(
    accounts: AccountWriter,
    database: Database,
    settlement: MakeSettlement,
    settings: Settings,
) -> None:
    if settings.is_sqlite:
        pytest.skip("SQLite has no connections to lose")
    await accounts.hold("req_1", ORGANIZATION, 10_000_000)
    async with database.read() as session:
        await session.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    accounts.settle(settlement("req_1"))
    await accounts.hold("req_2", ORGANIZATION, 5)
    await accounts.is_settled.wait()  # type: ignore[attr-defined]
    assert (await balance(database)).held_nano == 5


async def test_a_limit_cannot_break_a_promise_but_can_end_spending(
    accounts: AccountWriter, database: Database, settlement: MakeSettlement
) -> None:
    await accounts.hold("req_1", ORGANIZATION, 1_000_000)
    with pytest.raises(Conflict, match="running now hold more"):
        await limit(database, 10)
    accounts.settle(settlement("req_1"))
    await accounts.flush()
    await limit(database, 10)  # below what is owed already
    with pytest.raises(PaymentRequired):
        await accounts.hold("req_2", ORGANIZATION, 1)
    await limit(database, None)
    await accounts.hold("req_3", ORGANIZATION, 10**12)


async def test_the_ledger_sums_to_zero_and_matches_the_balance(
    accounts: AccountWriter, database: Database, settlement: MakeSettlement
) -> None:
    for i in range(30):
        await accounts.hold(f"req_{i}", ORGANIZATION, 10_000_000)
        outcome = ("completed", "cancelled", "failed")[i % 3]
        accounts.settle(settlement(f"req_{i}", output_tokens=i, outcome=outcome))
    await accounts.flush()
    async with database.read() as session:
        assert await session.scalar(select(func.sum(LedgerEntry.amount_nano))) == 0
        owned = await session.scalar(
            select(func.sum(LedgerEntry.amount_nano)).where(
                LedgerEntry.account == f"customer:{ORGANIZATION}"
            )
        )
        events = await session.scalar(select(func.sum(UsageEvent.amount_nano)))
    assert (await balance(database)).posted_nano == owned == -(events or 0) != 0


def test_sqlite_holds_do_not_wait_for_the_disk(settings: Settings) -> None:
    if not settings.is_sqlite:
        pytest.skip("PostgreSQL keeps its own counsel")
    for make, level in ((accounts_module._atomic_engine, 1), (posting_engine, 2)):
        engine = make(settings.sync_database_url)
        with closing(engine.raw_connection()) as connection:
            assert connection.cursor().execute("PRAGMA synchronous").fetchone() == (level,)
        engine.dispose()


def posting_engine(url: str):
    return accounts_module.create_writer_engine(url)


async def test_a_request_beyond_all_measure_is_refused_and_harms_nobody(
    accounts: AccountWriter, database: Database
) -> None:
    for amount_nano in (MAX_HOLD_NANO + 1, 2**63, 10**30):
        with pytest.raises(PaymentRequired, match="fewer tokens"):
            await accounts.hold("req_dear", ORGANIZATION, amount_nano)
    await accounts.hold("req_next", ORGANIZATION, 5)
    assert (await balance(database)).held_nano == 5


async def test_a_hold_whose_commit_went_unheard_is_given_back(
    accounts: AccountWriter, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_holds = holding.take_holds

    def take_and_lose(connection: Connection, *arguments: Any) -> dict[str, holding.Refusal]:
        take_holds(connection, *arguments)
        connection.get_transaction().commit()  # type: ignore[union-attr]
        raise OperationalError("COMMIT", {}, OSError("the connection is gone"))

    with monkeypatch.context() as patch:
        patch.setattr(holding, "take_holds", take_and_lose)
        with pytest.raises(Unavailable):
            await accounts.hold("req_1", ORGANIZATION, 7)
    await accounts.flush()
    assert (await balance(database)).held_nano == 0


async def test_an_unforeseen_error_is_told_and_ends_nothing(
    accounts: AccountWriter,
    database: Database,
    settlement: MakeSettlement,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("nobody foresaw this")

    await accounts.hold("req_0", ORGANIZATION, 10_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(holding, "take_holds", fail)
        patch.setattr(posting, "post_settlements", fail)
        with pytest.raises(Unavailable):
            await accounts.hold("req_1", ORGANIZATION, 7)
        accounts.settle(settlement("req_0"))
        await accounts.flush()
    with monkeypatch.context() as patch:
        patch.setattr(accounts_module._Writer, "_settle_all", fail)
        with pytest.raises(Unavailable):
            await accounts.flush()
    assert accounts.is_alive
    await accounts.hold("req_2", ORGANIZATION, 5)
    await accounts.flush()
    assert accounts.settled_ids == ["req_0"]  # type: ignore[attr-defined]
    assert (await balance(database)).held_nano == 5


async def test_a_failing_turn_takes_back_no_answer(
    accounts: AccountWriter, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hold was taken and told so before what failed."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("nobody foresaw this")

    with monkeypatch.context() as patch:
        patch.setattr(accounts_module._Writer, "_is_due", fail)
        await accounts.hold("req_1", ORGANIZATION, 5)
    await accounts.flush()
    assert (await balance(database)).held_nano == 5


async def test_a_thread_that_ended_answers_nobody_with_silence(
    accounts: AccountWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(writer: object, operations: SimpleQueue[object]) -> None:
        while operations.qsize() < 3:
            time.sleep(0.001)
        raise RuntimeError("nobody foresaw this")

    assert accounts.is_alive
    monkeypatch.setattr(accounts_module._Writer, "_collect", fail)
    await accounts.flush()  # lets the thread come to its last turn
    waiting = (accounts.hold("req_1", ORGANIZATION, 5), accounts.flush(), accounts.flush())
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unavailable] * 3
    assert not accounts.is_alive
    for operation in (accounts.hold("req_2", ORGANIZATION, 5), accounts.flush()):
        with pytest.raises(Unavailable):
            await operation


async def set_balance(database: Database, posted_nano: int, held_nano: int) -> None:
    async with database.write() as session:
        row = await session.get_one(AccountBalance, ORGANIZATION)
        row.posted_nano, row.held_nano = posted_nano, held_nano


@pytest.mark.parametrize("limit_nano", [None, MAX_BALANCE_NANO])
@pytest.mark.parametrize("is_held", [True, False])
async def test_an_account_stays_within_what_can_be_counted(
    accounts: AccountWriter, database: Database, limit_nano: int | None, is_held: bool
) -> None:
    """Many requests at once, alone beyond 64 bits; some of them still fit."""
    await limit(database, limit_nano)
    taken_nano = MAX_BALANCE_NANO - 3 * MAX_HOLD_NANO
    await set_balance(database, *((0, taken_nano) if is_held else (-taken_nano, 0)))
    answers = await asyncio.gather(
        *(accounts.hold(f"req_{i}", ORGANIZATION, MAX_HOLD_NANO) for i in range(10_000)),
        return_exceptions=True,
    )
    assert answers.count(None) == 3
    refused = [answer for answer in answers if answer is not None]
    assert {type(answer) for answer in refused} == {PaymentRequired}
    assert {answer.code for answer in refused} == {"account_full"}  # type: ignore[union-attr]
    assert "$4,000,000,000.00" in str(refused[0])
    row = await balance(database)
    assert row.held_nano - row.posted_nano == MAX_BALANCE_NANO
    assert isinstance(row.held_nano, int)


async def test_a_settlement_beyond_what_can_be_counted_changes_nothing(
    accounts: AccountWriter, database: Database, settlement: MakeSettlement
) -> None:
    await accounts.hold("req_1", ORGANIZATION, 5)
    for i, spent_nano in enumerate((5 * 10**18, 9 * 10**18, 10**30)):
        dear = msgspec.structs.replace(settlement("req_1"), amount_nano=spent_nano)
        accounts.settle(dear)
        accounts.settle(settlement(f"req_beside_{i}"))
        await accounts.flush()
    row = await balance(database)
    assert row.held_nano == 5  # its hold stays until the journal is settled
    assert row.posted_nano == -3 * settlement("req_1").amount_nano
    assert len(accounts.settled_ids) == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("column", ["posted_nano", "held_nano", "credit_limit_nano"])
@pytest.mark.parametrize("nano", ["4000000000000000001", "-4000000000000000001", "1e19"])
async def test_the_table_itself_refuses_what_cannot_be_counted(
    accounts: AccountWriter, database: Database, column: str, nano: str
) -> None:
    await accounts.hold("req_1", ORGANIZATION, 5)
    with pytest.raises((IntegrityError, DataError)):
        async with database.write() as session:
            await session.execute(update(AccountBalance).values({column: literal_column(nano)}))


async def test_a_hold_given_up_before_it_was_taken_is_not_taken(
    accounts: AccountWriter, database: Database, settlement: MakeSettlement
) -> None:
    """The database was away for longer than the caller waited: hold and void come together."""
    settled = settlement("req_1")
    async with database.write() as session:
        await set_spending_limit(session, ORGANIZATION, settled.amount_nano + 1, "usd")
    await accounts.hold("req_1", ORGANIZATION, settled.amount_nano + 1)
    writer = accounts._writer
    assert writer is not None
    turn, gate, begun = writer._turn, threading.Event(), threading.Event()

    def slow(*arguments: Any, **options: Any) -> None:
        begun.set()
        gate.wait()
        turn(*arguments, **options)

    writer._turn = slow  # type: ignore[method-assign]
    flushing = asyncio.create_task(accounts.flush())
    await asyncio.to_thread(begun.wait)
    accounts.settle(settled)
    asking = asyncio.create_task(accounts.hold("req_2", ORGANIZATION, 1))
    await asyncio.sleep(0)
    asking.cancel()
    accounts.void("req_2")
    gate.set()
    await flushing
    await accounts.flush()
    async with database.read() as session:
        assert (await session.scalars(select(Hold))).all() == []
        balance = await session.get(AccountBalance, ORGANIZATION)
        assert balance is not None
        assert balance.held_nano == 0
