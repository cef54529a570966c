"""Refunds and disputes: what is taken back, what is given back, and what is owed then."""

import asyncio

import pytest

from app.billing.credits import open_lots
from app.billing.ledger import REVENUE, STRIPE_FEES, credit_account, on_account, post
from app.billing.payments import mirror
from app.billing.payments.cents import NANO_PER_CENT
from app.billing.payments.profile import is_card_disputed
from app.billing.payments.settling import look_up, settle
from app.billing.tables import CreditLot
from app.core.errors import Conflict, InvalidRequest, NotFound
from tests.app.billing.payments.cashier import CENTS, Cashier


async def spend(cashier: Cashier, cents: int) -> None:
    """Usage that draws from the one lot."""
    nano = cents * NANO_PER_CENT
    async with cashier.database.write() as session:
        (lot,) = await open_lots(session, cashier.organization_id)
        entries = {credit_account(cashier.organization_id, "paid"): -nano, REVENUE: nano}
        await post(
            session,
            key="usage:1",
            kind="usage",
            organization_id=cashier.organization_id,
            currency="usd",
            entries=entries,
        )
        lot = await session.get_one(CreditLot, lot.id)
        lot.remaining_nano -= nano


async def test_a_refund_takes_the_credit_once_stripe_made_it(cashier: Cashier) -> None:
    top_up = await cashier.pay()
    operation = await cashier.refund(top_up.id, 1000)
    assert operation.state == "confirmed"
    assert await cashier.balance_cents() == CENTS - 1000
    await cashier.hear()
    top_up = await cashier.top_up(top_up.id)
    assert (top_up.state, top_up.refunded_cents) == ("paid", 1000)
    await cashier.refund(top_up.id, CENTS - 1000)
    await cashier.hear()
    top_up = await cashier.top_up(top_up.id)
    assert (top_up.state, top_up.refunded_cents) == ("refunded", CENTS)
    assert await cashier.balance_cents() == 0
    await cashier.check()


async def test_what_was_used_up_already_is_owed(cashier: Cashier) -> None:
    top_up = await cashier.pay()
    await spend(cashier, 2000)
    await cashier.refund(top_up.id, CENTS)
    await cashier.hear()
    assert await cashier.balance_cents() == -2000
    accounts = await cashier.accounts()
    assert accounts[on_account(cashier.organization_id)] == -2000 * NANO_PER_CENT
    await cashier.check()


@pytest.mark.parametrize("cents", [CENTS + 1, 10**6])
async def test_no_more_than_was_paid_is_refunded(cashier: Cashier, cents: int) -> None:
    top_up = await cashier.pay()
    with pytest.raises(InvalidRequest, match=r"\$25.00 of this top-up can be refunded"):
        await cashier.refund(top_up.id, cents)


async def test_what_is_asked_for_counts_before_stripe_answers(cashier: Cashier) -> None:
    top_up = await cashier.pay()
    cashier.stripe.go_away()
    assert (await cashier.refund(top_up.id, 2000)).state == "planned"
    with pytest.raises(InvalidRequest, match=r"\$5.00 of this top-up can be refunded"):
        await cashier.refund(top_up.id, 2000)
    cashier.stripe.start()
    await cashier.work_until_idle()
    assert await cashier.balance_cents() == 500
    await cashier.check()


async def test_only_what_was_paid_is_refunded(cashier: Cashier) -> None:
    top_up = await cashier.begin()
    with pytest.raises(Conflict, match="only what was paid"):
        await cashier.refund(top_up.id, 100)
    with pytest.raises(NotFound):
        await cashier.refund("top_unknown", 100)


async def test_a_refund_that_stripe_refuses_is_told_to_the_operator(cashier: Cashier) -> None:
    top_up = await cashier.pay()
    cashier.stripe.faults.add("reject", "/v1/refunds$")
    operation = await cashier.refund(top_up.id, 1000)
    assert operation.state == "rejected"
    (notice,) = await cashier.notices("refund_refused")
    assert notice.organization_id != cashier.organization_id
    assert await cashier.balance_cents() == CENTS
    await cashier.check()


