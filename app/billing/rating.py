"""What usage costs: quantities times prices, in integers, rounded once per line.

Owns the bound that a hold needs and the lines of a finished request. Looks nothing up.
"""

import math
from collections.abc import Mapping

import msgspec

from app.billing.prices import Price, Rates
from app.core.money import price_of
from app.metering.records import Usage
from runtime.protocol import Kind

# What a kind of program is charged for. The rest of what is counted is recorded free of charge:
# a decoder's device time is already in the price of its tokens.
BILLED: dict[Kind, frozenset[str]] = {
    "decoder": frozenset({"input", "cached_input", "output", "request"}),
    "embedder": frozenset({"input", "cached_input", "request"}),
    "tensor": frozenset({"request", "device_ms"}),
}
NO_PRICE = Price(0, 1)
UNKNOWN_DEVICE_MS = 1000  # held for a tensor program whose build measured nothing
DEVICE_MS_MARGIN = 4  # times the slowest batch seen at build


class Line(msgspec.Struct, frozen=True):
    """One dimension of a request: quantity x price = amount. A waived line keeps its amount at
    zero, its quantity and its price."""

    dimension: str
    quantity: int
    price_nano: int
    unit_scale: int
    amount_nano: int
    disposition: str


class Settlement(msgspec.Struct, frozen=True):
    """All that one finished request writes to the database."""

    usage: Usage
    currency: str
    lines: list[Line]
    amount_nano: int
    attempt: int = 1

    @property
    def request_id(self) -> str:
        return self.usage.admitted.request_id

    @property
    def event_id(self) -> str:
        return f"{self.request_id}:{self.attempt}"


def decoder_worst_case(
    rates: Rates, num_prompt_tokens: int, max_tokens: int, num_choices: int
) -> int:
    """Nano-units of a request of which nothing is cached and every choice runs to its limit."""
    input_rate = max(
        (rates.prices.get(name, NO_PRICE) for name in ("input", "cached_input")),
        key=lambda price: price_of(num_prompt_tokens, price.price_nano, price.unit_scale),
    )
    return (
        _charge(num_prompt_tokens, input_rate)
        # Each of the two input lines may round up by half a nano-unit.
        + 1
        + _charge(max_tokens * num_choices, rates.prices.get("output", NO_PRICE))
        + _charge(1, rates.prices.get("request", NO_PRICE))
    )


def embedder_worst_case(rates: Rates, num_prompt_tokens: int) -> int:
    """Nano-units of a request for embeddings: its tokens are counted before it runs, and none is
    found in a cache."""
    return _charge(num_prompt_tokens, rates.prices.get("input", NO_PRICE)) + _charge(
        1, rates.prices.get("request", NO_PRICE)
    )


def tensor_worst_case(rates: Rates, max_device_ms: int) -> int:
    """Nano-units of a prediction that takes as much device time as is held for it."""
    return _charge(max_device_ms, rates.prices.get("device_ms", NO_PRICE)) + _charge(
        1, rates.prices.get("request", NO_PRICE)
    )


def held_device_ms(measured_max_ms: float) -> int:
    """Device time to hold for one prediction, from the slowest full batch of the build."""
    if not 0 < measured_max_ms < math.inf:
        return UNKNOWN_DEVICE_MS
    return math.ceil(measured_max_ms * DEVICE_MS_MARGIN) + 1


def slowest_row_ms(measured: Mapping[int, float], size: int) -> float:
    """Of one row of this size, by what the build measured at others: at the least size that covers
    it. Beyond the largest, time grows with the square of the size at most, as attention's does."""
    largest = max(measured)
    covering = min((each for each in measured if each >= size), default=largest)
    slowest_ms = max(ms for each, ms in measured.items() if each <= covering)
    return slowest_ms * size**2 / largest**2 if size > largest else slowest_ms


def rate(usage: Usage, rates: Rates) -> Settlement:
    """The lines of one request under the prices it was admitted with."""
    quantities = {
        "input": usage.input_tokens,
        "cached_input": usage.cached_tokens,
        "output": usage.output_tokens,
        "request": 1,
        "device_ms": usage.device_ms,
    }
    billed = BILLED[usage.admitted.kind]
    lines = [
        _line(dimension, quantity, rates, usage, is_billed=dimension in billed)
        for dimension, quantity in quantities.items()
        if quantity
    ]
    amount_nano = sum(line.amount_nano for line in lines)
    return Settlement(usage, rates.currency, lines, amount_nano)


def _line(dimension: str, quantity: int, rates: Rates, usage: Usage, *, is_billed: bool) -> Line:
    price = rates.prices.get(dimension) if is_billed else None
    if price is None:
        return Line(dimension, quantity, 0, 1, 0, "free")
    if usage.is_waived:
        return Line(dimension, quantity, price.price_nano, price.unit_scale, 0, "waived")
    amount = _charge(quantity, price)
    return Line(dimension, quantity, price.price_nano, price.unit_scale, amount, "billed")


def _charge(quantity: int, price: Price) -> int:
    return price_of(quantity, price.price_nano, price.unit_scale)
