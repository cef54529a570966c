"""Webhooks: in any order, twice, late, forged, missed, and ones that cannot be followed up."""

import itertools
import os
import random
import re
from datetime import timedelta
from pathlib import Path

import pytest
from msgspec.structs import replace
from stripe import WebhookSignature

from app.billing.payments import following, inbox
from app.billing.stripe_errors import BadSignature
from app.billing.stripe_objects import Event
from app.core import clock
from tests.app.billing.payments.cashier import CENTS, Cashier
from tests.stripe_stand_in.errors import missing
from tests.stripe_stand_in.webhooks import Delivery

# Of what happens to a payment, in this order; the last event of each.
TOLD = (
    "checkout.session.completed",
    "payment_intent.succeeded",
    "refund.created",
    "charge.dispute.created",
    "charge.dispute.closed",
)

# More where there is time for it: all 120 orders with SOAK_PAYMENT_SEEDS=120.
NUM_SEEDS = int(os.environ.get("SOAK_PAYMENT_SEEDS", "6"))
EACH = max(1, 42 // NUM_SEEDS)


async def post(cashier: Cashier, delivery: Delivery) -> None:
    assert delivery.headers is not None
    await cashier.payments.receive(delivery.body, delivery.headers["Stripe-Signature"])


async def begin(cashier: Cashier) -> tuple[str, str]:
    """A new top-up and the page where it is paid; nothing is told yet."""
    top_up = await cashier.begin()
    cashier.stripe.webhooks.take()
    return top_up.id, top_up.checkout_session_id or ""


def pay(cashier: Cashier, session_id: str) -> str:
    return cashier.stripe.pay_checkout(session_id)["payment_intent"]


async def test_events_in_any_order_end_the_same(cashier: Cashier) -> None:
    for orders in list(itertools.permutations(TOLD))[::EACH]:
        top_up_id, session_id = await begin(cashier)
        payment_id = pay(cashier, session_id)
        cashier.stripe.refund_by_hand(payment_id, 1000)
        dispute = cashier.stripe.open_dispute(payment_id)
        cashier.stripe.lose_dispute(dispute["id"])
        told = {each.type: each for each in cashier.stripe.webhooks.take()}
        for type in orders:
            await post(cashier, told[type])
            await post(cashier, told[type])
            await cashier.payments.link.inbox.turn()
        top_up = await cashier.top_up(top_up_id)
        assert top_up.state == "disputed", orders
        assert (top_up.refunded_cents, top_up.disputed_cents) == (1000, CENTS - 1000), orders
    assert await cashier.balance_cents() == 0
    await cashier.check()


class Told:
    """Webhooks on their way, of which some arrive, some of those twice, in any order."""

    def __init__(self, cashier: Cashier, dice: random.Random) -> None:
        self._cashier = cashier
        self._dice = dice
        self._waiting: list[Delivery] = []

    async def now(self) -> None:
        await self._some(self._dice.random())

    async def everything(self) -> None:
        await self._some(1)

    async def _some(self, share: float) -> None:
        self._waiting += self._cashier.stripe.webhooks.take()
        self._dice.shuffle(self._waiting)
        num_now = int(len(self._waiting) * share)
        for delivery in self._waiting[:num_now] + self._waiting[: num_now // 2]:
            await post(self._cashier, delivery)
        del self._waiting[:num_now]
        await self._cashier.payments.link.inbox.turn()


async def test_events_that_overtake_what_happens_end_the_same(cashier: Cashier) -> None:
    """Some are told at once, some after the next thing has happened, some twice, in any order."""
    for seed in range(NUM_SEEDS):
        dice = random.Random(seed)  # noqa: S311 - to be repeated by its seed
        is_won = bool(seed % 2)
        top_up_id, session_id = await begin(cashier)
        told = Told(cashier, dice)
        payment_id = pay(cashier, session_id)
        await told.now()
        refund = cashier.stripe.refund_by_hand(payment_id, 500)
        await told.now()
        cashier.stripe.fail_refund(refund["id"])
        await told.now()
        cashier.stripe.refund_by_hand(payment_id, 700)
        await told.now()
        dispute = cashier.stripe.open_dispute(payment_id)
        await told.now()
        if is_won:
            cashier.stripe.win_dispute(dispute["id"], is_fee_returned=True)
        else:
            cashier.stripe.lose_dispute(dispute["id"])
        await told.everything()
        top_up = await cashier.top_up(top_up_id)
        disputed_cents = 0 if is_won else CENTS - 700
        assert (top_up.refunded_cents, top_up.disputed_cents) == (700, disputed_cents), seed
        assert top_up.state == ("paid" if is_won else "disputed"), seed
    assert await cashier.balance_cents() == NUM_SEEDS // 2 * (CENTS - 700)
    await cashier.check()


@pytest.mark.parametrize(
    "fault", ["bad_signature", "altered_body", "old_timestamp", "future_timestamp"]
)
async def test_what_stripe_did_not_send_just_now_is_refused(cashier: Cashier, fault: str) -> None:
    _, session_id = await begin(cashier)
    setattr(cashier.stripe.faults.webhooks, fault, 100)
    pay(cashier, session_id)
    for delivery in cashier.stripe.webhooks.take():
        with pytest.raises(BadSignature):
            await post(cashier, delivery)
    assert await cashier.events() == []
    assert await cashier.balance_cents() == 0


async def test_a_secret_can_be_rolled(cashier: Cashier) -> None:
    _, session_id = await begin(cashier)
    cashier.stripe.webhooks.secrets = ["whsec_new", *cashier.stripe.webhooks.secrets]
    pay(cashier, session_id)
    await cashier.hear()
    assert await cashier.balance_cents() == CENTS


async def test_missed_webhooks_are_found(cashier: Cashier) -> None:
    _, session_id = await begin(cashier)
    cashier.stripe.faults.webhooks.drop = 100
    payment_id = pay(cashier, session_id)
    cashier.stripe.refund_by_hand(payment_id, 1000)
    cashier.time.passes(hours=24 * 20)
    assert await cashier.payments.link.inbox.backfill() > 0
    await cashier.payments.link.inbox.turn()
    assert await cashier.balance_cents() == CENTS - 1000
    assert await cashier.payments.link.inbox.backfill() == 0
    await cashier.check()


async def test_one_missed_between_others_is_found(cashier: Cashier) -> None:
    """Looking goes on where it ended, not at the newest event that came."""
    await cashier.payments.link.inbox.backfill()
    _, first = await begin(cashier)
    cashier.stripe.faults.webhooks.drop = 100
    pay(cashier, first)
    cashier.stripe.faults.webhooks.drop = 0
    cashier.time.passes(hours=5)
    await cashier.pay()
    cashier.time.passes(hours=5)
    assert await cashier.payments.link.inbox.backfill() > 0
    await cashier.payments.link.inbox.turn()
    assert await cashier.balance_cents() == 2 * CENTS
    await cashier.check()


async def test_what_was_missed_while_the_clock_was_ahead_is_found(cashier: Cashier) -> None:
    await cashier.payments.link.inbox.backfill()
    _, session_id = await begin(cashier)
    cashier.time.passed += timedelta(days=2)
    await cashier.payments.link.inbox.backfill()
    pay(cashier, session_id)
    for delivery in cashier.stripe.webhooks.take():
        with pytest.raises(BadSignature):
            await post(cashier, delivery)
    cashier.time.passed -= timedelta(days=2)
    cashier.time.passes(hours=5)
    await cashier.payments.link.inbox.backfill()
    await cashier.payments.link.inbox.turn()
    assert await cashier.balance_cents() == CENTS
    await cashier.check()


async def test_while_stripe_is_away_events_are_parked(cashier: Cashier) -> None:
    _, session_id = await begin(cashier)
    pay(cashier, session_id)
    await cashier.receive()
    waiting = {each.id for each in await cashier.events() if "payment_intent" in each.type}
    cashier.stripe.go_away()
    for _ in range(2 * inbox.MAX_ATTEMPTS):
        await cashier.payments.link.inbox.turn()
        cashier.time.passes(hours=3)
    assert waiting <= {each.id for each in await cashier.events("parked")}
    cashier.stripe.start()
    await cashier.payments.link.inbox.turn()
    assert {each.state for each in await cashier.events()} == {"done"}
    assert await cashier.balance_cents() == CENTS
    await cashier.check()


async def test_what_cannot_be_followed_up_raises_an_alarm(
    cashier: Cashier, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, session_id = await begin(cashier)
    pay(cashier, session_id)
    await cashier.receive()

    def fail(*_: object) -> None:
        raise LookupError("no such thing")

    with monkeypatch.context() as patch:
        patch.setattr(following, "read", fail)
        for _ in range(inbox.MAX_ATTEMPTS):
            await cashier.payments.link.inbox.turn()
            cashier.time.passes(hours=2)
    events = await cashier.events()
    assert {each.state for each in events} == {"dead"}
    assert len(await cashier.notices("webhook_dead")) == len(events)
    async with cashier.database.write() as session:
        for event in events:
            assert await inbox.revive(session, event.id)
            assert not await inbox.revive(session, event.id)
    await cashier.payments.link.inbox.turn()
    assert await cashier.balance_cents() == CENTS
    await cashier.check()


async def test_what_is_none_of_ours_is_done(cashier: Cashier) -> None:
    """Others may use the same account at Stripe."""
    await cashier.save_card()
    before = await cashier.accounts()
    body = (
        b'{"object": "event", "id": "evt_1", "type": "charge.captured", "created": 1700000000,'
        b' "data": {"object": {"object": "charge", "id": "ch_1", "payment_intent": "pi_gone"}}}'
    )
    header = WebhookSignature.generate_signature_header(
        body.decode(), cashier.stripe.webhook_secret, cashier.stripe.clock.now()
    )
    await cashier.payments.receive(body, header)
    cashier.stripe.pay_out(100)
    await cashier.hear()
    (waiting,) = await cashier.events("parked")
    assert (waiting.id, "No such payment_intent" in waiting.error) == ("evt_1", True)
    cashier.time.passes(hours=24 * 8)
    await cashier.payments.link.inbox.turn()
    assert {each.state for each in await cashier.events()} == {"done"}
    assert await cashier.accounts() == before


@pytest.mark.parametrize("other", ["account", "mode"])
async def test_what_another_key_does_not_see_waits_for_the_right_one(
    cashier: Cashier, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, session_id = await begin(cashier)
    pay(cashier, session_id)
    await cashier.receive()
    stripe = cashier.payments.link.stripe
    with monkeypatch.context() as patch:
        if other == "mode":
            patch.setattr(stripe, "is_live", True)
        else:
            patch.setattr(cashier.stripe.account, "get", _see_nothing)
        for _ in range(2 * inbox.MAX_ATTEMPTS):
            await cashier.payments.link.inbox.turn()
            cashier.time.passes(hours=3)
        assert await cashier.balance_cents() == 0
        assert await cashier.events("dead") == []
        reason = "test mode" if other == "mode" else "No such"
        assert all(reason in each.error for each in await cashier.events("parked"))
    await cashier.payments.link.inbox.turn()
    assert await cashier.balance_cents() == CENTS
    await cashier.check()


async def test_what_names_ours_and_is_never_seen_ends_with_an_alarm(
    cashier: Cashier, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, session_id = await begin(cashier)
    payment_id = pay(cashier, session_id)
    await cashier.receive()
    with monkeypatch.context() as patch:
        patch.setattr(cashier.stripe.account, "get", _see_nothing)
        for _ in range(9):
            await cashier.payments.link.inbox.turn()
            cashier.time.passes(hours=24)
    dead = await cashier.events("dead")
    assert {"checkout.session.completed", "payment_intent.succeeded"} <= {e.type for e in dead}
    assert len(await cashier.notices("webhook_dead")) == len(dead)
    assert await cashier.payments.link.inbox.backfill() == 0
    async with cashier.database.write() as session:
        for event in dead:
            assert await inbox.revive(session, event.id)
    await cashier.payments.link.inbox.turn()
    assert await cashier.balance_cents() == CENTS
    assert {each.state for each in await cashier.events()} == {"done"}
    await cashier.check()

    refunded = Event("evt", "charge.refunded", clock.now(), "ch_1", "charge", payment_id=payment_id)
    others = replace(refunded, payment_id="pi_others")
    billed = Event("evt", "invoice.paid", clock.now(), "in_1", "invoice", invoice_id="inv_none")
    async with cashier.database.read() as session:
        assert await following.names_ours(session, refunded)
        assert not await following.names_ours(session, others)
        assert not await following.names_ours(session, billed)


def _see_nothing(kind: str, id: str, param: str = "id") -> None:
    raise missing(kind, id, param)


async def test_what_a_connected_account_did_is_none_of_ours(cashier: Cashier) -> None:
    body = (
        b'{"object": "event", "id": "evt_1", "type": "charge.captured", "created": 1700000000,'
        b' "account": "acct_other",'
        b' "data": {"object": {"object": "charge", "id": "ch_1", "payment_intent": "pi_gone"}}}'
    )
    header = WebhookSignature.generate_signature_header(
        body.decode(), cashier.stripe.webhook_secret, cashier.stripe.clock.now()
    )
    await cashier.payments.receive(body, header)
    await cashier.payments.link.inbox.turn()
    assert {each.state for each in await cashier.events()} == {"done"}


def test_the_documents_name_every_event() -> None:
    text = (Path(__file__).parents[4] / "docs/payments.md").read_text()
    named = set(re.findall(r"^[a-z_]+(?:\.[a-z_]+)+$", text, re.MULTILINE))
    assert named == {type for types in following.EVENT_TYPES for type in types}
    assert all(len(types) <= 20 for types in following.EVENT_TYPES)  # what Stripe lists at once