async def test_a_refund_made_at_stripe_is_followed(cashier: Cashier) -> None:
    top_up = await cashier.pay()
    cashier.stripe.refund_by_hand(top_up.payment_intent_id or "", 700)
    await cashier.hear()
    assert (await cashier.top_up(top_up.id)).refunded_cents == 700
    assert await cashier.balance_cents() == CENTS - 700
    await cashier.check()


@pytest.mark.parametrize("is_sent", [False, True])
async def test_a_pending_refund_takes_nothing_until_it_is_sent(
    cashier: Cashier, is_sent: bool
) -> None:
    top_up = await cashier.pay()
    cashier.stripe.refund_late()
    operation = await cashier.refund(top_up.id, 1000)
    await cashier.hear()
    assert operation.state == "confirmed"
    assert await cashier.balance_cents() == CENTS
    if is_sent:
        cashier.stripe.send_refunds()
    else:
        cashier.stripe.fail_refund(operation.stripe_id or "")
    await cashier.hear()
    assert (await cashier.top_up(top_up.id)).refunded_cents == (1000 if is_sent else 0)
    assert await cashier.balance_cents() == (CENTS - 1000 if is_sent else CENTS)
    await cashier.check()


@pytest.mark.parametrize("spent_cents", [0, 2000])
async def test_a_refund_that_fails_later_is_given_back(cashier: Cashier, spent_cents: int) -> None:
    top_up = await cashier.pay()
    if spent_cents:
        await spend(cashier, spent_cents)
    before = await cashier.accounts()
    operation = await cashier.refund(top_up.id, CENTS)
    await cashier.hear()
    cashier.stripe.fail_refund(operation.stripe_id or "")
    await cashier.hear()
    await cashier.hear()
    top_up = await cashier.top_up(top_up.id)
    assert (top_up.state, top_up.refunded_cents) == ("paid", 0)
    after = await cashier.accounts()
    assert {name: nano for name, nano in after.items() if nano} == {
        name: nano for name, nano in before.items() if nano
    }
    await cashier.check()


@pytest.mark.parametrize("spent_cents", [0, 2000])
@pytest.mark.parametrize("is_won", [False, True])
@pytest.mark.parametrize("is_fee_returned", [False, True])
async def test_a_dispute_takes_back_until_it_is_won(
    cashier: Cashier, spent_cents: int, is_won: bool, is_fee_returned: bool
) -> None:
    top_up = await cashier.pay()
    if spent_cents:
        await spend(cashier, spent_cents)
    dispute = cashier.stripe.open_dispute(top_up.payment_intent_id or "")
    await cashier.hear()
    assert (await cashier.top_up(top_up.id)).state == "disputed"
    assert await cashier.balance_cents() == -spent_cents
    await cashier.check()
    (notice,) = await cashier.notices("payment_disputed")
    assert notice.ended_at is None

    if is_won:
        cashier.stripe.win_dispute(dispute["id"], is_fee_returned)
    else:
        cashier.stripe.lose_dispute(dispute["id"])
    await cashier.hear()
    top_up = await cashier.top_up(top_up.id)
    assert top_up.state == ("paid" if is_won else "disputed")
    assert await cashier.balance_cents() == (CENTS if is_won else 0) - spent_cents
    (notice,) = await cashier.notices("payment_disputed")
    assert notice.ended_at is not None
    await cashier.check()


async def test_what_stripe_settles_in_another_currency_is_taken_back_as_it_was_paid(
    cashier: Cashier,
) -> None:
    cashier.stripe.settle_in("eur", percent=92)
    top_up = await cashier.pay()
    assert await cashier.balance_cents() == CENTS
    await cashier.refund(top_up.id, 1000)
    dispute = cashier.stripe.open_dispute(top_up.payment_intent_id or "")
    await cashier.hear()
    assert await cashier.balance_cents() == 0
    assert (await cashier.top_up(top_up.id)).disputed_cents == CENTS - 1000
    cashier.stripe.win_dispute(dispute["id"], is_fee_returned=True)
    await cashier.hear()
    assert await cashier.balance_cents() == CENTS - 1000
    assert STRIPE_FEES not in await cashier.accounts()
    (notice,) = await cashier.notices("stripe_currency")
    assert notice.organization_id != cashier.organization_id
    assert "settles in EUR" in notice.message


