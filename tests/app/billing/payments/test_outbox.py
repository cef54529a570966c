"""Everything that can go wrong with asking Stripe for something: it happens once all the same, or
a person is told that nobody knows."""

import asyncio
from datetime import timedelta
from typing import NamedTuple

import msgspec
import pytest

from app.billing.ledger import lock_account, open_account
from app.billing.payments import outbox
from app.billing.payments.operations import plan
from app.billing.payments.service import Payments
from app.billing.payments.top_ups import begin
from app.core import clock
from app.core.errors import Conflict, NotFound
from app.organizations.service import default_organization_id
from tests.app.billing.payments.cashier import CENTS, Cashier
from tests.stripe_stand_in.faults import Kind


class Case(NamedTuple):
    """An operation, what it asks of Stripe, and what it makes there."""

    kind: str
    path: str
    made: str


CASES = [
    Case("create_customer", "/v1/customers$", "customer"),
    Case("create_checkout", "/v1/checkout/sessions$", "checkout.session"),
    Case("charge_card", "/v1/payment_intents$", "payment_intent"),
    Case("refund", "/v1/refunds$", "refund"),
]
# After these it may have happened for all that we know.
UNKNOWN: list[Kind] = ["lose_request", "lose_reply", "fail_before", "fail_after", "bad_gateway"]
REFUSED: list[Kind] = ["busy", "locked"]
cases = pytest.mark.parametrize("case", CASES, ids=[case.kind for case in CASES])


async def prepare(cashier: Cashier, case: Case) -> None:
    """Whatever comes before."""
    if case.kind == "charge_card":
        await cashier.save_card(below_cents=CENTS + 1)
    elif case.kind == "refund":
        await cashier.pay()
    elif case.kind == "create_checkout":
        await cashier.begin()


async def ask(cashier: Cashier, case: Case) -> None:
    if case.kind == "charge_card":
        await cashier.payments.recharge()
    elif case.kind == "refund":
        (top_up,) = await cashier.top_ups()
        await cashier.refund(top_up.id, 1000)
    else:
        await cashier.begin()


def num_made(cashier: Cashier, case: Case) -> int:
    return len(cashier.stripe.account.all(case.made))


async def finish(cashier: Cashier, case: Case, *, is_done: bool = True) -> None:
    """What follows when the operation has come through, and what must be so in the end."""
    if case.kind.startswith("create"):
        top_up = (await cashier.top_ups())[-1]
        assert top_up.state == "pending"
        cashier.stripe.pay_checkout(top_up.checkout_session_id or "")
    await cashier.work()
    expected = {"charge_card": 2 * CENTS, "refund": CENTS - 1000}.get(case.kind, CENTS)
    assert await cashier.balance_cents() == (expected if is_done else CENTS)
    await cashier.check()


@cases
@pytest.mark.parametrize("fault", [*UNKNOWN, *REFUSED])
async def test_a_fault_passes_and_it_happened_once(
    cashier: Cashier, case: Case, fault: Kind
) -> None:
    await prepare(cashier, case)
    before = num_made(cashier, case)
    cashier.stripe.faults.add(fault, case.path, times=2)
    await ask(cashier, case)
    await cashier.work_until_idle(rounds=5)
    assert num_made(cashier, case) == before + 1
    assert (await cashier.operations(case.kind))[-1].state == "confirmed"
    await finish(cashier, case)


@cases
async def test_a_fault_that_stripe_keeps_is_not_repeated_for_ever(
    cashier: Cashier, case: Case
) -> None:
    """Saved under the key: what is harmless twice is asked for under another, the rest is for a
    person once Stripe's lists are sure not to have it."""
    await prepare(cashier, case)
    before = num_made(cashier, case)
    cashier.stripe.faults.add("fail_saved", case.path)
    await ask(cashier, case)
    await cashier.work_until_idle(rounds=4)
    if case.kind.startswith("create"):
        assert num_made(cashier, case) == before + 1
        await finish(cashier, case)
        return
    cashier.time.passes(hours=26)
    await cashier.work_until_idle(rounds=4)
    assert num_made(cashier, case) == before
    assert (await cashier.operations(case.kind))[-1].state == "quarantined"
    assert len(await cashier.notices("payment_in_doubt")) == 1
    await finish(cashier, case, is_done=False)


@cases
@pytest.mark.parametrize("fault", ["lose_reply", "fail_after"])
async def test_days_later_what_happened_is_found(cashier: Cashier, case: Case, fault: Kind) -> None:
    """The reply is lost, then Stripe is away for three days and forgets the key."""
    await prepare(cashier, case)
    before = num_made(cashier, case)
    cashier.stripe.faults.add(fault, case.path)
    await ask(cashier, case)
    await away_for_three_days(cashier)
    assert num_made(cashier, case) == before + 1
    await finish(cashier, case)


