"""Credit ends when its time is over, but not under a request that runs on it."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from sqlalchemy import update

from app.billing.ledger import BREAKAGE, PROMOTIONAL_COST
from app.billing.payments.expiry import expire_credit
from app.billing.tables import AccountBalance, Hold
from app.core import clock
from app.core.database import Database
from app.core.failpoints import Countdown, Reached, observed
from app.settings import Settings
from tests.app.billing.payments.months import CENT, ORGANIZATION, Clock, Months, settlement

FEBRUARY = datetime(2026, 2, 1, tzinfo=UTC)
HELD = "req_held"


@pytest.fixture
async def months(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Months]:
    months = Months(database, settings.sync_database_url, Clock(monkeypatch, "2026-01-10"))
    await months.add_organizations(ORGANIZATION)
    yield months
    await months.check_books()
    months.close()


async def hold(months: Months, nano: int) -> None:
    """What a running request, `HELD`, was promised. The limit is kept, as by a real hold."""
    async with months.database.write() as session:
        session.add(
            Hold(
                request_id=HELD,
                organization_id=ORGANIZATION,
                journal_id="jnl_1",
                amount_nano=nano,
                created_at=clock.now(),
            )
        )
        await session.execute(
            update(AccountBalance)
            .where(AccountBalance.organization_id == ORGANIZATION)
            .values(held_nano=nano)
        )


async def test_what_is_left_goes_to_whom_it_falls(months: Months) -> None:
    await months.credit(100 * CENT, "promotional", expires_at=FEBRUARY)
    await months.credit(50 * CENT, "paid", expires_at=FEBRUARY)
    await months.credit(7 * CENT, "paid")
    months.use(30 * CENT)
    assert await expire_credit(months.database) == 0
    months.clock.set("2026-02-01")
    assert await expire_credit(months.database) == 2
    assert await expire_credit(months.database) == 0
    assert (await months.account()).posted_nano == 7 * CENT
    # 30 were used, of whichever lot was first: 120 of the 150 have ended.
    back = await months.entries(PROMOTIONAL_COST) + 100 * CENT
    assert back + await months.entries(BREAKAGE) == 120 * CENT


async def test_what_running_requests_hold_ends_after_them(months: Months) -> None:
    await months.credit(100 * CENT, expires_at=FEBRUARY)
    await months.limit(0)
    await hold(months, 40 * CENT)
    months.clock.set("2026-02-01")
    assert await expire_credit(months.database) == 1
    account = await months.account()
    assert (account.posted_nano, account.held_nano) == (40 * CENT, 40 * CENT)
    assert await expire_credit(months.database) == 0
    months.settle([settlement(25 * CENT, request_id=HELD)])  # less than it held
    assert (await months.account()).held_nano == 0
    assert await expire_credit(months.database) == 1
    assert (await months.account()).posted_nano == 0


async def test_credit_ends_whatever_else_is_owed(months: Months) -> None:
    months.use(500 * CENT)
    await months.credit(100 * CENT, expires_at=FEBRUARY)  # for what is used from here on
    months.clock.set("2026-02-01")
    assert await expire_credit(months.database) == 1
    months.use(10 * CENT)
    assert (await months.account()).posted_nano == -510 * CENT
    assert await months.entries(PROMOTIONAL_COST) == 0


@pytest.mark.parametrize("place", ["expiry.before_commit", "expiry.after_commit"])
async def test_a_crash_ends_no_credit_twice(months: Months, place: str) -> None:
    for _ in range(2):
        await months.credit(100 * CENT, expires_at=FEBRUARY)
    months.clock.set("2026-02-01")

    def crash(name: str) -> None:
        raise Reached(name)

    with pytest.raises(Reached), observed(Countdown(place, crash)):
        await expire_credit(months.database)
    await expire_credit(months.database)
    assert (await months.account()).posted_nano == 0
    assert await months.entries(PROMOTIONAL_COST) == 0
