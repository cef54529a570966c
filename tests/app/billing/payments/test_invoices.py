"""Months are closed once, and what they are invoiced for is what the ledger took, to the nano."""

import asyncio
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import delete, func, select, update

from app.billing.credits import take_back
from app.billing.ledger import OTHER_CLEARING, REVENUE, lock_account, on_account
from app.billing.payments import invoice_ending, invoice_payments, steady_clock
from app.billing.payments.invoices import MonthCloser
from app.billing.payments.periods import Period, period_named, period_of
from app.billing.payments.tables import Invoice, Notice
from app.core.database import Database
from app.core.errors import Conflict, InvalidRequest
from app.core.failpoints import Countdown, Reached, observed
from app.metering.tables import UsageHour
from app.settings import Settings
from tests.app.billing.payments.months import (
    CENT,
    OPERATOR,
    ORGANIZATION,
    Clock,
    Months,
    settlement,
)


@pytest.fixture
async def months(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Months]:
    months = Months(database, settings.sync_database_url, Clock(monkeypatch, "2026-01-10"))
    await months.add_organizations(ORGANIZATION)
    yield months
    months.close()


def test_months_know_their_ends_and_neighbours() -> None:
    december = Period(2026, 12)
    assert str(december) == "2026-12"
    assert december.next == Period(2027, 1)
    assert december.next.previous == december
    assert period_named("2026-12") == december == period_of(december.start)
    first, end = december.hours
    assert end - first == 31 * 24
    assert end == december.next.hours[0]


async def test_a_month_becomes_an_invoice_of_what_it_used(months: Months) -> None:
    months.use(80 * CENT + 3, 20 * CENT, 7)
    months.settle([settlement(5 * CENT, endpoint_name="big", waived_nano=99)])
    months.clock.set("2026-02-01T00:11:00")
    assert await months.close_months() == 1
    invoice = await months.invoice()
    assert (invoice.period, invoice.number, invoice.state) == ("2026-01", 1, "finalised")
    assert invoice.usage_nano == 105 * CENT + 10
    assert (invoice.due_cents, invoice.carry_out_nano) == (105, 10)
    lines = [
        (line.endpoint_name, line.quantity, line.amount_nano)
        for line in await months.lines(invoice)
    ]
    assert lines == [("big", 5 * CENT, 5 * CENT), ("tiny", 100 * CENT + 10, 100 * CENT + 10)]
    assert await months.close_months() == 0
    await months.check_books()
    async with months.database.read() as session:
        notice = (await session.scalars(select(Notice))).one()
    assert (notice.kind, notice.organization_id) == ("invoice", ORGANIZATION)


async def test_a_month_is_closed_ten_minutes_after_its_end(months: Months) -> None:
    months.use(CENT * 100)
    months.clock.set("2026-02-01T00:09:59")
    assert await months.close_months() == 0
    assert (await months.account()).closed_until is None
    months.clock.set("2026-02-01T00:10:00")
    assert await months.close_months() == 1


async def test_what_is_posted_after_the_closing_belongs_to_the_next_month(months: Months) -> None:
    months.use(100 * CENT)
    months.clock.set("2026-01-31T23:59:59.999999")
    months.use(1 * CENT)
    months.clock.set("2026-02-01T00:00:00")
    months.use(10 * CENT)  # the next month's, though January is open still
    months.clock.set("2026-02-01T00:11:00")
    await months.close_months()
    months.clock.set("2026-01-31T23:00:00")  # a clock that was set back
    months.use(1000 * CENT)
    months.clock.set("2026-03-01T00:11:00")
    await months.close_months()
    january, february = await months.invoices()
    assert (january.due_cents, february.due_cents) == (101, 1010)
    await months.check_books()