@cases
async def test_days_later_what_did_not_happen_is_done_only_if_harmless(
    cashier: Cashier, case: Case
) -> None:
    await prepare(cashier, case)
    before = num_made(cashier, case)
    cashier.stripe.faults.add("lose_request", case.path)
    await ask(cashier, case)
    await away_for_three_days(cashier)
    is_harmless = case.kind.startswith("create")
    assert num_made(cashier, case) == before + is_harmless
    assert len(await cashier.notices("payment_in_doubt")) == (not is_harmless)
    await finish(cashier, case, is_done=is_harmless)


@cases
async def test_what_never_reached_stripe_is_done_days_later(cashier: Cashier, case: Case) -> None:
    await prepare(cashier, case)
    before = num_made(cashier, case)
    cashier.stripe.go_away()
    await ask(cashier, case)
    assert (await cashier.operations(case.kind))[-1].first_sent_at is None
    await away_for_three_days(cashier)
    assert num_made(cashier, case) == before + 1
    await finish(cashier, case)


async def away_for_three_days(cashier: Cashier) -> None:
    cashier.stripe.go_away()
    for _ in range(3):
        await cashier.payments.link.outbox.turn()
        cashier.time.passes(hours=24)
    cashier.stripe.prune_keys()
    cashier.stripe.start()
    await cashier.work_until_idle(rounds=4)


@cases
@pytest.mark.parametrize("fault", ["lose_reply", "lose_request"])
@pytest.mark.parametrize("hours_until_restart", [0, 26])
async def test_a_clock_that_was_ahead_repeats_nothing(
    cashier: Cashier, case: Case, fault: Kind, hours_until_restart: int
) -> None:
    """Asked for while our clock is three days ahead of Stripe's; the webhooks are refused then."""
    await prepare(cashier, case)
    before = num_made(cashier, case)
    cashier.time.passed += timedelta(days=3)
    cashier.stripe.faults.add(fault, case.path)
    await ask(cashier, case)
    await cashier.payments.link.inbox.backfill()
    cashier.stripe.webhooks.take()
    cashier.time.passed -= timedelta(days=3)
    cashier.time.passes(hours=hours_until_restart)
    cashier.stripe.prune_keys()
    await cashier.restart()
    for _ in range(4):
        await cashier.payments.link.outbox.turn()
        cashier.time.passes(hours=26)
    is_done = fault == "lose_reply" or case.kind.startswith("create")
    assert num_made(cashier, case) == before + is_done
    assert len(await cashier.notices("payment_in_doubt")) == (not is_done)
    await cashier.payments.link.inbox.backfill()
    await finish(cashier, case, is_done=is_done)


@cases
async def test_several_outboxes_make_each_call_once(cashier: Cashier, case: Case) -> None:
    """Each with its own connections, as several processes have; Stripe takes its time."""
    await prepare(cashier, case)
    before = len(cashier.stripe.requests_to(case.path.removesuffix("$")))
    cashier.stripe.go_away()
    await ask(cashier, case)
    cashier.stripe.start()
    cashier.time.passes(minutes=6)
    boxes = [Payments(cashier.database, cashier.settings) for _ in range(4)]
    cashier.stripe.faults.add("slow", case.path, seconds=1)

    async def turns(box: Payments) -> None:
        for _ in range(4):
            await box.link.outbox.turn()
            await asyncio.sleep(0.1)

    await asyncio.gather(*(turns(box) for box in boxes))
    cashier.time.passes(minutes=6)
    await boxes[0].link.outbox.turn()
    for box in boxes:
        await box.close()
    assert len(cashier.stripe.requests_to(case.path.removesuffix("$"))) == before + 1
    await finish(cashier, case)


async def test_a_payment_that_turns_up_ends_the_doubt(cashier: Cashier) -> None:
    """Stripe's lists did not have it when we looked, and its event comes after all."""
    case = CASES[2]
    await prepare(cashier, case)
    cashier.stripe.faults.add("lose_reply", case.path)
    await ask(cashier, case)
    operation = await cashier.operation(case.kind)
    async with cashier.database.write() as session:
        row = await session.merge(operation)
        row.state = "quarantined"
    await cashier.hear()
    assert (await cashier.operation(case.kind)).state == "confirmed"
    await finish(cashier, case)


