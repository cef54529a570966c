"""A process that spends: its share of the requests, all at once, through an account writer."""

import asyncio
import sys
import time
from pathlib import Path

import msgspec

from app.billing import credits
from app.billing.accounts import AccountWriter
from app.billing.budgets import set_budget
from app.billing.ledger import STRIPE_CLEARING
from app.billing.rating import Line, Settlement
from app.billing.service import set_spending_limit
from app.core.database import Database
from app.core.errors import PaymentRequired
from app.metering.records import AdmitRecord, Usage
from app.settings import Settings

ORGANIZATION = "org_1"
DOLLAR = 10**9
KEYS = ("key_0", "key_1", "key_2", "key_3")
ENDPOINTS = ("tiny", "large")


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """`share_percent` of the hold is what a request costs in the end; it ends if `is_settled`."""

    url: str
    journal_id: str
    first: int
    num_requests: int
    path: str
    price_nano: int
    is_settled: bool
    share_percent: int = 100

    def as_argument(self) -> str:
        return msgspec.json.encode(self).decode()


async def prepare(url: str, *, has_budgets: bool = False) -> None:
    """One prepaid dollar, in two lots of different kinds."""
    database = Database(Settings(database_url=url).async_database_url)
    async with database.write() as session:
        await set_spending_limit(session, ORGANIZATION, 0, "usd")
        for kind, amount_nano in (("paid", 600_000_000), ("promotional", 400_000_000)):
            await credits.add_lot(
                session,
                ORGANIZATION,
                kind,
                amount_nano,
                source=kind,
                currency="usd",
                from_account=STRIPE_CLEARING,
            )
        if has_budgets:
            wanted = [("key", key, "day", 50_000_000) for key in KEYS]
            wanted += [("organization", "", "month", 150_000_000)]
            wanted += [("model", "tiny", "day", 120_000_000)]
            for scope, subject, period, limit_nano in wanted:
                await set_budget(
                    session,
                    ORGANIZATION,
                    scope=scope,
                    subject=subject,
                    subject_name=subject,
                    period=period,
                    limit_nano=limit_nano,
                )
    await database.close()


def settlement(request_id: str, key: str, endpoint: str, amount_nano: int) -> Settlement:
    at_ns = time.time_ns()
    admitted = AdmitRecord(
        request_id,
        ORGANIZATION,
        key,
        key,
        endpoint,
        1,
        "/v1/completions",
        "decoder",
        "standard",
        "pb_1",
        at_ns - 1_000,
    )
    usage = Usage(
        admitted=admitted,
        outcome="completed",
        finish_reason="stop",
        input_tokens=0,
        cached_tokens=0,
        output_tokens=0,
        device_ms=0,
        finished_at_ns=at_ns,
        first_token_ns=None,
    )
    line = Line("request", 1, amount_nano, 1, amount_nano, "billed")
    return Settlement(usage, "usd", [line], amount_nano)


async def spend(share: Share) -> None:
    url = Settings(database_url=share.url).sync_database_url
    accounts = AccountWriter(url)
    await accounts.start(share.journal_id)
    told: dict[str, str] = {}

    async def ask(number: int) -> None:
        request_id, key = f"req_{number}", KEYS[number % len(KEYS)]
        endpoint = ENDPOINTS[number // len(KEYS) % len(ENDPOINTS)]
        await asyncio.sleep(number % 7 * 0.003)
        try:
            await accounts.hold(
                request_id,
                ORGANIZATION,
                share.price_nano,
                api_key_id=key,
                endpoint_name=endpoint,
            )
        except PaymentRequired as error:
            told[request_id] = f"{error.code} {error.message}"
            return
        told[request_id] = "ok"
        if share.is_settled:
            await asyncio.sleep(number % 5 * 0.004)
            spent_nano = share.price_nano * share.share_percent // 100
            accounts.settle(settlement(request_id, key, endpoint, spent_nano))

    numbers = range(share.first, share.first + share.num_requests)
    await asyncio.gather(*(ask(number) for number in numbers))
    await accounts.close()
    text = "".join(f"{name} {answer}\n" for name, answer in told.items())
    await asyncio.to_thread(Path(share.path).write_text, text)


if __name__ == "__main__":
    asyncio.run(spend(msgspec.json.decode(sys.argv[1], type=Share)))
