"""What is kept of comparisons, what counts as confirmed, and who is told."""

from datetime import timedelta

import pytest
from sqlalchemy import select

from app.billing.payments.notices import open_notices
from app.billing.payments.tables import ReconciliationRun
from app.billing.reconciliation import runs
from app.billing.reconciliation.check import MAX_NAMED, Difference, Subject, differing
from app.billing.reconciliation.dialects import snapshot
from app.billing.reconciliation.hours import HourSums
from app.billing.reconciliation.runs import add_run, latest_run, make_run, past_differences, prune
from app.core import clock
from app.core.database import Database
from tests.app.billing.conftest import ORGANIZATION
from tests.app.billing.reconciliation.conftest import OPERATOR, Books

SUBJECT = Subject(name="one", title="One", description="", left_label="a", right_label="b")
SPOILT = "UPDATE account_balance SET posted_nano = posted_nano + 1 WHERE organization_id = 'org_1'"
MENDED = SPOILT.replace("+", "-")


async def notices(books: Books) -> list[str]:
    async with books.database.read() as session:
        return [notice.message for notice in await open_notices(session, OPERATOR)]


async def test_what_one_comparison_found_is_no_alarm_yet(books: Books) -> None:
    await books.spoil(SPOILT)
    first = (await books.compare())["balances"]
    assert (first.num_differences, first.confirmed) == (1, [])
    assert await notices(books) == []
    await books.spoil(MENDED)
    assert await books.differing() == {}
    await books.spoil(SPOILT)
    assert (await books.compare())["balances"].confirmed == []


async def test_what_two_in_a_row_found_is_told_until_it_is_over(books: Books) -> None:
    await books.spoil(SPOILT)
    await books.compare()
    assert (await books.compare())["balances"].confirmed == [ORGANIZATION]
    (message,) = await notices(books)
    assert message.startswith("The books differ: Balances = ledger. Two comparisons in a row")
    assert ORGANIZATION in message
    await books.compare()
    assert len(await notices(books)) == 1
    await books.spoil(MENDED)
    await books.compare()
    assert await notices(books) == []


async def test_a_run_is_kept_as_it_was(books: Books) -> None:
    await books.spoil(SPOILT)
    run = await books.reconciler.run()
    async with books.database.read() as session:
        assert await latest_run(session, clock.now()) == run
        (past,) = await past_differences(session, 10)
    assert past.found == [f"Balances = ledger: {ORGANIZATION}"]
    assert (past.num_differences, past.num_confirmed) == (1, 0)


async def test_a_new_process_goes_on_where_the_last_one_stopped(books: Books) -> None:
    await books.sealer.turn()
    await books.compare()
    positions = (await books.reconciler.run()).positions
    assert positions == {"usage": 1, "seals": 1, "old_seals": 0}
    checks = {check.name: check for check in (await books.anew().run()).checks}
    assert checks["usage"].note == "0 of 0 new postings looked at."
    assert checks["seals"].note.startswith("0 new and 1 older")


async def test_old_runs_leave_one_for_each_day(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "NUM_KEPT", 4)
    midnight = clock.now().replace(hour=0, minute=0, second=0, microsecond=0)
    async with database.write() as session:
        for hours in range(3 * 24):
            at = midnight - timedelta(hours=hours + 1)
            is_worst = at.hour == 5
            found = [Difference("x", 1, 2)] if is_worst else []
            add_run(session, make_run(at, at, [SUBJECT.compared(0, 0, found)], {}))
        for _ in range(2):
            await session.flush()
            await prune(session, clock.now())
    async with database.read() as session:
        rows = await session.scalars(
            select(ReconciliationRun.started_at).order_by(ReconciliationRun.started_at.desc())
        )
        hours = [at.hour for at in rows]
    assert hours == [23, 22, 21, 20, 5, 5, 5]


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_a_clock_that_was_ahead_hides_no_difference(
    books: Books, monkeypatch: pytest.MonkeyPatch, is_restarted: bool
) -> None:
    with monkeypatch.context() as ahead:
        real = clock.now
        ahead.setattr(clock, "now", lambda: real() + timedelta(days=30))
        await books.compare()
    if is_restarted:
        books.reconciler = books.anew()
    await books.spoil(SPOILT)
    runs = [await books.reconciler.run() for _ in range(2)]
    assert [run.num_confirmed for run in runs] == [0, 1]
    assert await books.reconciler.latest() == runs[-1]
    assert await books.anew().latest() == runs[-1]


async def test_runs_of_the_future_do_not_push_out_those_of_now(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "NUM_KEPT", 4)
    now = clock.now()
    first = now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=3)
    async with database.write() as session:
        for minutes in range(10):
            for at in (now - timedelta(minutes=minutes), first + timedelta(minutes=minutes)):
                add_run(session, make_run(at, at, [SUBJECT.compared(0, 0)], {}))
        await session.flush()
        await prune(session, now)
        kept = (await session.scalars(select(ReconciliationRun.started_at))).all()
    assert sum(at <= now for at in kept) in (5, 6)  # and one more for each older day
    assert sum(at > now for at in kept) == 1


async def test_hours_that_a_clock_took_for_over_are_read_again(books: Books) -> None:
    hour = int(clock.now().timestamp()) // 3600
    sums = HourSums()
    with snapshot(books.reconciler._engine) as connection:
        before = sums.read(connection, hour + 1000)
    await books.spoil("UPDATE usage_hour SET amount_nano = amount_nano + 1 WHERE amount_nano > 0")
    with snapshot(books.reconciler._engine) as connection:
        assert sums.read(connection, hour) == HourSums().read(connection, hour) != before


def test_differences_have_names_and_a_bound() -> None:
    left = {f"n{i:03}": 1 for i in range(60)}
    check = SUBJECT.compared(60, 0, differing(left, {}))
    assert (check.num_differences, len(check.differences)) == (60, MAX_NAMED)
    assert SUBJECT.compared(3, 3).is_clean
    assert [d.name for d in SUBJECT.compared(3, 4).differences] == ["total"]
    assert SUBJECT.not_compared("why").is_clean
    assert not SUBJECT.failed("why").is_clean