async def test_three_months_off_make_three_invoices(months: Months) -> None:
    months.use(100 * CENT + 5)
    await months.close_months()
    for month in (2, 4):
        months.clock.set(f"2026-0{month}-15")
        months.use(month * 100 * CENT + 5)
    months.clock.set("2026-05-20")
    months.use(7 * CENT)
    assert await months.close_months() == 0
    assert (await months.account()).closed_until is None
    await confirm_clock(months)
    assert await months.close_months() == 3
    invoices = await months.invoices()
    assert [(each.number, each.period, each.due_cents) for each in invoices] == [
        (1, "2026-01", 100),
        (2, "2026-02", 200),
        (3, "2026-04", 400),
    ]
    assert [each.carry_out_nano for each in invoices] == [5, 10, 15]
    await months.check_books()


async def confirm_clock(months: Months) -> None:
    async with months.database.write() as session:
        await steady_clock.confirm(session, months.clock.at)


async def clock_alarms(months: Months) -> list[Notice]:
    async with months.database.read() as session:
        rows = await session.scalars(select(Notice).where(Notice.kind == "clock_leapt"))
        return list(rows)


@pytest.mark.parametrize("has_turned_before", [True, False])
async def test_a_clock_that_leaps_closes_nothing(months: Months, has_turned_before: bool) -> None:
    """Ahead for a while, and right again: months go on as if nothing had been."""
    months.use(100 * CENT)
    if has_turned_before:
        await months.close_months()
    months.clock.set("2029-01-10")
    for _ in range(3):
        assert await months.close_months() == 0
    assert (await months.account()).closed_until is None
    (alarm,) = await clock_alarms(months)
    assert alarm.organization_id == OPERATOR
    assert alarm.ended_at is None
    months.clock.set("2026-02-01T00:11:00")
    assert await months.close_months() == 1
    (alarm,) = await clock_alarms(months)
    assert alarm.ended_at is not None
    months.use(200 * CENT)
    months.clock.set("2026-03-01T00:11:00")
    assert await months.close_months() == 1
    assert [each.due_cents for each in await months.invoices()] == [100, 200]


async def test_only_the_right_time_confirms_a_clock(months: Months) -> None:
    months.use(100 * CENT)
    await months.close_months()
    months.clock.set("2029-01-10")
    await months.close_months()
    async with months.database.write() as session:
        with pytest.raises(Conflict, match="2029-01-10 00:00 UTC, not 2026-01-10"):
            await steady_clock.confirm(session, datetime(2026, 1, 10, tzinfo=UTC))
        with pytest.raises(InvalidRequest, match="time zone"):
            await steady_clock.confirm(session, datetime(2029, 1, 10))  # noqa: DTZ001
    assert await months.close_months() == 0
    await confirm_clock(months)
    (alarm,) = await clock_alarms(months)
    assert alarm.ended_at is not None
    assert await months.close_months() == 1


async def test_cents_are_cut_and_the_rest_is_carried_on(months: Months) -> None:
    """Six months of amounts with fractions: what was due and what is carried is what was used."""
    used = 0
    for month in range(1, 7):
        months.clock.set(f"2026-0{month}-03")
        months.use(60 * CENT + 9_876_543, 3_333_333)
        used += 60 * CENT + 9_876_543 + 3_333_333
        months.clock.set(f"2026-0{month + 1}-01T01:00:00")
        await months.close_months()
    invoices = await months.invoices()
    assert len(invoices) == 6
    for before, after in pairwise(invoices):
        assert after.carry_in_nano == before.carry_out_nano
    assert all(0 <= each.carry_out_nano < CENT for each in invoices)
    assert sum(each.due_cents for each in invoices) * CENT + invoices[-1].carry_out_nano == used
    await months.check_books()


async def test_less_than_stripe_takes_waits_for_the_next_invoice(months: Months) -> None:
    months.use(49 * CENT)
    months.clock.set("2026-02-01T01:00:00")
    await months.close_months()
    first = await months.invoice()
    assert (first.state, first.due_cents, first.carry_out_nano) == ("settled", 0, 49 * CENT)
    months.use(1 * CENT)
    months.clock.set("2026-03-01T01:00:00")
    await months.close_months()
    _, second = await months.invoices()
    assert (second.state, second.carry_in_nano, second.due_cents) == ("finalised", 49 * CENT, 50)


