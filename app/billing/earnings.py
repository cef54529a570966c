"""What the box earns: billed usage against the device time that it took, by model.

Owns what counts as cost, margin and cost per million tokens, and how a price is suggested. All
figures come from hourly sums of usage; time is what requests used, to the millisecond begun.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.costs import cost_of
from app.billing.prices import Book, Price
from app.core import clock
from app.core.money import price_of
from app.metering.closed_hours import read_in_parts
from app.metering.hours import hour_of, start_of
from app.metering.tables import UsageHour, UsageSeries

MILLION = 1_000_000
MIN_DEVICE_MS = 60_000  # of measured use, below which no price is suggested
MIN_REQUESTS = 100
PROMPT = ("input", "cached_input", "cache_write")


class Target(msgspec.Struct, frozen=True):
    """What a suggested price is to bring: of each device hour `utilisation_percent` is sold, and
    on top of what the device costs comes `margin_percent` of that."""

    utilisation_percent: int = 50
    margin_percent: int = 30

    def required_nano(self, cost_nano: int) -> int:
        """What the same use has to bring, rounded up."""
        return -(-cost_nano * (100 + self.margin_percent) // self.utilisation_percent)


class SuggestedPrice(msgspec.Struct, frozen=True):
    """One dimension of one class, per `unit_scale`, beside what it is now."""

    dimension: str
    service_class: str
    price_nano: int
    current_nano: int
    unit_scale: int


class Suggestion(msgspec.Struct, frozen=True, kw_only=True):
    """Prices in the proportions of those in force, at which this period's use would have brought
    `required_nano`. `listed_nano` is what it brings at the prices in force. Where `prices` is
    empty, `reason` says why."""

    required_nano: int = 0
    listed_nano: int = 0
    prices: list[SuggestedPrice] = []
    reason: str = ""


class ModelEarnings(msgspec.Struct, frozen=True, kw_only=True):
    """One model in the period. `revenue_nano` was billed; `waived_nano` is what waived usage
    would have cost. `device_ms` counts all use, also what was free or waived. Costs are None while
    an hour of the device has no price. Of the costs per million tokens, one divides all of the
    cost by the output alone, the other by prompt (cached or not) and output together."""

    model: str
    num_requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    device_ms: int
    revenue_nano: int
    waived_nano: int
    cost_nano: int | None = None
    margin_nano: int | None = None
    cost_per_million_output_nano: int | None = None
    cost_per_million_tokens_nano: int | None = None
    suggestion: Suggestion = Suggestion()


class Earnings(msgspec.Struct, frozen=True, kw_only=True):
    """All models. `box_ms` is the time that the box had in the period, times its devices;
    `box_cost_nano` what that cost, used or not, and `box_margin_nano` what is left of the revenue
    after it."""

    start: datetime = msgspec.field(name="from")
    end: datetime = msgspec.field(name="to")
    currency: str
    device: str
    hour_nano: int | None
    target: Target
    models: list[ModelEarnings]
    total: ModelEarnings
    box_ms: int
    box_cost_nano: int | None
    box_margin_nano: int | None

    @property
    def used_percent(self) -> int:
        return 100 * self.total.device_ms // self.box_ms if self.box_ms else 0


class Use(NamedTuple):
    """Sums of one model, class, dimension and price."""

    model: str
    service_class: str
    dimension: str
    disposition: str
    price_nano: int
    unit_scale: int
    quantity: int
    amount_nano: int


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """Which period, and what is known beside usage. `end` is not after now, `start` not before
    the box."""

    start: datetime
    end: datetime
    currency: str
    device: str
    num_devices: int
    hour_nano: int | None
    target: Target


async def read_uses(session: AsyncSession, start: datetime, end: datetime) -> list[Use]:
    """Of all organizations, in whole hours of posting."""
    key = (
        UsageSeries.endpoint_name,
        UsageSeries.service_class,
        UsageSeries.dimension,
        UsageSeries.disposition,
        UsageSeries.price_nano,
        UsageSeries.unit_scale,
    )

    async def read(first: int, until: int) -> list[tuple[Any, ...]]:
        hours = (
            select(
                UsageHour.series_id,
                func.sum(UsageHour.quantity).label("quantity"),
                func.sum(UsageHour.amount_nano).label("amount_nano"),
            )
            .where(
                # Each series by itself: for an hour SQLite would read all of the table.
                UsageHour.series_id.in_(select(UsageSeries.id)),
                UsageHour.hour >= first,
                UsageHour.hour < until,
            )
            .group_by(UsageHour.series_id)
            .subquery()
        )
        rows = await session.execute(
            select(*key, func.sum(hours.c.quantity), func.sum(hours.c.amount_nano))
            .join(hours, hours.c.series_id == UsageSeries.id)
            .group_by(*key)
        )
        return [tuple(row) for row in rows]

    sums: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0])
    parts = await read_in_parts(
        session, ("uses",), hour_of(start), _hour_after(end), read, clock.now()
    )
    for *named, quantity, amount_nano in parts:
        own = sums[tuple(named)]
        own[0] += int(quantity)
        own[1] += int(amount_nano)
    return [Use._make((*named, *numbers)) for named, numbers in sums.items()]


def _hour_after(end: datetime) -> int:
    """The first hour that begins at `end` or later."""
    hour = hour_of(end)
    return hour if start_of(hour) == end else hour + 1


def earnings(uses: Sequence[Use], question: Question, book: Book) -> Earnings:
    """The dearest models first. Pure."""
    by_model: dict[str, list[Use]] = defaultdict(list)
    for use in uses:
        by_model[use.model].append(use)
    models = [_of_model(name, own, question, book) for name, own in by_model.items()]
    total = _of_model("", uses, question, None)
    box_ms = _ms_between(question.start, question.end) * question.num_devices
    box_cost = None if question.hour_nano is None else cost_of(box_ms, question.hour_nano)
    return Earnings(
        start=question.start,
        end=question.end,
        currency=question.currency,
        device=question.device,
        hour_nano=question.hour_nano,
        target=question.target,
        models=sorted(models, key=lambda each: (-each.revenue_nano, -each.device_ms, each.model)),
        total=total,
        box_ms=box_ms,
        box_cost_nano=box_cost,
        box_margin_nano=None if box_cost is None else total.revenue_nano - box_cost,
    )


def _ms_between(start: datetime, end: datetime) -> int:
    span = end - start
    return max(0, (span.days * 86_400 + span.seconds) * 1000)  # of whole seconds


def _of_model(
    name: str, uses: Sequence[Use], question: Question, book: Book | None
) -> ModelEarnings:
    quantities: dict[str, int] = defaultdict(int)
    for use in uses:
        quantities[use.dimension] += use.quantity
    prompt = sum(quantities[dimension] for dimension in PROMPT)
    output, device_ms = quantities["output"], quantities["device_ms"]
    revenue = sum(use.amount_nano for use in uses)
    found = ModelEarnings(
        model=name,
        num_requests=quantities["request"],
        prompt_tokens=prompt,
        cached_tokens=quantities["cached_input"],
        output_tokens=output,
        device_ms=device_ms,
        revenue_nano=revenue,
        waived_nano=sum(
            price_of(use.quantity, use.price_nano, use.unit_scale)
            for use in uses
            if use.disposition == "waived"
        ),
    )
    if question.hour_nano is None:
        return found
    cost = cost_of(device_ms, question.hour_nano)
    tokens = prompt + output
    return msgspec.structs.replace(
        found,
        cost_nano=cost,
        margin_nano=revenue - cost,
        cost_per_million_output_nano=cost * MILLION // output if output else None,
        cost_per_million_tokens_nano=cost * MILLION // tokens if tokens else None,
        suggestion=Suggestion() if book is None else suggest(found, cost, uses, question, book),
    )


# --- what a price should be -------------------------------------------------------------


def suggest(
    model: ModelEarnings, cost_nano: int, uses: Sequence[Use], question: Question, book: Book
) -> Suggestion:
    """What was billed is to bring what all use cost: all prices of the model move by one factor,
    so that their proportions stay the operator's."""
    required = question.target.required_nano(cost_nano)
    if model.device_ms < MIN_DEVICE_MS or model.num_requests < MIN_REQUESTS:
        return Suggestion(
            required_nano=required,
            reason=f"Too little use to say: a price is suggested from {MIN_REQUESTS} requests and "
            f"{MIN_DEVICE_MS // 1000} seconds of device time on.",
        )
    rates = {
        service_class: book.rates(model.model, service_class).prices
        for service_class in sorted({item.service_class for item in book.items} | {"standard"})
    }
    billed = [use for use in uses if use.disposition == "billed"]
    listed = _listed(billed, rates)
    if not listed:
        return Suggestion(
            required_nano=required,
            reason="Its use is free at the prices in force, so they have no proportions to keep.",
        )
    dimensions = {use.dimension for use in billed}
    prices = [
        SuggestedPrice(
            dimension,
            service_class,
            -(-price.price_nano * required // listed),
            price.price_nano,
            price.unit_scale,
        )
        for service_class, own in rates.items()
        for dimension, price in own.items()
        if dimension in dimensions and price.price_nano
    ]
    return Suggestion(required_nano=required, listed_nano=listed, prices=prices)


def _listed(uses: Sequence[Use], rates: Mapping[str, Mapping[str, Price]]) -> int:
    """What the uses come to at the prices in force, for short prompts."""
    total = 0
    for use in uses:
        price = rates.get(use.service_class, rates["standard"]).get(use.dimension)
        if price is not None:
            total += price_of(use.quantity, price.price_nano, price.unit_scale)
    return total
