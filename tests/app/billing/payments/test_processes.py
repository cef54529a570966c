"""Four processes at the same payments: each card is charged once, each payment credited once."""

import asyncio
import sys
from asyncio.subprocess import PIPE, Process

import msgspec

from app.organizations.service import create_organization
from tests.app.billing.payments.cashier import CENTS, Cashier

NUM_PROCESSES = 4
NUM_ORGANIZATIONS = 5


async def start(settings: str) -> Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.app.billing.payments.till_process", settings),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


async def test_four_processes_charge_each_card_once(cashier: Cashier) -> None:
    cashiers = [cashier]
    for number in range(1, NUM_ORGANIZATIONS):
        async with cashier.database.write() as session:
            organization = await create_organization(session, f"organization {number}")
        other = Cashier(
            cashier.database, cashier.settings, cashier.stripe, cashier.time, organization.id
        )
        cashiers.append(other)
    for each in cashiers:
        top_up = await each.begin()
        cashier.stripe.pay_checkout(top_up.checkout_session_id or "")
        await each.hear()
        await each.recharge_below(CENTS + 1)

    settings = msgspec.json.encode(cashier.settings, enc_hook=str).decode()
    processes = await asyncio.gather(*(start(settings) for _ in range(NUM_PROCESSES)))
    ended = await asyncio.gather(*(process.communicate(b"go\n") for process in processes))
    assert [process.returncode for process in processes] == [0] * NUM_PROCESSES, ended
    assert not any(errors for _, errors in ended), ended

    assert len(cashier.stripe.requests_to("/v1/payment_intents")) == NUM_ORGANIZATIONS
    await cashier.hear()
    for each in cashiers:
        assert await each.balance_cents() == 2 * CENTS
        assert [row.state for row in await each.events() if row.state != "done"] == []
    for each in cashiers[1:]:
        await each.payments.close()
    accounts = await cashier.accounts()
    assert sum(accounts.values()) == 0
    held_cents = sum(move["net"] for move in cashier.stripe.account.all("balance_transaction"))
    assert accounts["stripe_clearing"] == -held_cents * 10**7