async def test_credit_pays_first_and_the_rest_is_due(months: Months) -> None:
    await months.credit(30 * CENT)
    await months.credit(20 * CENT + 1, "paid")
    months.use(200 * CENT)
    months.clock.set("2026-02-01T01:00:00")
    await months.close_months()
    invoice = await months.invoice()
    assert invoice.credit_nano == 50 * CENT + 1
    assert (invoice.due_cents, invoice.carry_out_nano) == (149, CENT - 1)
    await months.check_books()


async def test_a_prepaid_month_is_settled(months: Months) -> None:
    await months.credit(300 * CENT, "paid")
    await months.limit(0)
    months.use(200 * CENT)
    months.clock.set("2026-02-01T01:00:00")
    await months.close_months()
    invoice = await months.invoice()
    assert (invoice.state, invoice.due_cents, invoice.usage_nano) == ("settled", 0, 200 * CENT)
    async with months.database.read() as session:
        assert await session.scalar(select(func.count()).select_from(Notice)) == 0


async def test_waived_usage_alone_makes_no_invoice(months: Months) -> None:
    months.settle([settlement(0, waived_nano=500)])
    months.clock.set("2026-02-01T01:00:00")
    assert await months.close_months() == 0


async def test_a_refund_of_spent_credit_comes_with_the_next_invoice(months: Months) -> None:
    """Even if nothing is used any more: no one else would ask for it."""
    source = await months.credit(100 * CENT, "paid")
    months.use(100 * CENT)
    months.clock.set("2026-02-01T01:00:00")
    await months.close_months()
    async with months.database.write() as session:
        await take_back(
            session,
            source=source,
            amount_nano=80 * CENT,
            key="refund:1",
            kind="refund",
            to_account=OTHER_CLEARING,
        )
    months.clock.set("2026-03-01T01:00:00")
    await months.close_months()
    january, february = await months.invoices()
    assert (january.state, february.state) == ("settled", "finalised")
    assert (february.usage_nano, february.carry_in_nano, february.due_cents) == (0, 80 * CENT, 80)
    assert february.period == "2026-02"
    await months.check_books()


async def test_a_crash_after_the_freeze_delays_no_debt(months: Months) -> None:
    """Nothing was used, and only what a refund left owing is to be asked for: in its own month."""
    source = await months.credit(80 * CENT, "paid")
    months.use(80 * CENT)
    months.clock.set("2026-02-01T01:00:00")
    await months.close_months()
    months.clock.set("2026-02-10")
    refund = {"kind": "refund", "to_account": OTHER_CLEARING}
    async with months.database.write() as session:
        await take_back(session, source=source, amount_nano=60 * CENT, key="refund:1", **refund)
    assert await months.close_months() == 0  # January is over, and its invoice was made

    months.clock.set("2026-03-01T01:00:00")
    closer = MonthCloser(months.database, "usd", has_stripe=False)
    await closer._freeze(ORGANIZATION, Period(2026, 2))  # and then it dies
    async with months.database.write() as session:  # after the month's end: the next one's
        await take_back(session, source=source, amount_nano=20 * CENT, key="refund:2", **refund)
    assert await months.close_months() == 1
    assert [each.period for each in await months.invoices()] == ["2026-01", "2026-02"]
    await months.check_books()


@pytest.mark.parametrize(
    "place",
    [
        "invoices.before_freeze_commit",
        "invoices.after_freeze",
        "invoices.before_invoice_commit",
        "invoices.after_invoice_commit",
    ],
)
async def test_a_crash_while_closing_loses_and_doubles_nothing(months: Months, place: str) -> None:
    months.use(100 * CENT)

    def crash(name: str) -> None:
        raise Reached(name)

    months.clock.set("2026-02-01T00:30:00")
    with pytest.raises(Reached), observed(Countdown(place, crash)):
        await months.close_months()
    months.use(3 * CENT)
    await months.close_months()
    months.clock.set("2026-03-01T00:30:00")
    months.use(1000 * CENT)
    await months.close_months()
    january, february = await months.invoices()
    assert (january.number, january.due_cents) == (1, 100)
    assert (february.number, february.due_cents, february.carry_out_nano) == (2, 0, 3 * CENT)
    await months.check_books()


