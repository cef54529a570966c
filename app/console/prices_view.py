"""How a price book reads: amounts per million tokens or per hour, by model, with classes beside
each other."""

from collections.abc import Iterable, Sequence
from datetime import datetime

import msgspec

from app.billing.policy import DEFAULTS
from app.billing.price_changes import SERVICE_CLASSES, write_minute
from app.billing.prices import ANY_ENDPOINT, Book, Item
from app.billing.repricing import ItemChange, Repricing
from app.core.money import format_exact
from app.metering.tables import DIMENSIONS

DIMENSION_NAMES = {
    "input": "Input",
    "cached_input": "Cached input",
    "cache_write": "Cache write",
    "kv_device": "KV kept on the device",
    "kv_host": "KV kept in memory",
    "kv_disk": "KV kept on disk",
    "output": "Output",
    "request": "Requests",
    "device_ms": "Device time",
}
# What people quote prices by: how many of what is counted.
_TOKENS = (1_000_000, "million tokens")
_KEPT = (3_600_000_000, "million tokens for an hour")
UNITS = {
    "input": _TOKENS,
    "cached_input": _TOKENS,
    "cache_write": _TOKENS,
    "output": _TOKENS,
    "kv_device": _KEPT,
    "kv_host": _KEPT,
    "kv_disk": _KEPT,
    "request": (1_000_000, "million requests"),
    "device_ms": (3_600_000, "hour"),
}
OUTCOME_NAMES = {
    "completed": "Completed",
    "cancelled": "Cancelled by the caller",
    "failed": "Failed by our fault",
    "lost": "Lost when the box went down",
}


class PriceRow(msgspec.Struct, frozen=True):
    """One dimension under one condition; `amounts` by class, None where another price holds."""

    name: str
    condition: str
    unit: str
    amounts: list[str | None]


class ModelPrices(msgspec.Struct, frozen=True):
    """The prices of one endpoint, or of all that have none of their own."""

    title: str
    is_default: bool
    classes: list[str]
    rows: list[PriceRow]


class Change(msgspec.Struct, frozen=True):
    """One difference between two books, in words."""

    kind: str
    name: str
    before: str
    after: str


def read_book(book: Book) -> list[ModelPrices]:
    """Prices for any model first."""
    names = sorted(
        {item.endpoint_name for item in book.items}, key=lambda n: (n != ANY_ENDPOINT, n)
    )
    return [
        _model_prices(name, [i for i in book.items if i.endpoint_name == name], book.currency)
        for name in names
    ]


def _model_prices(name: str, items: Sequence[Item], currency: str) -> ModelPrices:
    present = {item.service_class for item in items}
    classes = [each for each in SERVICE_CLASSES if each in present]
    rows: dict[tuple[int, int, bool, int, int, str], dict[str, str]] = {}
    for item in items:
        price, unit = amount_and_unit(item, currency)
        window = (not item.is_all_day, item.from_minute, item.until_minute)
        key = (DIMENSIONS.index(item.dimension), item.above_tokens, *window, unit)
        rows.setdefault(key, {})[item.service_class] = price
    return ModelPrices(
        title_of(name),
        name == ANY_ENDPOINT,
        [each.capitalize() for each in classes],
        [
            PriceRow(
                DIMENSION_NAMES[DIMENSIONS[place]],
                _condition(above, start, until),
                unit,
                [prices.get(each) for each in classes],
            )
            for (place, above, _, start, until, unit), prices in sorted(rows.items())
        ],
    )


def title_of(endpoint_name: str) -> str:
    return "Any model" if endpoint_name == ANY_ENDPOINT else endpoint_name


def amount_and_unit(item: Item, currency: str) -> tuple[str, str]:
    """`$0.10`, `million tokens`; where that would not be exact, as the book has it."""
    size, unit = UNITS[item.dimension]
    amount_nano, rest = divmod(item.price_nano * size, item.unit_scale)
    if rest:
        return format_exact(item.price_nano, currency), f"{item.unit_scale:,} counted"
    return format_exact(amount_nano, currency), unit


def _condition(above_tokens: int, from_minute: int, until_minute: int) -> str:
    """`prompts above 200,000 tokens, 00:30 to 16:30 UTC`."""
    parts: list[str] = []
    if above_tokens:
        parts.append(f"prompts above {above_tokens:,} tokens")
    if (from_minute, until_minute) != (0, 1440):
        parts.append(f"{write_minute(from_minute)} to {write_minute(until_minute)} UTC")
    return ", ".join(parts)


def describe_changes(changes: Iterable[ItemChange], currency: str) -> list[Change]:
    """In the order of the books."""

    def price(item: Item | None) -> str:
        return " per ".join(amount_and_unit(item, currency)) if item else ""

    return [
        Change(
            change.kind,
            _name(change.item),
            price(change.old),
            "" if change.kind == "removed" else price(change.item),
        )
        for change in changes
    ]


def _name(item: Item) -> str:
    parts = [
        title_of(item.endpoint_name),
        DIMENSION_NAMES[item.dimension].lower(),
        "" if item.service_class == "standard" else item.service_class,
        _condition(item.above_tokens, item.from_minute, item.until_minute),
    ]
    return ", ".join(part for part in parts if part)


def describe_gaps(book: Book) -> list[str]:
    """What is charged at some times or for some prompts only."""
    return [
        f"{_name(msgspec.structs.replace(gap, above_tokens=0, from_minute=0, until_minute=1440))}"
        f" ({_condition(gap.above_tokens, gap.from_minute, gap.until_minute)})"
        for gap in book.gaps()
    ]


def describe_policy(policy: dict[str, str]) -> list[tuple[str, str]]:
    """What happens to each outcome, and the exceptions by dimension."""
    lines = [(OUTCOME_NAMES[name], policy.get(name, DEFAULTS[name])) for name in DEFAULTS]
    for key, how in sorted(policy.items()):
        outcome, dot, dimension = key.partition(".")
        if dot:
            lines.append((f"{OUTCOME_NAMES[outcome]}: {DIMENSION_NAMES[dimension].lower()}", how))
    return lines


def describe_policy_changes(old: dict[str, str], new: dict[str, str]) -> list[Change]:
    """What is charged otherwise under another policy."""
    before, after = dict(describe_policy(old)), dict(describe_policy(new))
    as_a_whole = "as the rest of its outcome"
    return [
        Change("changed", name, before.get(name, as_a_whole), after.get(name, as_a_whole))
        for name in before | after
        if before.get(name) != after.get(name)
    ]


def period_of(repricing: Repricing) -> str:
    """`October 2026`, or what there is of a month that is not over."""
    since, until = repricing.since, repricing.until
    return f"{since:%B %Y}{'' if until.day == 1 else ' so far'}"


def starts(effective_at: datetime | None) -> str:
    return f"{effective_at:%Y-%m-%d %H:%M} UTC" if effective_at else "at once"
