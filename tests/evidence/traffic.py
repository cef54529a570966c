"""What clients and people do to a box while it may die: seeded, and written down as they see it.

Each line of the log is what somebody outside the process knows for certain, written before the
process can do anything more: it survives the kill.
"""

import asyncio
import os
import random
from datetime import timedelta
from pathlib import Path

from app.api.execution import Execution
from app.billing import credits
from app.billing.ledger import PROMOTIONAL_COST, STRIPE_CLEARING
from app.billing.price_changes import change_prices
from app.billing.service import read_account, set_spending_limit
from app.billing.tables import Budget
from app.core import clock
from app.core.errors import AppError
from app.metering.records import Tally, Usage
from runtime.protocol import (
    Generate,
    Predict,
    Predicted,
    SamplingParams,
    SequenceOutput,
    Tensor,
)
from tests.evidence.box import Box

OPEN, LIMITED, PREPAID, BUDGETED = "org_open", "org_limited", "org_prepaid", "org_budgeted"
ORGANIZATIONS = (OPEN, LIMITED, PREPAID, BUDGETED)
NUM_CLIENTS = 8
GIFT_LASTS = timedelta(seconds=0.2)
PROMPTS = ("one two three four", "slow@2 here", "slow@1", "fail@3 please", "abort@5", "refuse@4")


