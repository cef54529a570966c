"""Credit is added once, used up in order, taken back and ended, and the books agree throughout."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select

from app.billing import credits
from app.billing.accounts import AccountWriter
from app.billing.ledger import (
    PROMOTIONAL_COST,
    REVENUE,
    STRIPE_CLEARING,
    credit_account,
    lock_account,
    on_account,
    post,
    posting_time,
)
from app.billing.payments.returning import give_back
from app.billing.rating import Settlement
from app.billing.service import set_spending_limit
from app.billing.tables import (
    AccountBalance,
    CreditLot,
    LedgerEntry,
    LedgerTransaction,
    LotUse,
    UnsealedTransaction,
)
from app.core import clock
from app.core.database import Database
from app.core.errors import Conflict, PaymentRequired
from app.metering.tables import UsageEvent, UsageHour

from .conftest import ORGANIZATION

MakeSettlement = Callable[..., Settlement]
Add = Callable[..., object]
PAID, PROMOTIONAL = (credit_account(ORGANIZATION, kind) for kind in ("paid", "promotional"))
OWED = on_account(ORGANIZATION)


@pytest.fixture
async def books(database: Database) -> AsyncIterator[Database]:
    """Afterwards every posting sums to zero, and accounts are what the ledger says."""
    yield database
    async with database.read() as session:
        sums = await session.scalars(
            select(func.sum(LedgerEntry.amount_nano)).group_by(LedgerEntry.transaction_id)
        )
        assert {int(total) for total in sums} <= {0}
        balance = await session.get(AccountBalance, ORGANIZATION)
        entries = await balances(database)
        own = sum(nano for name, nano in entries.items() if name.startswith(OWED))
        assert balance is None or balance.posted_nano == own
        for kind in ("paid", "promotional"):
            left = await session.scalar(
                select(func.sum(CreditLot.remaining_nano)).where(CreditLot.kind == kind)
            )
            assert int(left or 0) == entries.get(credit_account(ORGANIZATION, kind), 0)


async def balances(database: Database) -> dict[str, int]:
    async with database.read() as session:
        rows = await session.execute(
            select(LedgerEntry.account, func.sum(LedgerEntry.amount_nano)).group_by(
                LedgerEntry.account
            )
        )
        return {name: int(nano) for name, nano in rows}


async def add(
    database: Database,
    amount_nano: int,
    source: str,
    kind: str = "paid",
    priority: int = 50,
    expires_at: datetime | None = None,
) -> str | None:
    async with database.write() as session:
        return await credits.add_lot(
            session,
            ORGANIZATION,
            kind,
            amount_nano,
            source=source,
            currency="usd",
            from_account=STRIPE_CLEARING if kind == "paid" else PROMOTIONAL_COST,
            priority=priority,
            expires_at=expires_at,
        )


async def take_back(database: Database, amount_nano: int, key: str = "refund:1") -> str | None:
    async with database.write() as session:
        return await credits.take_back(
            session,
            source="stripe:pi_1",
            amount_nano=amount_nano,
            key=key,
            kind="refund",
            to_account=STRIPE_CLEARING,
        )


async def account(database: Database) -> AccountBalance:
    async with database.read() as session:
        row = await session.get(AccountBalance, ORGANIZATION)
        assert row is not None
        return row


async def test_one_payment_gives_its_credit_once(books: Database) -> None:
    assert await add(books, 100, "stripe:pi_1") is not None
    assert await add(books, 100, "stripe:pi_1") is None
    assert await balances(books) == {STRIPE_CLEARING: -100, PAID: 100}


async def test_usage_draws_lots_in_order_and_then_the_account(
    accounts: AccountWriter, books: Database, settlement: MakeSettlement
) -> None:
    settled = settlement("req_1")
    cost = settled.amount_nano
    soon, later = (clock.now() + timedelta(days=days) for days in (1, 9))
    last = await add(books, cost, "stripe:pi_1")
    second = await add(books, cost // 4, "grant:later", "promotional", 50, later)
    first = await add(books, cost // 4, "grant:soon", "promotional", 50, soon)
    await accounts.hold("req_1", ORGANIZATION, 10**8)
    accounts.settle(settled)
    await accounts.hold("req_2", ORGANIZATION, 10**8)
    accounts.settle(settlement("req_2"))
    await accounts.flush()
    async with books.read() as session:
        left = {lot.id: lot.remaining_nano for lot in await session.scalars(select(CreditLot))}
        drawn = (await session.scalars(select(LotUse.lot_id))).all()
    assert left == {first: 0, second: 0, last: 0}
    assert set(drawn) == {first, second, last}
    entries = await balances(books)
    assert entries["revenue"] == 2 * cost
    assert (entries[PAID], entries[PROMOTIONAL]) == (0, 0)
    assert entries[OWED] == cost + 2 * (cost // 4) - 2 * cost


@pytest.mark.parametrize(("priority", "is_first"), [(0, True), (100, False)])
async def test_priority_comes_before_expiry(
    accounts: AccountWriter,
    books: Database,
    settlement: MakeSettlement,
    priority: int,
    is_first: bool,
) -> None:
    mine = await add(books, 10**12, "grant:mine", "promotional", priority)
    await add(books, 10**12, "grant:soon", "promotional", 50, clock.now() + timedelta(days=1))
    accounts.settle(settlement("req_1"))
    await accounts.flush()
    async with books.read() as session:
        [drawn] = (await session.scalars(select(LotUse.lot_id))).all()
    assert (drawn == mine) == is_first


async def test_requests_settled_together_share_one_posting(
    accounts: AccountWriter, books: Database, settlement: MakeSettlement
) -> None:
    for number in range(5):
        accounts.settle(settlement(f"req_{number}"))
    accounts.settle(settlement("req_9", outcome="failed"))
    await accounts.flush()
    async with books.read() as session:
        [transaction] = await session.scalars(select(LedgerTransaction))
        queued = (await session.scalars(select(UnsealedTransaction.ledger_transaction_id))).all()
        events = (await session.scalars(select(UsageEvent.ledger_transaction_id))).all()
        hours = await session.scalars(select(UsageHour))
        total = sum(hour.amount_nano for hour in hours)
    assert queued == [transaction.id]
    assert events == [transaction.id] * 6
    assert len(transaction.content_sha256) == 64
    assert (await balances(books))["revenue"] == total == 5 * settlement("x").amount_nano


async def test_a_prepaid_account_spends_its_credit_and_no_more(
    accounts: AccountWriter, books: Database, settlement: MakeSettlement
) -> None:
    async with books.write() as session:
        await set_spending_limit(session, ORGANIZATION, 0, "usd")
    await add(books, 1_000_000, "stripe:pi_1")
    await accounts.hold("req_1", ORGANIZATION, 1_000_000)
    with pytest.raises(PaymentRequired, match="prepaid balance") as caught:
        await accounts.hold("req_2", ORGANIZATION, 1)
    assert caught.value.code == "balance_too_low"


async def test_a_refund_takes_what_is_left_and_the_rest_is_owed(
    accounts: AccountWriter, books: Database, settlement: MakeSettlement
) -> None:
    settled = settlement("req_1")
    cost = settled.amount_nano
    await add(books, 2 * cost, "stripe:pi_1")
    accounts.settle(settled)
    await accounts.flush()
    assert await take_back(books, 2 * cost) is not None
    assert await take_back(books, 2 * cost) is None
    entries = await balances(books)
    assert (entries[PAID], entries[OWED], entries[STRIPE_CLEARING]) == (0, -cost, 0)


async def test_a_refund_under_running_requests_keeps_their_promise(
    accounts: AccountWriter, books: Database, settlement: MakeSettlement
) -> None:
    async with books.write() as session:
        await set_spending_limit(session, ORGANIZATION, 0, "usd")
    settled = settlement("req_1")
    await add(books, settled.amount_nano, "stripe:pi_1")
    await accounts.hold("req_1", ORGANIZATION, settled.amount_nano)
    await take_back(books, settled.amount_nano)
    row = await account(books)
    assert (row.posted_nano, row.held_nano) == (0, settled.amount_nano)
    assert row.forced_nano == settled.amount_nano
    with pytest.raises(PaymentRequired):
        await accounts.hold("req_2", ORGANIZATION, 1)
    accounts.settle(settled)
    await accounts.flush()
    row = await account(books)
    assert (row.posted_nano, row.held_nano) == (-settled.amount_nano, 0)


async def test_the_next_payment_of_a_prepaid_account_pays_its_debt_first(
    accounts: AccountWriter, books: Database, settlement: MakeSettlement
) -> None:
    async with books.write() as session:
        await set_spending_limit(session, ORGANIZATION, 0, "usd")
    accounts.settle(settlement("req_1"))
    await accounts.flush()
    owed = settlement("x").amount_nano
    await add(books, owed + 7, "stripe:pi_1")
    entries = await balances(books)
    assert (entries[OWED], entries[PAID]) == (0, 7)
    await add(books, 5, "stripe:pi_2")
    assert (await balances(books))[PAID] == 12


async def test_credit_is_in_the_currency_of_its_account(books: Database) -> None:
    async with books.write() as session:
        await lock_account(session, "org_eur", "eur")
        with pytest.raises(Conflict, match="kept in EUR"):
            await credits.add_lot(
                session,
                "org_eur",
                "promotional",
                1,
                source="grant:1",
                currency="usd",
                from_account=PROMOTIONAL_COST,
            )


async def test_a_refund_of_a_payment_that_paid_debt_owes_it_again(
    accounts: AccountWriter, books: Database, settlement: MakeSettlement
) -> None:
    async with books.write() as session:
        await set_spending_limit(session, ORGANIZATION, 0, "usd")
    accounts.settle(settlement("req_1"))
    await accounts.flush()
    owed = settlement("x").amount_nano
    await add(books, owed + 7, "stripe:pi_1")
    await take_back(books, owed + 7)
    entries = await balances(books)
    assert (entries[OWED], entries[PAID], entries[STRIPE_CLEARING]) == (-owed, 0, 0)


async def test_credit_ends_at_its_time_but_not_under_a_running_request(
    accounts: AccountWriter, books: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with books.write() as session:
        await set_spending_limit(session, ORGANIZATION, 0, "usd")
    lot_id = await add(books, 1_000, "grant:1", "promotional", 50, clock.now() + timedelta(days=1))
    assert lot_id is not None
    await accounts.hold("req_1", ORGANIZATION, 400)

    async def expire() -> str | None:
        async with books.write() as session:
            return await credits.expire_due(session, lot_id)

    assert await expire() is None
    over = clock.now() + timedelta(days=2)
    monkeypatch.setattr(clock, "now", lambda: over)
    async with books.read() as session:
        assert list(await credits.due_lots(session, over)) == [lot_id]
    assert await expire() is not None
    assert (await balances(books))[PROMOTIONAL] == 400
    assert await expire() is None
    accounts.void("req_1")
    await accounts.flush()
    assert await expire() is not None
    assert await balances(books) == {PROMOTIONAL: 0, PROMOTIONAL_COST: 0}


async def test_credit_that_is_over_admits_nothing_before_it_is_taken_away(
    accounts: AccountWriter,
    books: Database,
    settlement: MakeSettlement,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But it pays for what it was promised to, and other credit admits."""
    cost = settlement("x").amount_nano
    async with books.write() as session:
        await set_spending_limit(session, ORGANIZATION, 0, "usd")
    ends_at = clock.now() + timedelta(days=1)
    await add(books, 10 * cost, "grant:1", "promotional", 10, ends_at)
    await accounts.hold("req_1", ORGANIZATION, cost + 5)
    monkeypatch.setattr(clock, "now", lambda: ends_at)
    with pytest.raises(PaymentRequired) as refused:
        await accounts.hold("req_2", ORGANIZATION, 1)
    assert refused.value.code == "balance_too_low"
    accounts.settle(settlement("req_1"))
    await accounts.flush()
    assert await balances(books) == {
        OWED: 0,
        PROMOTIONAL: 9 * cost,
        PROMOTIONAL_COST: -10 * cost,
        REVENUE: cost,
    }
    await add(books, 2 * cost, "stripe:pi_1")
    with pytest.raises(PaymentRequired):
        await accounts.hold("req_3", ORGANIZATION, 2 * cost + 1)
    await accounts.hold("req_3", ORGANIZATION, 2 * cost)
    accounts.settle(settlement("req_3"))
    await accounts.flush()
    entries = await balances(books)
    assert (entries[PROMOTIONAL], entries[PAID], entries[OWED]) == (9 * cost, cost, 0)


