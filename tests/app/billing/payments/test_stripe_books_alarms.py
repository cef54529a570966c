"""When what differs from Stripe is an alarm: what is found stays found, and what is only under way
is none."""

import pytest
from sqlalchemy import text

from app.billing.payments.tables import Invoice
from app.billing.reconciliation import stripe_walk
from app.billing.stripe_objects import LineParams
from app.core import clock
from tests.app.billing.payments.cashier import Cashier
from tests.app.billing.payments.test_stripe_books import Compare, compare

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
