"""Automatic recharging: the saved card pays once when little is left, and stops when it cannot."""

import asyncio

import pytest

from app.billing.payments import recharge
from app.billing.payments.recharge import set_recharge
from app.core.errors import InvalidRequest
from tests.app.billing.payments.cashier import CENTS, Cashier
from tests.stripe_stand_in import payments


async def low(cashier: Cashier) -> None:
    """A card is saved, and less is left than is wanted."""
    await cashier.save_card(below_cents=CENTS + 1)


async def test_the_card_pays_once_when_little_is_left(cashier: Cashier) -> None:
    await low(cashier)
    await cashier.work()
    await cashier.work()
    assert [(each.kind, each.state) for each in await cashier.top_ups()] == [
        ("checkout", "paid"),
        ("recharge", "paid"),
    ]
    assert await cashier.balance_cents() == 2 * CENTS
    await cashier.check()


async def test_enough_left_charges_nothing(cashier: Cashier) -> None:
    await cashier.save_card(below_cents=CENTS)
    await cashier.work()
    assert len(cashier.payments_made()) == 1


async def test_many_turns_at_once_begin_one(cashier: Cashier) -> None:
    await low(cashier)
    await asyncio.gather(*(cashier.payments.recharge() for _ in range(4)))
    await cashier.work()
    assert len(cashier.payments_made()) == 2
    assert await cashier.balance_cents() == 2 * CENTS
    await cashier.check()


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        ("4000000000009995", "insufficient_funds"),
        (payments.NEEDS_AUTHENTICATION, "bank wants the payment to be confirmed"),
    ],
)
async def test_a_decline_pauses_and_says_why(cashier: Cashier, card: str, reason: str) -> None:
    await low(cashier)
    cashier.stripe.change_card((await cashier.profile()).payment_method_id or "", card)
    await cashier.work_until_idle()
    failed = (await cashier.top_ups())[1]
    assert failed.state == "failed"
    assert reason in failed.error
    assert reason in (await cashier.profile()).recharge_paused
    (notice,) = await cashier.notices("recharge_failed")
    assert notice.organization_id == cashier.organization_id
    assert reason in notice.message
    assert len(await cashier.operations("charge_card")) == 1
    assert await cashier.balance_cents() == CENTS
    await cashier.check()


async def test_it_goes_on_once_somebody_says_so(cashier: Cashier) -> None:
    await low(cashier)
    card_id = (await cashier.profile()).payment_method_id or ""
    cashier.stripe.change_card(card_id, "4000000000009995")
    await cashier.work()
    cashier.stripe.change_card(card_id, payments.GOOD_CARD)
    await cashier.recharge_below(CENTS + 1)
    (notice,) = await cashier.notices("recharge_failed")
    assert notice.ended_at is not None
    await cashier.work()
    assert await cashier.balance_cents() == 2 * CENTS
    await cashier.check()


async def test_another_card_lets_it_go_on(cashier: Cashier) -> None:
    await low(cashier)
    profile = await cashier.profile()
    cashier.stripe.change_card(profile.payment_method_id or "", "4000000000009995")
    await cashier.work()
    method = cashier.stripe.save_card(profile.stripe_customer_id or "")
    await cashier.hear()
    profile = await cashier.profile()
    assert (profile.payment_method_id, profile.recharge_paused) == (method["id"], "")
    await cashier.work()
    assert await cashier.balance_cents() == 2 * CENTS
    await cashier.check()


@pytest.mark.parametrize("how", ["refund", "refund by hand", "dispute"])
async def test_what_is_taken_back_is_not_charged_again(cashier: Cashier, how: str) -> None:
    await cashier.save_card(below_cents=1000)
    (top_up,) = await cashier.top_ups()
    if how == "refund":
        await cashier.refund(top_up.id, CENTS)
    elif how == "dispute":
        cashier.stripe.open_dispute(top_up.payment_intent_id or "")
    else:
        cashier.stripe.refund_by_hand(top_up.payment_intent_id or "")
    await cashier.hear()
    await cashier.work_until_idle(rounds=3)
    assert len(cashier.payments_made()) == 1
    assert "refunded or is disputed" in (await cashier.profile()).recharge_paused
    (notice,) = await cashier.notices("recharge_failed")
    assert "Automatic recharging is paused: a payment was refunded" in notice.message
    await cashier.check()


@pytest.mark.parametrize("is_inquiry", [False, True])
async def test_a_disputed_card_is_charged_again_only_once_that_is_won(
    cashier: Cashier, is_inquiry: bool
) -> None:
    await cashier.save_card(below_cents=1000)
    (top_up,) = await cashier.top_ups()
    dispute = cashier.stripe.open_dispute(top_up.payment_intent_id or "", is_inquiry=is_inquiry)
    await cashier.hear()
    await cashier.recharge_below(CENTS + 1)
    await cashier.work_until_idle(rounds=2)
    assert len(cashier.payments_made()) == 1
    assert "this card is disputed" in (await cashier.profile()).recharge_paused
    cashier.stripe.win_dispute(dispute["id"])
    await cashier.hear()
    await cashier.recharge_below(CENTS + 1)
    await cashier.work_until_idle(rounds=2)
    assert len(cashier.payments_made()) == 2
    await cashier.check()


async def test_a_recharge_that_was_begun_does_not_charge_a_disputed_card(cashier: Cashier) -> None:
    await low(cashier)
    cashier.stripe.go_away()
    await cashier.payments.recharge()
    cashier.stripe.start()
    cashier.stripe.open_dispute((await cashier.top_ups())[0].payment_intent_id or "")
    await cashier.hear()
    await cashier.recharge_below(CENTS + 1)
    await cashier.work_until_idle(rounds=2)
    assert len(cashier.payments_made()) == 1
    await cashier.check()


async def test_without_a_card_nothing_is_charged(cashier: Cashier) -> None:
    await low(cashier)
    cashier.stripe.remove_card((await cashier.profile()).payment_method_id or "")
    await cashier.hear()
    assert (await cashier.profile()).payment_method_id is None
    await cashier.work()
    assert await cashier.operations("charge_card") == []


async def test_what_is_no_longer_needed_is_not_charged(cashier: Cashier) -> None:
    """Stripe is away when the card is to pay; by the time it is back there is enough."""
    await low(cashier)
    cashier.stripe.go_away()
    await cashier.payments.recharge()
    async with cashier.database.write() as session:
        await set_recharge(session, cashier.organization_id, None, None, "usd")
    cashier.stripe.start()
    await cashier.work_until_idle()
    assert (await cashier.top_ups())[1].state == "expired"
    assert len(cashier.payments_made()) == 1
    await cashier.check()


async def test_so_many_in_a_day_are_looked_at_by_a_person(
    cashier: Cashier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recharge, "MAX_PER_DAY", 2)
    await cashier.save_card(below_cents=100 * CENTS)
    await cashier.work_until_idle(rounds=4)
    assert len(cashier.payments_made()) == 3
    assert "2 recharges in one day" in (await cashier.profile()).recharge_paused
    await cashier.check()


@pytest.mark.parametrize(("below", "cents"), [(1, None), (None, 1000), (1, 1), (1, 10**9)])
async def test_impossible_settings_are_refused(
    cashier: Cashier, below: int | None, cents: int | None
) -> None:
    async with cashier.database.write() as session:
        with pytest.raises(InvalidRequest):
            await set_recharge(session, cashier.organization_id, below, cents, "usd")