async def test_what_the_limit_covers_keeps_no_credit_that_is_over(
    accounts: AccountWriter,
    books: Database,
    settlement: MakeSettlement,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long requests follow each other without a pause."""
    cost = settlement("x").amount_nano
    async with books.write() as session:
        await set_spending_limit(session, ORGANIZATION, 10 * cost, "usd")
    ends_at = clock.now() + timedelta(days=1)
    lot_id = await add(books, 3 * cost, "grant:1", "promotional", 10, ends_at)
    assert lot_id is not None
    await accounts.hold("req_0", ORGANIZATION, 11 * cost)
    monkeypatch.setattr(clock, "now", lambda: ends_at)
    accounts.settle(settlement("req_0"))  # of what it was promised, 1 beyond the limit
    await accounts.flush()
    entries = await balances(books)
    assert (entries[PROMOTIONAL], entries[OWED]) == (2 * cost, 0)
    for number in (1, 2, 3):
        await accounts.hold(f"req_{number}", ORGANIZATION, cost)
    for number in (1, 2):
        accounts.settle(settlement(f"req_{number}"))
    await accounts.flush()
    entries = await balances(books)
    assert (entries[PROMOTIONAL], entries[OWED]) == (2 * cost, -2 * cost)
    async with books.write() as session:
        assert await credits.expire_due(session, lot_id) is not None
    accounts.settle(settlement("req_3"))
    await accounts.flush()
    entries = await balances(books)
    assert (entries[PROMOTIONAL], entries[OWED]) == (0, -3 * cost)


async def test_without_a_limit_credit_that_is_over_pays_for_nothing(
    accounts: AccountWriter,
    books: Database,
    settlement: MakeSettlement,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cost = settlement("x").amount_nano
    ends_at = clock.now() + timedelta(days=1)
    lot_id = await add(books, 10 * cost, "grant:1", "promotional", 10, ends_at)
    assert lot_id is not None
    await accounts.hold("req_1", ORGANIZATION, cost)
    monkeypatch.setattr(clock, "now", lambda: ends_at)
    accounts.settle(settlement("req_1"))
    await accounts.flush()
    entries = await balances(books)
    assert (entries[PROMOTIONAL], entries[OWED]) == (10 * cost, -cost)
    async with books.write() as session:
        assert await credits.expire_due(session, lot_id) is not None
    assert (await balances(books))[PROMOTIONAL] == 0


async def test_without_a_limit_credit_ends_whatever_runs(
    accounts: AccountWriter, books: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    lot_id = await add(books, 1_000, "grant:1", "promotional", 50, clock.now() + timedelta(days=1))
    assert lot_id is not None
    await accounts.hold("req_1", ORGANIZATION, 400)
    over = clock.now() + timedelta(days=2)
    monkeypatch.setattr(clock, "now", lambda: over)
    async with books.write() as session:
        assert await credits.expire_due(session, lot_id) is not None
    assert await balances(books) == {PROMOTIONAL: 0, PROMOTIONAL_COST: 0}


async def test_nothing_is_posted_into_a_closed_month(
    accounts: AccountWriter, books: Database, settlement: MakeSettlement
) -> None:
    closed_until = datetime(2100, 1, 1, tzinfo=UTC)
    async with books.write() as session:
        row = await lock_account(session, ORGANIZATION, "usd")
        row.closed_until = closed_until
    await add(books, 10, "stripe:pi_1")
    accounts.settle(settlement("req_1"))
    await accounts.flush()
    async with books.read() as session:
        times = set(await session.scalars(select(LedgerTransaction.created_at)))
        hours = set(await session.scalars(select(UsageHour.hour)))
    assert times == {closed_until}
    assert hours == {int(closed_until.timestamp()) // 3600}
    assert posting_time(None) <= clock.now()


async def test_the_ledger_refuses_changes(books: Database) -> None:
    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError

    await add(books, 10, "stripe:pi_1")
    for statement in (
        "UPDATE ledger_entry SET amount_nano = 0",
        "DELETE FROM ledger_entry",
        "UPDATE ledger_transaction SET kind = 'usage'",
        "DELETE FROM ledger_transaction",
    ):
        with pytest.raises(DBAPIError, match="append-only"):
            async with books.write() as session:
                await session.execute(text(statement))


async def test_a_posting_must_balance(books: Database) -> None:
    async with books.write() as session:
        with pytest.raises(AssertionError):
            await post(
                session,
                key="x",
                kind="credit",
                organization_id=ORGANIZATION,
                currency="usd",
                entries={OWED: 1},
            )


async def test_what_is_given_back_to_a_lot_that_ended_ends_too(
    books: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = clock.now() + timedelta(days=1)
    lot_id = await add(books, 10, "stripe:pi_1", "paid", 50, ends)
    assert lot_id is not None
    await take_back(books, 5, "dispute:1")
    monkeypatch.setattr(clock, "now", lambda: ends)
    async with books.write() as session:
        assert await credits.expire_due(session, lot_id)
    async with books.write() as session:
        await lock_account(session, ORGANIZATION, "usd")
        await give_back(
            session,
            taken_keys=["dispute:1"],
            amount_nano=5,
            key="won:1",
            kind="dispute",
            from_account=STRIPE_CLEARING,
        )
    async with books.write() as session:
        assert await credits.expire_due(session, lot_id)
        assert await credits.expire_due(session, lot_id) is None
    async with books.read() as session:
        lot = await session.get_one(CreditLot, lot_id)
        assert lot.remaining_nano == 0
        assert await credits.due_lots(session, ends) == []


async def test_what_is_given_back_in_parts_returns_to_where_it_was(books: Database) -> None:
    lot_id = await add(books, 100, "stripe:pi_1")
    assert lot_id is not None
    async with books.write() as session:
        lot = await session.get_one(CreditLot, lot_id)
        await post(
            session,
            key="usage:1",
            kind="usage",
            organization_id=ORGANIZATION,
            currency="usd",
            entries={PAID: -50, REVENUE: 50},
        )
        lot.remaining_nano -= 50
    await take_back(books, 70, "dispute:1")
    await take_back(books, 30, "dispute:2")
    given: list[str] = []
    for nano, owed, left in ((30, 20, 0), (45, 0, 25), (25, 0, 50)):
        async with books.write() as session:
            await lock_account(session, ORGANIZATION, "usd")
            key = f"won:{len(given)}"
            await give_back(
                session,
                taken_keys=["dispute:1", "dispute:2"],
                given_keys=given,
                amount_nano=nano,
                key=key,
                kind="dispute",
                from_account=STRIPE_CLEARING,
            )
            given.append(key)
        entries = await balances(books)
        assert (entries.get(OWED, 0), entries[PAID]) == (-owed, left)
        async with books.read() as session:
            assert (await session.get_one(CreditLot, lot_id)).remaining_nano == left


async def test_two_who_take_back_at_once_take_no_more_than_there_is(books: Database) -> None:
    """On PostgreSQL the second has read the lot before it waits for the account."""
    lot_id = await add(books, 10, "stripe:pi_1")
    await asyncio.gather(*(take_back(books, 6, f"refund:{n}") for n in range(2)))
    async with books.read() as session:
        assert (await session.get_one(CreditLot, lot_id)).remaining_nano == 0
    entries = await balances(books)
    assert (entries[PAID], entries[OWED]) == (0, -2)


async def test_a_lot_that_is_used_up_meanwhile_does_not_end_as_well(
    books: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = clock.now() + timedelta(days=1)
    lot_id = await add(books, 10, "stripe:pi_1", "paid", 50, ends)
    assert lot_id is not None
    monkeypatch.setattr(clock, "now", lambda: ends)

    async def expire() -> str | None:
        async with books.write() as session:
            return await credits.expire_due(session, lot_id)

    await asyncio.gather(take_back(books, 6), expire())
    async with books.read() as session:
        assert (await session.get_one(CreditLot, lot_id)).remaining_nano == 0