async def test_a_wrong_key_of_the_api_only_waits(cashier: Cashier) -> None:
    settings = msgspec.structs.replace(cashier.settings, stripe_api_key="sk_test_other")
    other = Payments(cashier.database, settings)
    top_up = await other.begin_top_up(cashier.database.write(), cashier.organization_id, CENTS)
    await other.close()
    assert top_up.state == "created"
    (notice,) = await cashier.notices("stripe_unauthorized")
    assert "TAPEOUT_STRIPE_API_KEY" in notice.message
    cashier.time.passes(minutes=6)
    await cashier.work_until_idle(rounds=1)
    (notice,) = await cashier.notices("stripe_unauthorized")
    assert notice.ended_at is not None
    await finish(cashier, CASES[1])


async def test_what_cannot_be_prepared_keeps_nobody_waiting(
    cashier: Cashier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "MAX_DUE", 3)
    async with cashier.database.write() as session:
        for number in range(3):
            await plan(session, "unheard_of", f"key{number}", f"org_{number}", "x", {})
        await begin(session, cashier.organization_id, CENTS, "usd", "https://box.test")
    for attempt in range(1, 4):
        await cashier.payments.link.outbox.turn()
        stuck = await cashier.operations("unheard_of")
        assert [row.num_attempts for row in stuck] == [attempt] * 3
        assert all(row.next_at > clock.now() and "unheard_of" in row.error for row in stuck)
        cashier.time.passes(minutes=6)
    assert (await cashier.operation("create_checkout")).state == "confirmed"


async def test_an_alarm_does_not_wait_for_the_operators_account(cashier: Cashier) -> None:
    """Two accounts locked in no set order wait for each other: for PostgreSQL, where another
    transaction has the operator's."""
    if cashier.settings.database_url.startswith("sqlite"):
        pytest.skip("locks no rows")
    case = CASES[3]
    await prepare(cashier, case)
    cashier.stripe.faults.add("reject", case.path)
    async with cashier.database.write() as session:
        operator_id = await default_organization_id(session)
        await open_account(session, operator_id, "usd")
    async with cashier.database.write() as session:
        await lock_account(session, operator_id, "usd")
        async with asyncio.timeout(5):
            await ask(cashier, case)
    assert (await cashier.operation(case.kind)).state == "rejected"
    assert len(await cashier.notices("refund_refused")) == 1


async def test_a_key_is_planned_once(cashier: Cashier) -> None:
    for _ in range(2):
        async with cashier.database.write() as session:
            await plan(session, "create_customer", "key", cashier.organization_id, "x", {})
    (row,) = await cashier.operations()
    assert (row.id, row.state) == ("key", "planned")
    assert row.next_at <= clock.now()


async def in_doubt(cashier: Cashier, case: Case, fault: Kind) -> str:
    """Asked for a day ago, and not found when it was looked for."""
    await prepare(cashier, case)
    cashier.stripe.faults.add(fault, case.path)
    await ask(cashier, case)
    (operation,) = await cashier.operations(case.kind)
    async with cashier.database.write() as session:
        row = await session.merge(operation)
        row.state = "quarantined"
    return operation.id


@pytest.mark.parametrize("case", CASES[2:], ids=[case.kind for case in CASES[2:]])
async def test_a_person_can_have_it_looked_for_again(cashier: Cashier, case: Case) -> None:
    operation_id = await in_doubt(cashier, case, "lose_reply")
    box = cashier.payments.link.outbox
    assert (await box.look_again(cashier.database.write(), operation_id)).state == "confirmed"
    with pytest.raises(Conflict, match="is confirmed"):
        await box.look_again(cashier.database.write(), operation_id)
    await finish(cashier, case)


@pytest.mark.parametrize("case", CASES[2:], ids=[case.kind for case in CASES[2:]])
async def test_a_person_can_give_it_up(cashier: Cashier, case: Case) -> None:
    operation_id = await in_doubt(cashier, case, "lose_request")
    box = cashier.payments.link.outbox
    assert (await box.look_again(cashier.database.write(), operation_id)).state == "quarantined"
    (notice,) = await cashier.notices("payment_in_doubt")
    assert notice.ended_at is None
    assert (await box.abandon(cashier.database.write(), operation_id)).state == "rejected"
    (notice,) = await cashier.notices("payment_in_doubt")
    assert notice.ended_at is not None
    with pytest.raises(Conflict, match="is rejected"):
        await box.abandon(cashier.database.write(), operation_id)
    with pytest.raises(NotFound):
        await box.abandon(cashier.database.write(), "unknown")
    if case.kind == "charge_card":
        await cashier.recharge_below(CENTS + 1)
        await cashier.payments.recharge()
    else:
        await ask(cashier, case)
    await finish(cashier, case)
