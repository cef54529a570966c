"""The process ends anywhere, again and again, and starts anew: every payment happens once."""

import random
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from app.billing import payments
from app.billing.stripe_errors import StripeUnknown
from app.core.failpoints import Reached, observed
from tests.app.billing.payments.cashier import CENTS, Cashier

FAILPOINTS = frozenset(
    name
    for path in Path(payments.__path__[0]).glob("*.py")
    for name in re.findall(r'failpoint\("((?:outbox|inbox|recharge)\.\w+)"\)', path.read_text())
)
ELSEWHERE = {"outbox.before_refusal_commit", "outbox.before_abandon_commit"}  # in no good story
MAX_CRASHES = 500


async def begin(cashier: Cashier) -> None:
    if not await cashier.top_ups():
        await cashier.begin()


async def pay(cashier: Cashier) -> None:
    top_up = (await cashier.top_ups())[0]
    session_id = top_up.checkout_session_id
    if session_id and cashier.stripe.account.get("checkout.session", session_id)["url"]:
        cashier.stripe.pay_checkout(session_id)


async def want_recharging(cashier: Cashier) -> None:
    if len(cashier.payments_made()) == 1:
        await cashier.recharge_below(CENTS + 1)


async def refund(cashier: Cashier) -> None:
    top_up = (await cashier.top_ups())[0]
    if top_up.paid_at is not None and not await cashier.operations("refund"):
        await cashier.refund(top_up.id, 1000)


async def stop_recharging(cashier: Cashier) -> None:
    await cashier.recharge_below(0)


async def turns(cashier: Cashier) -> None:
    await cashier.work_until_idle(rounds=2)
    with suppress(StripeUnknown):  # it is tried again
        await cashier.payments.link.inbox.backfill()
    await cashier.work_until_idle(rounds=2)


# Each step can be repeated, as by a person who looks whether it is done.
STORY: list[Callable[[Cashier], Awaitable[None]]] = [
    begin,
    turns,
    pay,
    turns,
    want_recharging,
    turns,
    stop_recharging,
    refund,
    turns,
]


async def tell(cashier: Cashier, crash: Callable[[str], None]) -> int:
    """The story, each step repeated by a new process until it gets to its end."""
    num_crashes = 0
    for step in STORY:
        while True:
            try:
                with observed(crash):
                    await step(cashier)
                break
            except Reached:
                num_crashes += 1
                assert num_crashes < MAX_CRASHES, "it gets nowhere"
                await cashier.restart()
    await turns(cashier)
    return num_crashes


async def check(cashier: Cashier) -> None:
    assert [each.kind for each in await cashier.top_ups()] == ["checkout", "recharge"]
    assert len(cashier.payments_made()) == 2
    assert len(cashier.stripe.account.all("refund")) == 1
    assert len(cashier.stripe.account.all("customer")) == 1
    assert await cashier.balance_cents() == 2 * CENTS - 1000
    assert {each.state for each in await cashier.operations()} == {"confirmed"}
    assert {each.state for each in await cashier.events()} == {"done"}
    await cashier.check()


async def test_each_place_crashes_once(cashier: Cashier) -> None:
    reached: set[str] = set()

    def crash(name: str) -> None:
        if name in FAILPOINTS and name not in reached:
            reached.add(name)
            raise Reached(name)

    await tell(cashier, crash)
    assert reached == FAILPOINTS - ELSEWHERE
    await check(cashier)


@pytest.mark.parametrize("seed", range(3))
async def test_crashes_at_random(cashier: Cashier, seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - to be repeated by its seed

    def crash(name: str) -> None:
        if name in FAILPOINTS and dice.random() < 0.15:
            raise Reached(name)

    assert await tell(cashier, crash) > 5
    await check(cashier)


async def test_crashes_and_faults_at_random(cashier: Cashier) -> None:
    """Stripe loses requests and replies meanwhile, and webhooks are lost and doubled."""
    dice = random.Random(7)  # noqa: S311 - to be repeated by its seed
    cashier.stripe.faults.at_random({"lose_reply": 0.1, "fail_before": 0.1, "lose_request": 0.1})
    cashier.stripe.faults.webhooks.drop = 3
    cashier.stripe.faults.webhooks.duplicate = 3
    cashier.stripe.faults.webhooks.is_reordered = True

    def crash(name: str) -> None:
        if name in FAILPOINTS and dice.random() < 0.1:
            raise Reached(name)

    await tell(cashier, crash)
    cashier.stripe.faults.clear()
    await turns(cashier)
    await check(cashier)
