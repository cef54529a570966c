"""Top-ups through Checkout: paid, declined, expired, paid later; and what they leave."""

import pytest

from app.billing.payments import top_ups
from app.core.errors import RateLimited
from tests.app.billing.payments.cashier import CENTS, Cashier
from tests.stripe_stand_in import payments


async def test_what_was_paid_is_credited_once_and_the_card_kept(cashier: Cashier) -> None:
    top_up = await cashier.begin()
    assert (top_up.state, top_up.amount_cents) == ("pending", CENTS)
    assert top_up.checkout_url is not None
    assert top_up.checkout_url.startswith(cashier.stripe.url)
    cashier.stripe.pay_checkout(top_up.checkout_session_id or "")
    await cashier.hear()

    top_up = await cashier.top_up(top_up.id)
    assert (top_up.state, top_up.error) == ("paid", "")
    assert top_up.payment_intent_id == cashier.payments_made()[0]["id"]
    assert await cashier.balance_cents() == CENTS
    profile = await cashier.profile()
    assert profile.payment_method_id
    assert profile.card_label == "Visa ending 4242"
    await cashier.check()


async def test_the_customer_is_made_once(cashier: Cashier) -> None:
    await cashier.pay()
    await cashier.pay()
    assert len(cashier.stripe.account.all("customer")) == 1
    assert await cashier.balance_cents() == 2 * CENTS
    await cashier.check()


async def test_nothing_is_credited_before_it_is_paid(cashier: Cashier) -> None:
    """A completed page may be paid days later."""
    top_up = await cashier.begin()
    session = cashier.stripe.pay_checkout(
        top_up.checkout_session_id or "", card=payments.SEPA_DEBIT
    )
    await cashier.hear()
    assert (await cashier.top_up(top_up.id)).state == "pending"
    assert await cashier.balance_cents() == 0
    cashier.stripe.settle_payment(session["payment_intent"])
    await cashier.hear()
    assert (await cashier.top_up(top_up.id)).state == "paid"
    assert await cashier.balance_cents() == CENTS
    await cashier.check()


async def test_a_fee_that_is_known_later_is_posted_then(cashier: Cashier) -> None:
    cashier.stripe.book_late()
    await cashier.pay()
    await cashier.check(is_settled=False)
    assert await cashier.balance_cents() == CENTS
    cashier.stripe.book_charges()
    await cashier.hear()
    await cashier.check()


async def test_what_was_paid_in_another_currency_is_not_credited(cashier: Cashier) -> None:
    await cashier.pay()
    top_up = await cashier.begin()
    customer_id = (await cashier.profile()).stripe_customer_id or ""
    metadata = {"top_up_id": top_up.id}
    payment = cashier.stripe.charge_by_hand(customer_id, 250_000, "jpy", metadata)
    cashier.stripe.refund_by_hand(payment["id"], 1000)
    await cashier.hear()
    assert await cashier.balance_cents() == CENTS
    assert (await cashier.top_up(top_up.id)).state == "pending"
    (notice,) = await cashier.notices("payment_currency")
    assert notice.organization_id != cashier.organization_id
    assert payment["id"] in notice.message


async def test_a_debit_that_bounces_fails(cashier: Cashier) -> None:
    top_up = await cashier.begin()
    session = cashier.stripe.pay_checkout(
        top_up.checkout_session_id or "", card=payments.SEPA_DEBIT
    )
    cashier.stripe.settle_payment(session["payment_intent"], is_paid=False)
    await cashier.hear()
    top_up = await cashier.top_up(top_up.id)
    assert top_up.state == "failed"
    assert top_up.error
    assert await cashier.balance_cents() == 0
    await cashier.check()


async def test_a_declined_card_leaves_the_page_open_for_another(cashier: Cashier) -> None:
    top_up = await cashier.begin()
    cashier.stripe.pay_checkout(top_up.checkout_session_id or "", card="4000000000000002")
    await cashier.hear()
    assert (await cashier.top_up(top_up.id)).state == "pending"
    cashier.stripe.pay_checkout(top_up.checkout_session_id or "")
    await cashier.hear()
    assert (await cashier.top_up(top_up.id)).state == "paid"
    await cashier.check()


async def test_a_card_that_was_removed_is_not_kept_by_a_late_event(cashier: Cashier) -> None:
    top_up = await cashier.begin()
    cashier.stripe.pay_checkout(top_up.checkout_session_id or "")
    late = cashier.stripe.webhooks.take()
    (card,) = cashier.stripe.account.all("payment_method")
    cashier.stripe.remove_card(card["id"])
    await cashier.hear()
    for delivery in late:
        assert delivery.headers is not None
        await cashier.payments.receive(delivery.body, delivery.headers["Stripe-Signature"])
    await cashier.payments.link.inbox.turn()
    assert await cashier.balance_cents() == CENTS
    assert (await cashier.profile()).payment_method_id is None


async def test_a_page_left_open_expires(cashier: Cashier) -> None:
    top_up = await cashier.begin()
    cashier.time.passes(hours=25)
    cashier.stripe.let_time_pass()
    await cashier.hear()
    top_up = await cashier.top_up(top_up.id)
    assert (top_up.state, top_up.checkout_url) == ("expired", None)
    await cashier.check()


async def test_who_comes_back_sees_it_paid_before_the_webhook(cashier: Cashier) -> None:
    top_up = await cashier.begin()
    cashier.stripe.pay_checkout(top_up.checkout_session_id or "")
    seen = await cashier.payments.refresh_top_up(cashier.organization_id, top_up.id)
    assert seen.state == "paid"
    await cashier.hear()
    assert await cashier.balance_cents() == CENTS
    await cashier.check()


async def test_while_stripe_is_away_a_top_up_waits(cashier: Cashier) -> None:
    cashier.stripe.go_away()
    top_up = await cashier.begin()
    assert (top_up.state, top_up.checkout_url) == ("created", None)
    cashier.time.passes(hours=72)
    cashier.stripe.start()
    await cashier.work_until_idle()
    top_up = await cashier.top_up(top_up.id)
    assert top_up.state == "pending"
    cashier.stripe.pay_checkout(top_up.checkout_session_id or "")
    await cashier.hear()
    assert await cashier.balance_cents() == CENTS
    assert len(cashier.payments_made()) == 1
    await cashier.check()


async def test_a_customer_that_stripe_refuses_fails_what_waits_for_it(cashier: Cashier) -> None:
    cashier.stripe.faults.add("reject", "/v1/customers$")
    top_up = await cashier.begin()
    assert top_up.state == "failed"
    assert top_up.error
    assert (await cashier.begin()).state == "pending"  # asked again


async def test_a_page_that_stripe_refuses_fails(cashier: Cashier) -> None:
    cashier.stripe.faults.add("reject", "/v1/checkout/sessions$")
    top_up = await cashier.begin()
    assert top_up.state == "failed"
    assert top_up.error
    assert await cashier.balance_cents() == 0


async def test_only_so_many_are_open_at_once(
    cashier: Cashier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top_ups, "MAX_OPEN", 2)
    await cashier.begin()
    await cashier.begin()
    with pytest.raises(RateLimited, match="begun in the last day"):
        await cashier.begin()


async def test_a_customer_deleted_at_stripe_is_made_again(cashier: Cashier) -> None:
    await cashier.save_card()
    cashier.stripe.delete_customer((await cashier.profile()).stripe_customer_id or "")
    await cashier.hear()
    profile = await cashier.profile()
    assert (profile.stripe_customer_id, profile.payment_method_id) == (None, None)
    await cashier.pay()
    assert len(cashier.stripe.account.all("customer")) == 2
    await cashier.check()