async def test_usage_that_is_not_what_the_ledger_took_is_never_invoiced(months: Months) -> None:
    months.use(100 * CENT)
    async with months.database.write() as session:
        await session.execute(update(UsageHour).values(amount_nano=UsageHour.amount_nano + 1))
    months.clock.set("2026-02-10")
    months.use(70 * CENT)
    months.clock.set("2026-03-10")
    await months.close_months()
    invoice = await months.invoice()  # February waits for January
    assert (invoice.state, invoice.due_cents) == ("differs", 0)
    assert str(100 * CENT + 1) in invoice.error
    async with months.database.read() as session:
        alarm = (await session.scalars(select(Notice))).one()
    assert (alarm.organization_id, alarm.kind) == (OPERATOR, "invoice_differs")

    async with months.database.write() as session:
        await session.execute(
            update(UsageHour)
            .where(UsageHour.hour < Period(2026, 2).hours[0])
            .values(amount_nano=UsageHour.amount_nano - 1)
        )
        await session.execute(
            update(UsageHour)
            .where(UsageHour.hour >= Period(2026, 2).hours[0])
            .values(amount_nano=70 * CENT)
        )
    await months.close_months()
    january, february = await months.invoices()
    assert (january.state, january.due_cents, january.error) == ("finalised", 100, "")
    assert (february.state, february.due_cents) == ("finalised", 70)
    async with months.database.read() as session:
        kept = await session.get_one(Notice, alarm.id)
    assert kept.ended_at is not None
    await months.check_books()


async def test_an_invoice_that_differs_can_only_be_voided(months: Months) -> None:
    """What the ledger took is then carried into the next."""
    months.use(100 * CENT)
    async with months.database.write() as session:
        await session.execute(delete(UsageHour))
    months.clock.set("2026-02-10")
    months.use(70 * CENT)
    await months.close_months()
    invoice = await months.invoice()
    assert (invoice.state, invoice.usage_nano, invoice.due_cents) == ("differs", 0, 0)
    for act in (invoice_ending.mark_paid, invoice_ending.try_again):
        async with months.database.write() as session:
            with pytest.raises(Conflict, match="not what the ledger took"):
                await act(session, invoice.id)
    async with months.database.write() as session:
        await invoice_ending.give_up(session, invoice.id, "void")
    months.clock.set("2026-03-10")
    await months.close_months()
    void, march = await months.invoices()
    assert void.state == "void"
    assert (march.usage_nano, march.carry_in_nano, march.due_cents) == (70 * CENT, 100 * CENT, 170)


