"""What usage costs: quantities times prices, in integers, rounded once per line.

Owns the bound that a hold needs and the lines of a finished request. Looks nothing up.
"""

import math
from collections.abc import Container, Mapping

import msgspec

from app.billing.policy import WAIVED, Policy, disposition
from app.billing.prices import Price, Rates
from app.core.money import price_of
from app.metering.records import Usage
from app.metering.tables import DIMENSIONS
from runtime.protocol import Kind

# The prompt is divided among these: what one of them counts, the others do not.
PROMPT_DIMENSIONS: tuple[str, ...] = ("input", "cached_input", "cache_write")
TOKEN_DIMENSIONS = frozenset({*PROMPT_DIMENSIONS, "output"})
# What a kind of program is charged for. The rest of what is counted is recorded free of charge:
# a decoder's device time is already in the price of its tokens.
BILLED: dict[Kind, frozenset[str]] = {
    "decoder": frozenset(DIMENSIONS) - {"device_ms"},
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
    """All that one finished request writes to the database. `saved_nano`: how much more its cached
    tokens would have cost at the input price; nothing where they were waived."""

    usage: Usage
    currency: str
    lines: list[Line]
    amount_nano: int
    attempt: int = 1
    saved_nano: int = 0

    @property
    def request_id(self) -> str:
        return self.usage.admitted.request_id

    @property
    def event_id(self) -> str:
        return f"{self.request_id}:{self.attempt}"


def worst_case(rates: Rates, kind: Kind, num_prompt_tokens: int, limits: Mapping[str, int]) -> int:
    """Nano-units that no outcome can exceed: the whole prompt at the dearest of its prices, and of
    every other dimension as much as `limits` allows. What `limits` leaves out must not be used.
    No policy is taken into account: waiving only makes it less."""
    billed = BILLED[kind]
    prompt = [
        rates.prices[name] for name in PROMPT_DIMENSIONS if name in billed and name in rates.prices
    ]
    # Each line of the prompt may round up by half a nano-unit, and the bound itself down by half.
    slack = (len(prompt) + 1) // 2 if len(prompt) > 1 else 0
    dearest = max((_charge(num_prompt_tokens, price) for price in prompt), default=0)
    return (
        dearest
        + slack
        + sum(
            _charge(limit, rates.prices.get(name, NO_PRICE))
            for name, limit in limits.items()
            if name in billed
        )
    )


def decoder_worst_case(
    rates: Rates, num_prompt_tokens: int, max_tokens: int, num_choices: int
) -> int:
    """Nano-units of a request of which nothing is cached and every choice runs to its limit."""
    limits = {"output": max_tokens * num_choices, "request": 1}
    return worst_case(rates, "decoder", num_prompt_tokens, limits)


def embedder_worst_case(rates: Rates, num_prompt_tokens: int) -> int:
    """Nano-units of a request for embeddings: its tokens are counted before it runs."""
    return worst_case(rates, "embedder", num_prompt_tokens, {"request": 1})


def tensor_worst_case(rates: Rates, max_device_ms: int) -> int:
    """Nano-units of a prediction that takes as much device time as is held for it."""
    return worst_case(rates, "tensor", 0, {"request": 1, "device_ms": max_device_ms})


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
    lines = lines_of(quantities, usage.outcome, BILLED[usage.admitted.kind], rates)
    amount_nano = sum(line.amount_nano for line in lines)
    saved_nano = sum(_saved_nano(line, rates) for line in lines if line.dimension == "cached_input")
    return Settlement(usage, rates.currency, lines, amount_nano, saved_nano=saved_nano)


def _saved_nano(cached: Line, rates: Rates) -> int:
    """At the price in force, as a prompt that was cached to its end has no line of input."""
    if cached.disposition != "billed":
        return 0
    fresh = rates.prices.get("input", NO_PRICE)
    return _charge(cached.quantity, fresh) - cached.amount_nano


def lines_of(
    quantities: Mapping[str, int], outcome: str, billed: Container[str], rates: Rates
) -> list[Line]:
    """One line per dimension of which anything was used. What is not in `billed`, or has no
    price, is free."""
    return [
        _line(dimension, quantity, outcome, rates.prices.get(dimension), rates.policy)
        if dimension in billed
        else _line(dimension, quantity, outcome, None, rates.policy)
        for dimension, quantity in quantities.items()
        if quantity
    ]


def _line(dimension: str, quantity: int, outcome: str, price: Price | None, policy: Policy) -> Line:
    if price is None:
        return Line(dimension, quantity, 0, 1, 0, "free")
    how = disposition(policy, outcome, dimension)
    amount = 0 if how == WAIVED else _charge(quantity, price)
    return Line(dimension, quantity, price.price_nano, price.unit_scale, amount, how)


def _charge(quantity: int, price: Price) -> int:
    return price_of(quantity, price.price_nano, price.unit_scale)
