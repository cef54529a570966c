"""Our books of payments held against Stripe's: equal when all was heard of, and what is missing
is named."""

from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import text

from app.billing.ledger import STRIPE_CLEARING
from app.billing.reconciliation import stripe_walk
from app.billing.reconciliation.check import Check
from app.billing.reconciliation.journal import JournalState
from app.billing.reconciliation.reconciler import Reconciler, Sources
from app.billing.reconciliation.stripe_checks import GRACE
from app.billing.signing import SigningKey
from app.billing.usage_archive import UsageArchive
from app.core import clock
from tests.app.billing.payments.cashier import CENTS, Cashier

AFTER_GRACE = GRACE // timedelta(minutes=1) + 1
Compare = Callable[[], Any]


@pytest.fixture
async def compare(cashier: Cashier, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Compare]:
    """The checks about Stripe, always asked for anew."""
    monkeypatch.setattr(stripe_walk, "SECONDS", 0.0)
    reconciler = Reconciler(
        cashier.database,
        cashier.settings.sync_database_url,
        Sources(lambda: JournalState(num_admitted=0, num_settled=0, num_open=0), lambda: ()),
        organization_id="org_operator",
        longest_request_ms=1,
        detail_days=62,
        archive=UsageArchive(cashier.settings.data_dir / "archive"),
        public_key=SigningKey(Ed25519PrivateKey.generate()).public_hex,
        stripe=cashier.payments.link.stripe,
        stripe_since=clock.now() - timedelta(hours=1),
    )

    async def compare() -> dict[str, Check]:
        run = await reconciler.run()
        return {check.name: check for check in run.checks if check.name.startswith("stripe")}

    yield compare
    await reconciler.close()


def named(checks: dict[str, Check]) -> dict[str, list[str]]:
    return {
        name: [difference.name for difference in check.differences]
        for name, check in checks.items()
        if not check.is_clean
    }


async def test_payments_refunds_and_fees_agree(cashier: Cashier, compare: Compare) -> None:
    top_up = await cashier.pay()
    await cashier.pay(4000)
    await cashier.refund(top_up.id, 1000)
    await cashier.hear()
    for _ in range(2):
        checks = await compare()
        assert named(checks) == {}
        held = checks["stripe"]
        assert held.left == held.right > 0
        assert held.right == -(await cashier.accounts())[STRIPE_CLEARING] // 10**7
        assert (checks["stripe_top_ups"].left, checks["stripe_top_ups"].right) == (6500, 6500)
        cashier.time.passes(minutes=AFTER_GRACE)
    assert checks["stripe_events"].left == checks["stripe_events"].right > 0
    await cashier.check()


async def test_a_payment_that_nobody_told_us_of_is_found(
    cashier: Cashier, compare: Compare
) -> None:
    """Its webhooks are lost: at first it is under way, then missing, and asked for it is there."""
    top_up = await cashier.begin()
    cashier.stripe.pay_checkout(top_up.checkout_session_id or "")
    cashier.stripe.webhooks.take()
    checks = await compare()
    assert named(checks) == {}
    assert "none of this box" not in checks["stripe"].note
    assert "cents are under way" in checks["stripe"].note
    cashier.time.passes(minutes=AFTER_GRACE)
    found = named(await compare())
    assert set(found) == {"stripe", "stripe_top_ups", "stripe_events"}
    assert any("credit:stripe:pi_" in name for name in found["stripe"])
    assert any("fee:" in name for name in found["stripe"])
    await cashier.payments.link.inbox.backfill()
    await cashier.payments.link.inbox.turn()
    assert named(await compare()) == {}
    await cashier.check()


async def test_what_else_a_customer_paid_is_none_of_ours(
    cashier: Cashier, compare: Compare
) -> None:
    await cashier.pay()
    profile = await cashier.profile()
    payment = cashier.stripe.charge_by_hand(profile.stripe_customer_id or "", 50_000)
    cashier.stripe.refund_by_hand(payment["id"], 20_000)
    for _ in range(2):
        await cashier.hear()
        checks = await compare()
        assert named(checks) == {}
        assert "2 movements are none of this box's payments" in checks["stripe"].note
        cashier.time.passes(minutes=AFTER_GRACE)


async def test_a_posting_that_stripe_knows_nothing_of_is_found(
    cashier: Cashier, compare: Compare
) -> None:
    await cashier.pay()
    async with cashier.database.write() as session:
        if session.get_bind().dialect.name == "sqlite":
            await session.execute(text("DROP TRIGGER ledger_entry_no_update"))
        else:
            await session.execute(text("ALTER TABLE ledger_entry DISABLE TRIGGER USER"))
        await session.execute(
            text(
                "UPDATE ledger_entry SET amount_nano = amount_nano - 10000000"
                " WHERE account = 'stripe_clearing' AND amount_nano < 0"
            )
        )
    checks = await compare()
    assert named(checks) == {"stripe": ["total"]}
    assert checks["stripe"].difference == -1


async def test_old_movements_become_a_sum(cashier: Cashier, compare: Compare) -> None:
    await cashier.pay()
    cashier.time.passes(hours=24 * 5)
    await cashier.pay(3000)
    first = (await compare())["stripe"]
    again = (await compare())["stripe"]
    assert first.is_clean
    assert again.is_clean
    assert (first.left, first.right) == (again.left, again.right)
    assert first.note.startswith("2 movements")
    assert again.note.startswith("1 movements")


async def test_stripe_away_is_told_and_after_a_day_an_alarm(
    cashier: Cashier, compare: Compare
) -> None:
    await cashier.pay()
    assert named(await compare()) == {}
    cashier.stripe.go_away()
    checks = await compare()
    assert named(checks) == {}
    assert all("Not compared since" in check.skipped for check in checks.values())
    cashier.time.passed += timedelta(hours=25)
    assert set(named(await compare())) == set(checks)


async def test_a_top_up_of_another_amount_is_found(cashier: Cashier, compare: Compare) -> None:
    top_up = await cashier.pay()
    async with cashier.database.write() as session:
        await session.execute(text("UPDATE top_up SET amount_cents = amount_cents + 1"))
    cashier.time.passes(minutes=AFTER_GRACE)
    checks = await compare()
    assert named(checks) == {"stripe_top_ups": [top_up.payment_intent_id]}
    assert (checks["stripe_top_ups"].left, checks["stripe_top_ups"].right) == (CENTS, CENTS + 1)
