"""Budgets hold whatever runs at once, in every window that a request counts in."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from app.billing import budget_holds, budgets
from app.billing.accounts import AccountWriter
from app.billing.budget_holds import Budgets, Wanted, Window
from app.billing.rating import Settlement
from app.core import clock
from app.core.database import Database
from app.core.errors import InvalidRequest, NotFound, PaymentRequired
from app.settings import Settings
from tests.app.billing.books import Books
from tests.app.plans import sqlite_plans

from .conftest import ORGANIZATION

MakeSettlement = Callable[..., Settlement]


async def put(database: Database, scope: str, subject: str, period: str, limit_nano: int) -> str:
    async with database.write() as session:
        return await budgets.set_budget(
            session,
            ORGANIZATION,
            scope=scope,
            subject=subject,
            subject_name=f"name of {subject}" if subject else "",
            period=period,
            limit_nano=limit_nano,
        )


async def views(database: Database) -> list[budgets.BudgetView]:
    async with database.read() as session:
        return await budgets.list_budgets(session, ORGANIZATION)


async def test_a_budget_of_a_key_stops_that_key_only(
    accounts: AccountWriter, database: Database
) -> None:
    await put(database, "key", "key_1", "day", 1_000)
    await accounts.hold("req_1", ORGANIZATION, 700, api_key_id="key_1", endpoint_name="tiny")
    with pytest.raises(PaymentRequired) as caught:
        await accounts.hold("req_2", ORGANIZATION, 301, api_key_id="key_1", endpoint_name="tiny")
    assert caught.value.code == "budget_reached"
    for part in (
        "daily",
        "'name of key_1'",
        "$0.000001000",
        "$0.000000300 is left",
        "$0.000000001 is missing",
    ):
        assert part in caught.value.message
    await accounts.hold("req_3", ORGANIZATION, 301, api_key_id="key_2", endpoint_name="tiny")
    await accounts.hold("req_4", ORGANIZATION, 300, api_key_id="key_1", endpoint_name="other")
    [view] = await views(database)
    assert (view.spent_nano, view.held_nano, view.left_nano) == (0, 1_000, 0)


async def test_what_is_spent_stays_and_what_was_held_too_much_is_freed(
    accounts: AccountWriter, database: Database, settlement: MakeSettlement
) -> None:
    await put(database, "organization", "", "month", 10**9)
    await put(database, "model", "tiny", "day", 10**9)
    await accounts.hold("req_1", ORGANIZATION, 10**8, api_key_id="key_1", endpoint_name="tiny")
    await accounts.hold("req_2", ORGANIZATION, 10**8, api_key_id="key_1", endpoint_name="tiny")
    settled = settlement("req_1")
    accounts.settle(settled)
    accounts.void("req_2")
    await accounts.flush()
    for view in await views(database):
        assert (view.spent_nano, view.held_nano) == (settled.amount_nano, 0)


async def test_the_tightest_of_several_decides_and_others_are_not_taken(
    accounts: AccountWriter, database: Database
) -> None:
    await put(database, "organization", "", "month", 10_000)
    await put(database, "key", "key_1", "day", 500)
    with pytest.raises(PaymentRequired, match="daily budget of the key"):
        await accounts.hold("req_1", ORGANIZATION, 501, api_key_id="key_1")
    assert [view.held_nano for view in await views(database)] == [0, 0]


async def test_a_refusal_by_the_account_takes_nothing_from_budgets(
    accounts: AccountWriter, database: Database
) -> None:
    from app.billing.service import set_spending_limit

    await put(database, "organization", "", "day", 10_000)
    async with database.write() as session:
        await set_spending_limit(session, ORGANIZATION, 100, "usd")
    with pytest.raises(PaymentRequired) as caught:
        await accounts.hold("req_1", ORGANIZATION, 101)
    assert caught.value.code == "spending_limit_reached"
    assert (await views(database))[0].held_nano == 0


async def test_a_new_budget_counts_what_the_day_has_spent(
    accounts: AccountWriter, database: Database, settlement: MakeSettlement
) -> None:
    await accounts.hold("req_1", ORGANIZATION, 10**8)
    settled = settlement("req_1")
    accounts.settle(settled)
    await accounts.flush()
    await put(database, "key", "key_1", "month", 10**9)
    await put(database, "key", "key_2", "month", 10**9)
    assert [view.spent_nano for view in await views(database)] == [settled.amount_nano, 0]


@pytest.mark.parametrize(
    ("scope", "subject"), [("organization", ""), ("key", "key_1"), ("model", "tiny")]
)
async def test_a_new_budget_finds_what_was_posted_by_its_posting(
    database: Database, scope: str, subject: str
) -> None:
    with sqlite_plans(database) as plans:
        await put(database, scope, subject, "month", 10**9)
    (plan,) = [plan for plan in await plans("usage_event") if "ledger_entry" in plan]
    assert "usage_event USING INDEX ix_usage_event_ledger_transaction_id" in plan


async def test_lowering_keeps_what_was_promised_and_stops_the_next(
    accounts: AccountWriter, database: Database
) -> None:
    budget_id = await put(database, "organization", "", "day", 1_000)
    await accounts.hold("req_1", ORGANIZATION, 800)
    assert await put(database, "organization", "", "day", 100) == budget_id
    [view] = await views(database)
    assert (view.limit_nano, view.held_nano, view.left_nano) == (100, 800, 0)
    with pytest.raises(PaymentRequired):
        await accounts.hold("req_2", ORGANIZATION, 1)
    accounts.void("req_1")
    await accounts.hold("req_3", ORGANIZATION, 100)


async def test_a_new_day_is_a_new_window(
    accounts: AccountWriter, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(database, "organization", "", "day", 100)
    await accounts.hold("req_1", ORGANIZATION, 100)
    later = datetime(2100, 1, 31, 12, tzinfo=UTC)
    monkeypatch.setattr(clock, "now", lambda: later)
    await accounts.hold("req_2", ORGANIZATION, 100)
    accounts.void("req_1")
    await accounts.flush()
    [view] = await views(database)
    assert (view.starts_on, view.held_nano) == ("2100-01-31", 100)
    assert view.ends_at == datetime(2100, 2, 1, tzinfo=UTC)


async def test_a_deleted_budget_no_longer_counts(
    accounts: AccountWriter, database: Database
) -> None:
    budget_id = await put(database, "organization", "", "day", 100)
    await accounts.hold("req_1", ORGANIZATION, 100)
    async with database.write() as session:
        with pytest.raises(NotFound):
            await budgets.delete_budget(session, "org_2", budget_id)
        await budgets.delete_budget(session, ORGANIZATION, budget_id)
    await accounts.hold("req_2", ORGANIZATION, 100)
    accounts.void("req_1")
    await accounts.flush()


@pytest.mark.parametrize(
    ("scope", "subject", "period", "limit_nano", "param"),
    [
        ("team", "", "day", 1, "scope"),
        ("key", "key_1", "week", 1, "period"),
        ("key", "", "day", 1, "subject"),
        ("organization", "key_1", "day", 1, "subject"),
        ("key", "key_1", "day", -1, "limit_nano"),
        ("key", "key_1", "day", 10**18 + 1, "limit_nano"),
    ],
)
async def test_what_is_no_budget_is_refused(
    database: Database, scope: str, subject: str, period: str, limit_nano: int, param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await put(database, scope, subject, period, limit_nano)
    assert caught.value.param == param


def test_windows_begin_at_midnight_utc_and_on_the_first() -> None:
    at = datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert budget_holds.window_starts("day", at) == "2026-12-31"
    assert budget_holds.window_starts("month", at) == "2026-12-01"
    assert budgets.period_bounds("month", at)[1] == datetime(2027, 1, 1, tzinfo=UTC)


async def test_a_new_budget_counts_what_is_archived(
    settings: Settings, accounts: AccountWriter, database: Database, settlement: MakeSettlement
) -> None:
    books = Books(settings, accounts, settlement)
    names = [books.new_request(clock.now()) for _ in range(4)]
    await books.settle(
        settlement(names[0], 100),
        settlement(names[1], 200, api_key_id="key_2"),
        settlement(names[2], 300, endpoint_name="other", outcome="failed"),
    )
    books.seal()
    assert books.archive_before(clock.now() + timedelta(days=2)) == 3
    kept = settlement(names[3], 400)
    await books.settle(kept)
    await books.close()
    archived = [settlement("x", num).amount_nano for num in (100, 200)]
    subjects = {("organization", ""): sum(archived), ("key", "key_1"): archived[0]}
    subjects |= {("model", "tiny"): sum(archived), ("key", "key_2"): archived[1]}
    for scope, subject in subjects:
        await put(database, scope, subject, "month", 10**9)
    for view in await views(database):
        in_database = 0 if view.subject == "key_2" else kept.amount_nano
        expected = subjects[view.scope, view.subject] + in_database
        assert view.spent_nano == expected, view


def test_requests_of_one_turn_see_what_those_before_took() -> None:
    row = (ORGANIZATION, "budget_1", "model", "tiny", "", "day", 1_000, 100, 200)
    window = Window(row, "2026-11-23")
    turn = Budgets([window])
    assert window.left_nano == 700
    turn.take(Wanted("req_1", 600, "key_1", "tiny"))
    turn.take(Wanted("req_2", 600, "key_1", "other"))
    assert (window.left_nano, window.taken_nano) == (100, 600)
    assert turn.refusing(Wanted("req_3", 101, "key_1", "tiny")) is window
    assert turn.refusing(Wanted("req_4", 100, "key_1", "tiny")) is None
    assert turn.refusing(Wanted("req_5", 101, "key_1", "other")) is None
