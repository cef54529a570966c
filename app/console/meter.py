"""What a running request has used so far and what that costs, and the same once it is settled.

Both are worked out as the settlement does it, so that the meter ends where the receipt begins.
"""

import asyncio
import time

import msgspec

from app.api.relay import Relay
from app.billing.prices import PriceTable
from app.billing.rating import rate
from app.console.templating import PageRequest
from app.core.database import Database
from app.core.errors import NotFound
from app.core.money import format_nano
from app.metering.receipts import Receipt, read_receipt
from app.metering.records import Tally

PLACES = 9  # to the nano-unit: a token costs little
WAIT_SECONDS = 5.0
LOOK_SECONDS = 0.1


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens, and money as people read it. `num_input` counts the whole prompt, with the
    `num_cached` of it that the cache held. `outcome` is empty while the request runs."""

    request_id: str
    num_input: int
    num_cached: int
    num_output: int
    device_ms: int
    amount: str
    outcome: str = ""


def reading(tally: Tally, prices: PriceTable) -> Reading:
    """Of a request that is running."""
    admitted = tally.admitted
    usage = tally.usage("completed", "stop", time.time_ns())
    book = prices.book(admitted.price_book_id)
    assert book is not None, "books are never forgotten"
    rates = book.rates_of(admitted)
    return Reading(
        request_id=admitted.request_id,
        num_input=usage.input_tokens + usage.cached_tokens,
        num_cached=usage.cached_tokens,
        num_output=usage.output_tokens,
        device_ms=usage.device_ms,
        amount=format_nano(rate(usage, rates).amount_nano, rates.currency, PLACES),
    )


async def settled_reading(request: PageRequest, organization_id: str, request_id: str) -> Reading:
    """Of a request that ends now, from its receipt; one that was stopped takes a moment. Raises
    `NotFound` if there is none by then."""
    until = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return await _read(request, organization_id, request_id)
        except NotFound:
            if time.monotonic() > until:
                raise
        await asyncio.sleep(LOOK_SECONDS)


async def _read(request: PageRequest, organization_id: str, request_id: str) -> Reading:
    relay: Relay = request.app.state.relay
    database: Database = request.app.state.database
    await relay.settled()
    async with database.read() as session:
        return reading_of(await read_receipt(session, organization_id, request_id))


def reading_of(receipt: Receipt) -> Reading:
    used = {line.dimension: line.quantity for line in receipt.lines}
    num_cached = used.get("cached_input", 0)
    return Reading(
        request_id=receipt.request_id,
        num_input=used.get("input", 0) + num_cached,
        num_cached=num_cached,
        num_output=used.get("output", 0),
        device_ms=used.get("device_ms", 0),
        amount=format_nano(receipt.amount_nano, receipt.currency, PLACES),
        outcome=receipt.outcome,
    )