class Log:
    """Lines in a file, each there once `write` returns, whatever becomes of the process."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, *words: object) -> None:
        os.write(self._descriptor, (" ".join(map(str, words)) + "\n").encode())


async def prepare(box: Box) -> None:
    """Accounts of every kind, once."""
    async with box.database.write() as session:
        if await session.get(Budget, "bgt_key") is not None:
            return
        await set_spending_limit(session, LIMITED, 60_000, "usd")
        await set_spending_limit(session, PREPAID, 0, "usd")
        for name, scope, subject, period, limit_nano in (
            ("bgt_key", "key", f"key_{BUDGETED}_1", "day", 40_000),
            ("bgt_model", "model", "tiny", "day", 300_000),
            ("bgt_all", "organization", "", "month", 400_000),
        ):
            session.add(
                Budget(
                    id=name,
                    organization_id=BUDGETED,
                    scope=scope,
                    subject=subject,
                    period=period,
                    limit_nano=limit_nano,
                    created_at=clock.now(),
                )
            )


async def run(box: Box, log: Log, seed: int, seconds: float) -> None:
    """Everybody at once, for so long."""
    log.write("life", NUM_CLIENTS)
    stop = asyncio.get_running_loop().time() + seconds
    rngs = [random.Random(f"{seed} {i}") for i in range(NUM_CLIENTS + 1)]  # noqa: S311
    people = asyncio.create_task(_people(box, log, rngs[-1]))
    clients = [asyncio.create_task(_client(box, log, rng, stop)) for rng in rngs[:-1]]
    try:
        await asyncio.gather(*clients)
    finally:
        people.cancel()
        await asyncio.wait([people])
        if not people.cancelled() and people.exception() is not None:
            raise AssertionError("people could not do their work") from people.exception()


async def _client(box: Box, log: Log, rng: random.Random, stop: float) -> None:
    while asyncio.get_running_loop().time() < stop:
        organization_id = rng.choice(ORGANIZATIONS)
        try:
            if rng.random() < 0.8:
                await stream(box, log, rng, organization_id)
            else:
                await predict(box, log, rng, organization_id)
        except AppError as error:
            if error.code in ("internal_error", "worker_untrusted"):
                raise
            await asyncio.sleep(0.002)


async def stream(box: Box, log: Log, rng: random.Random, organization_id: str) -> None:
    """One generation; `ask` says how long it may get, `got` is what was delivered so far, `end`
    that it is the whole answer, `failed` that there will be no more."""
    call = box.call(organization_id, "tiny", key=rng.choice("123"))
    max_tokens, prompt = rng.randint(1, 12), rng.choice(PROMPTS)
    request = Generate(
        request_id=call.request_id,
        sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        cache_salt=call.principal.cache_salt,
        text=prompt,
        json_schema="{}" if prompt.startswith("refuse") else None,
    )
    cancel_at = rng.choice([None, None, None, 0, 2, 4])
    answer = Counted(is_broken=rng.random() < 0.1)
    log.write("ask", call.request_id, request.sampling.max_tokens)
    try:
        num_tokens = await _read(box.relay.generate(call, request, answer), log, cancel_at)
    except AppError as error:
        log.write("failed", call.request_id)
        if answer.is_broken and error.code == "internal_error":
            return
        raise
    log.write("end", call.request_id, num_tokens)


class Counted:
    """One byte for each token. A broken one cannot be made to its end."""

    def __init__(self, *, is_broken: bool) -> None:
        self.is_broken = is_broken

    def add(self, outputs: list[SequenceOutput], tally: Tally) -> bytes:
        return b"".join(b"." * len(output.token_ids) for output in outputs)

    def finish(self, tally: Tally) -> bytes:
        if self.is_broken:
            raise ValueError("broken")
        return b""


async def _read(execution: Execution, log: Log, cancel_at: int | None) -> int:
    await execution.started
    num_tokens = 0
    if cancel_at == 0:
        execution.cancel()
    while body := await execution.next_body():
        num_tokens += len(body)
        log.write("got", execution.request_id, num_tokens)
        if cancel_at is not None and num_tokens >= cancel_at:
            execution.cancel()
    return num_tokens


async def predict(box: Box, log: Log, rng: random.Random, organization_id: str) -> None:
    call = box.call(organization_id, "doubler", key=rng.choice("123"))
    k = rng.choice([1, 1, 1, 13, 14])
    inputs = [
        Tensor(name="x", dtype="float32", shape=[1, 2], data=bytes(8)),
        Tensor(name="k", dtype="int64", shape=[1], data=k.to_bytes(8, "little")),
    ]
    log.write("ask", call.request_id, 0)

    async def answer(predicted: Predicted, usage: Usage) -> int:
        return usage.device_ms

    sent = Predict(request_id=call.request_id, inputs=inputs)
    prediction = box.relay.predict(call, sent, answer)
    if rng.random() < 0.2:  # while its money is being set aside
        await asyncio.sleep(0)
        prediction.cancel()
    try:
        device_ms = await prediction
    except AppError:
        log.write("failed", call.request_id)
        raise
    log.write("answered", call.request_id, device_ms)


async def _people(box: Box, log: Log, rng: random.Random) -> None:
    """Payments, gifts, refunds, limits and prices. What is `done` is never to be done again."""
    run_id = rng.getrandbits(32)
    num_done = 0
    while True:
        num_done += 1
        act = rng.choice([_pay, _pay, _give, _take_back, _expire, _limit, _reprice])
        await act(box, log, rng, f"{run_id}:{num_done}")
        await asyncio.sleep(rng.random() * 0.02)


async def _pay(box: Box, log: Log, rng: random.Random, name: str) -> None:
    await _add(box, log, "paid", rng.randint(1, 60_000), name, from_account=STRIPE_CLEARING)


async def _give(box: Box, log: Log, rng: random.Random, name: str) -> None:
    await _add(box, log, "promotional", rng.randint(1, 9_000), name, PROMOTIONAL_COST)


async def _add(
    box: Box, log: Log, kind: str, amount_nano: int, name: str, from_account: str
) -> None:
    """Twice, as by two messages about one payment."""
    for _ in range(2):
        async with box.database.write() as session:
            await credits.add_lot(
                session,
                PREPAID,
                kind,
                amount_nano,
                source=name,
                currency="usd",
                from_account=from_account,
                priority=10 if kind == "promotional" else 50,
                expires_at=clock.now() + GIFT_LASTS if kind == "promotional" else None,
            )
    log.write("paid", name, amount_nano)


async def _take_back(box: Box, log: Log, rng: random.Random, name: str) -> None:
    async with box.database.write() as session:
        lots = await credits.open_lots(session, PREPAID)
        if not lots:
            return
        lot = rng.choice(lots)
        amount_nano = rng.randint(1, lot.amount_nano)
        await credits.take_back(
            session,
            source=lot.source,
            amount_nano=amount_nano,
            key=f"refund:{name}",
            kind="refund",
            to_account=STRIPE_CLEARING,
        )
    log.write("refunded", name, amount_nano)


async def _expire(box: Box, log: Log, rng: random.Random, name: str) -> None:
    async with box.database.read() as session:
        due = await credits.due_lots(session, clock.now())
    for lot_id in due:
        async with box.database.write() as session:
            await credits.expire_due(session, lot_id)


async def _limit(box: Box, log: Log, rng: random.Random, name: str) -> None:
    async with box.database.write() as session:
        account = await read_account(session, LIMITED, "usd")
        limit_nano = account.owed_nano + account.held_nano + rng.randint(0, 60_000)
        await set_spending_limit(session, LIMITED, limit_nano, "usd")


async def _reprice(box: Box, log: Log, rng: random.Random, name: str) -> None:
    if rng.random() < 0.7:
        return
    items = box.prices.active.items
    async with box.database.write() as session:
        await change_prices(session, items, "usd")
    await box.prices.refresh()
