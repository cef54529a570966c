"""An account writer on the test's database, and quick settlements."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest

from app.billing.accounts import AccountWriter
from app.billing.prices import FIRST_PRICES, Rates
from app.billing.rating import Settlement, rate
from app.metering.records import AdmitRecord, Outcome, Usage
from app.settings import Settings

ORGANIZATION = "org_1"
RATES = Rates("pb_1", "usd", FIRST_PRICES)


@pytest.fixture
async def accounts(settings: Settings) -> AsyncIterator[AccountWriter]:
    settled: list[str] = []
    is_settled = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_settled(request_ids: list[str]) -> None:
        settled.extend(request_ids)
        loop.call_soon_threadsafe(is_settled.set)

    accounts = AccountWriter(settings.sync_database_url, on_settled=on_settled)
    accounts.settled_ids = settled  # type: ignore[attr-defined]
    accounts.is_settled = is_settled  # type: ignore[attr-defined]
    await accounts.start("jnl_test")
    yield accounts
    await accounts.close()


@pytest.fixture
def settlement() -> Callable[..., Settlement]:
    def make(
        request_id: str,
        output_tokens: int = 1_000,
        organization_id: str = ORGANIZATION,
        outcome: Outcome = "completed",
        endpoint_name: str = "tiny",
        api_key_id: str = "key_1",
        finished_at_ns: int | None = None,
        cached_tokens: int = 0,
    ) -> Settlement:
        at_ns = time.time_ns() if finished_at_ns is None else finished_at_ns
        admitted = AdmitRecord(
            request_id,
            organization_id,
            api_key_id,
            f"name of {api_key_id}",
            endpoint_name,
            1,
            "/v1/completions",
            "decoder",
            "standard",
            "pb_1",
            at_ns - 5_000_000,
        )
        usage = Usage(
            admitted=admitted,
            outcome=outcome,
            finish_reason="stop",
            input_tokens=100,
            cached_tokens=cached_tokens,
            output_tokens=output_tokens,
            device_ms=3,
            finished_at_ns=at_ns,
            first_token_ns=1_000_000,
        )
        return rate(usage, RATES)

    return make
