"""What the page Usage and spend shows, from metering and billing."""

from collections.abc import Sequence
from datetime import date, datetime, timedelta

import msgspec
from markupsafe import Markup
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.service import Account, read_account
from app.console.charts import Bar, stacked_bars
from app.core import clock
from app.core.money import format_nano
from app.metering.activity import recent_events
from app.metering.service import UsageRow, read_usage_days
from app.metering.tables import UsageEvent

NUM_RECENT = 25
# The chart's series: its name, and the dimensions it adds up. What no other names is in the last.
SERIES = (
    ("Input", ("input", "cache_write")),
    ("Cached input", ("cached_input",)),
    ("Output", ("output",)),
    ("Device time and requests", ()),
)
DIMENSION_NAMES = {
    "input": "Input tokens",
    "cached_input": "Cached input tokens",
    "cache_write": "Tokens written to the cache",
    "kv_device": "KV kept on the device, token-seconds",
    "kv_host": "KV kept in memory, token-seconds",
    "kv_disk": "KV kept on disk, token-seconds",
    "output": "Output tokens",
    "request": "Requests",
    "device_ms": "Device time, ms",
}


class DimensionRow(msgspec.Struct, frozen=True):
    name: str
    quantity: int
    amount_nano: int


class UsageView(msgspec.Struct, frozen=True, kw_only=True):
    """`start` and `end` are the first and last day shown."""

    start: datetime
    end: datetime
    num_days: int
    account: Account
    by_day: list[UsageRow]
    by_model: list[UsageRow]
    by_key: list[UsageRow]
    by_dimension: list[DimensionRow]
    daily_spend: dict[str, dict[str, int]]
    recent: Sequence[UsageEvent]
    saved_nano: int

    @property
    def series(self) -> list[str]:
        return [name for name, _ in SERIES]

    @property
    def spent_nano(self) -> int:
        return sum(row.amount_nano for row in self.by_model)

    @property
    def num_requests(self) -> int:
        return sum(row.requests for row in self.by_model)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(row.input + row.cached_input for row in self.by_model)

    @property
    def num_cached_tokens(self) -> int:
        return sum(row.cached_input for row in self.by_model)

    @property
    def num_output_tokens(self) -> int:
        return sum(row.output for row in self.by_model)

    @property
    def cached_percent(self) -> int | None:
        if not self.num_prompt_tokens:
            return None
        return 100 * self.num_cached_tokens // self.num_prompt_tokens


async def read_usage(
    session: AsyncSession, organization_id: str, num_days: int, currency: str
) -> UsageView:
    """Usage of the last `num_days` days, today included; days begin at midnight UTC."""
    today = clock.now().replace(hour=0, minute=0, second=0, microsecond=0)
    start, end = today - timedelta(days=num_days - 1), today + timedelta(days=1)
    cells = await read_usage_days(session, organization_id, start, end)
    quantities = cells.quantities()
    return UsageView(
        start=start,
        end=today,
        num_days=num_days,
        account=await read_account(session, organization_id, currency),
        by_day=cells.rows("day"),
        by_model=cells.rows("model"),
        by_key=cells.rows("key"),
        by_dimension=[
            DimensionRow(
                DIMENSION_NAMES.get(row.group, row.group), quantities[row.group], row.amount_nano
            )
            for row in cells.rows("dimension")
        ],
        daily_spend=cells.spend_by_day(),
        recent=await recent_events(session, organization_id, start, end, NUM_RECENT),
        saved_nano=cells.saved_nano,
    )


def spend_chart(view: UsageView) -> Markup:
    """Amounts by day, stacked by what they were for; days without usage stay empty."""
    places = _places(max((sum(day.values()) for day in view.daily_spend.values()), default=0))
    bars = [
        _bar(day, view.daily_spend.get(day.isoformat(), {}))
        for day in _days(view.start.date(), view.num_days)
    ]
    return stacked_bars(
        bars,
        series=view.series,
        describe=lambda nano: format_nano(nano, view.account.currency, places),
        title=f"Spend by day over {view.num_days} days",
    )


def _bar(day: date, amounts: dict[str, int]) -> Bar:
    named = {dimension for _, dimensions in SERIES for dimension in dimensions}
    rest = sum(amount for dimension, amount in amounts.items() if dimension not in named)
    parts = [sum(amounts.get(name, 0) for name in dimensions) for _, dimensions in SERIES[:-1]]
    return Bar(label=f"{day.day} {day:%b}", title=f"{day.day} {day:%b %Y}", parts=(*parts, rest))


def _days(first: date, num_days: int) -> list[date]:
    return [first + timedelta(days=index) for index in range(num_days)]


def _places(largest_nano: int) -> int:
    """Decimals that tell the chart's grid lines apart."""
    places = 2
    while places < 9 and largest_nano * 10**places < 40 * 10**9:
        places += 1
    return places