async def test_closing_beside_settlements_loses_and_doubles_nothing(months: Months) -> None:
    """Three threads settle while the month is closed; the clock passes the month's end."""
    months.clock.set("2026-01-31T23:59:00")
    months.use(CENT)
    stop = threading.Event()
    posted = [0, 0, 0]

    def settle(index: int) -> None:
        while not stop.is_set():
            months.use(7 * CENT + index)
            stop.wait(0.002)
            posted[index] += 7 * CENT + index

    threads = [threading.Thread(target=settle, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    try:
        for at in ("2026-01-31T23:59:59", "2026-02-01T00:00:01", "2026-02-01T00:10:01"):
            await asyncio.sleep(0.1)
            months.clock.set(at)
        await asyncio.gather(months.close_months(), months.close_months())
        months.clock.set("2026-01-31T23:59:59")  # of the worst kind
        await asyncio.sleep(0.1)
    finally:
        stop.set()
        for thread in threads:
            await asyncio.to_thread(thread.join)
    months.clock.set("2026-03-01T00:11:00")
    await months.close_months()
    january, february = await months.invoices()
    assert january.usage_nano > CENT
    assert january.usage_nano + february.usage_nano == CENT + sum(posted)
    assert {january.state, february.state} <= {"finalised", "settled"}
    assert await months.entries(REVENUE) == CENT + sum(posted)
    await months.check_books()


async def test_numbers_of_invoices_have_no_gaps(months: Months) -> None:
    """Also where two processes close at once, and one of them has to try again."""
    names = [f"org_{i}" for i in range(2, 8)]
    async with months.database.write() as session:
        for name in names:
            await lock_account(session, name, "usd")
    for name in names:
        months.use(100 * CENT, organization_id=name)
    months.clock.set("2026-02-02")
    await asyncio.gather(*(months.close_months() for _ in range(3)))
    await months.close_months()
    async with months.database.read() as session:
        numbers = (await session.scalars(select(Invoice.number).order_by(Invoice.number))).all()
    assert list(numbers) == list(range(1, len(names) + 1))


steps = st.lists(
    st.one_of(
        st.tuples(st.just("use"), st.integers(0, 300 * CENT)),
        st.tuples(st.just("credit"), st.integers(1, 200 * CENT)),
        st.tuples(st.just("paid credit"), st.integers(1, 200 * CENT)),
        st.tuples(st.just("pay"), st.integers(1, 400 * CENT)),
        st.tuples(st.just("give up"), st.integers(0, 5)),
        st.tuples(st.just("next month"), st.integers(1, 2)),
    ),
    max_size=25,
)


@hypothesis_settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=steps)
async def test_whatever_happens_invoices_ask_for_what_was_used(
    months: Months, steps: list[tuple[str, int]]
) -> None:
    """A new organization for each example. In the end all that was used is paid for by credit,
    is on an invoice, or is carried on."""
    organization_id = f"org_h{next(_examples)}"
    months.clock.set("2026-01-10")
    month, used_nano = Period(2026, 1), 0
    for step, number in [*steps, ("use", 1), ("next month", 1)]:
        if step == "use":
            months.use(number, organization_id=organization_id)
            used_nano += number
        elif step == "next month":
            for _ in range(number):
                month = month.next
            months.clock.set(f"{month}-10")
            await confirm_clock(months)
            await months.close_months()
        elif step.endswith("credit"):
            kind = "paid" if step == "paid credit" else "promotional"
            await months.credit(number, kind, organization_id)
        else:
            await _end(months, organization_id, step, number)
    invoices = await months.invoices(organization_id)
    assert all(each.state != "differs" for each in invoices)
    assert sum(each.usage_nano for each in invoices) == used_nano
    standings = await _standings(months, invoices)
    asked = sum(each.due_nano for each in standings)
    credited = sum(each.credit_nano for each in invoices)
    overpaid = sum(
        max(0, each.paid_nano - each.recovered_nano - (each.due_nano - each.written_off_nano))
        for each in standings
    )
    carried = invoices[-1].carry_out_nano
    assert asked + credited + carried == used_nano - overpaid
    owed = -await months.entries(on_account(organization_id))
    assert owed == sum(each.open_nano for each in standings) + carried
    await months.check_books(organization_id)


async def _end(months: Months, organization_id: str, step: str, number: int) -> None:
    """Pays one of the invoices some more, or gives it up."""
    async with months.database.write() as session:
        await lock_account(session, organization_id, "usd")
        invoices = await session.scalars(
            select(Invoice)
            .where(Invoice.organization_id == organization_id, Invoice.due_cents > 0)
            .order_by(Invoice.number)
        )
        found = invoices.all()
        if not found:
            return
        invoice = found[number % len(found)]
        if step == "give up":
            await invoice_payments.write_off(session, invoice)
            invoice_payments.advance(invoice, "uncollectible")
            return
        before = await invoice_payments.standing(session, invoice)
        total_nano = before.paid_nano + number
        for _ in range(2):  # told twice
            await invoice_payments.post_payments(session, invoice, total_nano, OTHER_CLEARING)
        after = await invoice_payments.standing(session, invoice)
        assert after.paid_nano == total_nano
        if after.open_nano == 0:
            invoice_payments.advance(invoice, "paid")


async def _standings(months: Months, invoices: list[Invoice]) -> list[invoice_payments.Standing]:
    async with months.database.read() as session:
        return [await invoice_payments.standing(session, each) for each in invoices]


_examples = iter(range(10**6))
