"""When what differs from Stripe is an alarm: what is found stays found, and what is only under way
is none."""

import asyncio
from datetime import datetime

import pytest
from sqlalchemy import text

from app.billing.payments.calls import Calls
from app.billing.payments.invoice_books import refresh_invoice
from app.billing.payments.tables import Invoice
from app.billing.reconciliation import stripe_walk
from app.billing.stripe_objects import Event, LineParams
from app.core import clock
from tests.app.billing.payments.cashier import Cashier
from tests.app.billing.payments.test_stripe_books import Compare, compare, named

__all__ = ["compare"]


async def finalised_invoices(cashier: Cashier, dues_cents: list[int]) -> None:
    """Of 500 cents each at Stripe, and of these in our books."""
    stripe = cashier.payments.link.stripe
    customer_id = (await cashier.profile()).stripe_customer_id or ""
    for i, due_cents in enumerate(dues_cents):
        invoice_id = f"inv_{i}"
        draft = stripe.create_invoice(
            f"c{i}",
            customer_id=customer_id,
            currency="usd",
            invoice_id=invoice_id,
            description="x",
            is_automatic=True,
        )
        lines = [LineParams("x", 500, {"position": "1"})]
        stripe.add_invoice_lines(f"l{i}", stripe_invoice_id=draft.id, lines=lines)
        stripe.finalise_invoice(f"f{i}", draft.id)
        async with cashier.database.write() as session:
            session.add(
                Invoice(
                    id=invoice_id,
                    number=i + 1,
                    organization_id=cashier.organization_id,
                    organization_name="acme",
                    period=f"2026-0{i + 1}",
                    state="finalised",
                    currency="usd",
                    usage_nano=0,
                    credit_nano=0,
                    carry_in_nano=0,
                    due_cents=due_cents,
                    carry_out_nano=0,
                    stripe_invoice_id=draft.id,
                    error="",
                    created_at=clock.now(),
                )
            )


async def test_an_invoice_that_differs_is_asked_for_again_each_time(
    cashier: Cashier, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are more of them than are asked for in one comparison."""
    monkeypatch.setattr(stripe_walk, "NUM_INVOICES", 2)
    await cashier.pay()
    await finalised_invoices(cashier, [400, 500, 499])
    runs = [(await compare())["stripe_invoices"].confirmed for _ in range(4)]
    assert runs == [[], ["inv_0"], ["inv_0", "inv_2"], ["inv_0", "inv_2"]]
    async with cashier.database.write() as session:
        await session.execute(text("UPDATE invoice SET due_cents = 500"))
    assert (await compare())["stripe_invoices"].is_clean


async def test_a_payment_that_stripe_does_not_list_yet_is_under_way(
    cashier: Cashier, compare: Compare
) -> None:
    await cashier.pay()
    cashier.stripe.book_late()
    late = await cashier.pay(3000)
    for _ in range(2):
        checks = await compare()
        assert named(checks) == {}
        assert "3000 cents of ours are not listed by Stripe yet." in checks["stripe"].note
        cashier.time.passes(minutes=20)
    cashier.time.passes(minutes=30)
    assert named(await compare()) == {"stripe": [f"credit:stripe:{late.payment_intent_id}"]}
    cashier.stripe.book_charges()
    await cashier.hear()
    assert named(await compare()) == {}


async def test_a_payment_while_stripe_is_asked_is_no_difference(
    cashier: Cashier, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cashier.pay()
    ask, loop = stripe_walk.StripeWalk._ask_events, asyncio.get_running_loop()

    def pay_meanwhile(walk: stripe_walk.StripeWalk, at: datetime) -> list[Event]:
        events = ask(walk, at)
        asyncio.run_coroutine_threadsafe(cashier.pay(), loop).result(60)
        return events

    monkeypatch.setattr(stripe_walk.StripeWalk, "_ask_events", pay_meanwhile)
    for _ in range(3):
        checks = await compare()
        assert named(checks) == {}
        assert checks["stripe"].left == checks["stripe"].right
        cashier.time.passes(minutes=1)


async def test_a_paid_invoice_is_under_way_until_it_is_posted(
    cashier: Cashier, compare: Compare
) -> None:
    await cashier.pay()
    await finalised_invoices(cashier, [500])
    async with cashier.database.read() as session:
        stripe_id = (await session.get_one(Invoice, "inv_0")).stripe_invoice_id
    cashier.stripe.pay_invoice(stripe_id or "")
    checks = await compare()
    assert named(checks) == {}
    assert "cents are under way" in checks["stripe"].note
    await cashier.hear()
    calls = Calls()
    link = cashier.payments.link
    await refresh_invoice(cashier.database, link.stripe, calls, stripe_id or "")
    calls.close()
    for _ in range(3):
        checks = await compare()
        assert named(checks) == {}
        assert checks["stripe"].note.endswith("one by one.")
        cashier.time.passes(minutes=20)