async def test_an_inquiry_moves_no_money(cashier: Cashier) -> None:
    top_up = await cashier.pay()
    dispute = cashier.stripe.open_dispute(top_up.payment_intent_id or "", is_inquiry=True)
    await cashier.hear()
    cashier.stripe.win_dispute(dispute["id"])
    await cashier.hear()
    assert (await cashier.top_up(top_up.id)).state == "paid"
    assert await cashier.balance_cents() == CENTS
    await cashier.check()


async def test_an_older_reading_does_not_undo_that_a_dispute_was_won(cashier: Cashier) -> None:
    """Of two events that are followed up at once, the older reading may be applied last."""
    payment_id = (await cashier.pay()).payment_intent_id or ""
    stripe = cashier.payments.link.stripe
    dispute = cashier.stripe.open_dispute(payment_id)
    older = await asyncio.to_thread(look_up, stripe, payment_id)
    cashier.stripe.win_dispute(dispute["id"])
    newer = await asyncio.to_thread(look_up, stripe, payment_id)
    card_id = newer.payment.payment_method_id
    for seen, is_disputed in ((older, True), (newer, False), (older, False)):
        async with cashier.database.write() as session:
            await settle(session, seen)
            assert await is_card_disputed(session, card_id) is is_disputed
    await cashier.hear()
    assert await cashier.balance_cents() == CENTS
    await cashier.check()


async def test_what_was_noted_of_a_payment_gives_way_to_its_disputes(cashier: Cashier) -> None:
    payment_id = (await cashier.pay()).payment_intent_id or ""
    dispute = cashier.stripe.open_dispute(payment_id)
    await cashier.hear()
    stripe = cashier.payments.link.stripe
    card_id = (await asyncio.to_thread(look_up, stripe, payment_id)).payment.payment_method_id
    async with cashier.database.write() as session:
        await mirror.put(session, f"card:{card_id}", "card", {payment_id: True})
        assert await is_card_disputed(session, card_id)
    cashier.stripe.win_dispute(dispute["id"])
    await cashier.hear()
    async with cashier.database.read() as session:
        assert not await is_card_disputed(session, card_id)


async def test_a_refund_and_a_dispute_of_the_rest(cashier: Cashier) -> None:
    top_up = await cashier.pay()
    await cashier.refund(top_up.id, 1000)
    dispute = cashier.stripe.open_dispute(top_up.payment_intent_id or "")
    await cashier.hear()
    top_up = await cashier.top_up(top_up.id)
    assert (top_up.refunded_cents, top_up.disputed_cents) == (1000, CENTS - 1000)
    assert await cashier.balance_cents() == 0
    cashier.stripe.win_dispute(dispute["id"])
    await cashier.hear()
    assert await cashier.balance_cents() == CENTS - 1000
    await cashier.check()


@pytest.mark.parametrize("how", ["refund", "dispute"])
async def test_a_payment_that_was_never_credited_takes_nothing_back(
    cashier: Cashier, how: str
) -> None:
    """Made by the operator in Stripe's dashboard, for something else than this box."""
    await cashier.pay()
    profile = await cashier.profile()
    before = await cashier.accounts()
    payment = cashier.stripe.charge_by_hand(profile.stripe_customer_id or "", 50_000)
    await cashier.hear()
    if how == "refund":
        cashier.stripe.refund_by_hand(payment["id"], 50_000)
    else:
        cashier.stripe.open_dispute(payment["id"])
    await cashier.hear()
    assert await cashier.balance_cents() == CENTS
    assert await cashier.accounts() == before
    assert await cashier.notices("payment_disputed") == []
