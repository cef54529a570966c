"""What the page Usage shows, added up from one reading of the hourly sums."""

from collections.abc import Callable, Sequence
from datetime import date

import msgspec
from markupsafe import Markup
from sqlalchemy.ext.asyncio import AsyncSession

from app.console.charts import Bar, stacked_bars
from app.console.usage_query import CONSOLE_KEY, UsageQuery
from app.core.money import format_nano
from app.metering.hours import Cell
from app.metering.requests import RequestFilter, read_requests
from app.metering.service import UsageCells, UsageRow, day_of, read_usage_days
from app.metering.tables import UsageEvent
from app.metering.waived import Waived, read_waived

NUM_RECENT = 25
_NAMES: dict[str, Callable[[Cell], str]] = {
    "model": lambda cell: cell.endpoint_name,
    "key": lambda cell: cell.api_key_name,
    "class": lambda cell: cell.service_class,
}
NUM_SERIES = 4
# The chart's series by use: its name, and the dimensions it adds up. What no other names is in the
# last.
USES = (
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


class CachingRow(msgspec.Struct, frozen=True):
    """What one model's caching saved. `num_paid` tokens cost the input price."""

    model: str
    num_paid: int
    num_cached: int
    saved_nano: int

    @property
    def num_prompt(self) -> int:
        return self.num_paid + self.num_cached


class UsageView(msgspec.Struct, frozen=True, kw_only=True):
    """`models` and `keys` (address, name) are what there is to choose from, used in the period."""

    query: UsageQuery
    currency: str
    models: list[str]
    keys: list[tuple[str, str]]
    by_day: list[UsageRow]
    by_model: list[UsageRow]
    by_key: list[UsageRow]
    by_class: list[UsageRow]
    by_dimension: list[DimensionRow]
    caching: list[CachingRow]
    waived: Waived
    recent: Sequence[UsageEvent]
    series: list[str]
    bars: list[Bar]

    @property
    def spent_nano(self) -> int:
        return sum(row.amount_nano for row in self.by_model)

    @property
    def num_requests(self) -> int:
        return sum(row.requests for row in self.by_model)

    @property
    def has_usage(self) -> bool:
        """Requests are counted where they have a price or are recorded; amounts always are."""
        return bool(self.by_model or self.recent)

    @property
    def num_paid_tokens(self) -> int:
        return sum(row.input for row in self.by_model)

    @property
    def num_cached_tokens(self) -> int:
        return sum(row.cached_input for row in self.by_model)

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_paid_tokens + self.num_cached_tokens

    @property
    def num_output_tokens(self) -> int:
        return sum(row.output for row in self.by_model)

    @property
    def cached_percent(self) -> int | None:
        if not self.num_prompt_tokens:
            return None
        return 100 * self.num_cached_tokens // self.num_prompt_tokens

    @property
    def saved_nano(self) -> int:
        return sum(row.saved_nano for row in self.caching)

    @property
    def tables(self) -> list[tuple[str, str, list[UsageRow]]]:
        """Title, what to call a row of it, and by what it groups."""
        return [
            ("By model", "model", self.by_model),
            ("By key", "key", self.by_key),
            ("By class", "class", self.by_class),
        ]


async def read_cells_of(
    session: AsyncSession, organization_id: str, query: UsageQuery
) -> tuple[UsageCells, UsageCells]:
    """All usage of the query's days, and what its filters leave of it."""
    everything = await read_usage_days(session, organization_id, query.start, query.end)
    if not query.is_filtered:
        return everything, everything
    cells = [
        cell
        for cell in everything.cells
        if query.key_id in (None, cell.api_key_id)
        and query.endpoint_name in (None, cell.endpoint_name)
    ]
    return everything, UsageCells(cells)


async def read_usage_view(
    session: AsyncSession, organization_id: str, query: UsageQuery, currency: str
) -> UsageView:
    """Days begin at midnight UTC."""
    everything, shown = await read_cells_of(session, organization_id, query)
    period = (session, organization_id, query.start, query.end)
    wanted = RequestFilter(
        start=query.start,
        end=query.end,
        api_key_id=query.key_id,
        endpoint_name=query.endpoint_name,
    )
    series, bars = _chart(shown, query)
    return UsageView(
        query=query,
        currency=currency,
        models=sorted({cell.endpoint_name for cell in everything.cells}),
        keys=_keys(everything.cells),
        by_day=shown.rows("day"),
        by_model=shown.rows("model"),
        by_key=shown.rows("key"),
        by_class=shown.rows("class"),
        by_dimension=_dimensions(shown),
        caching=_caching(shown),
        waived=await read_waived(
            *period, api_key_id=query.key_id, endpoint_name=query.endpoint_name
        ),
        recent=await read_requests(session, organization_id, wanted, NUM_RECENT),
        series=series,
        bars=bars,
    )


def _keys(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    names = {cell.api_key_id or CONSOLE_KEY: cell.api_key_name for cell in cells}
    return sorted(names.items(), key=lambda pair: (pair[1].lower(), pair[0]))


def _dimensions(shown: UsageCells) -> list[DimensionRow]:
    quantities = shown.quantities()
    return [
        DimensionRow(
            DIMENSION_NAMES.get(row.group, row.group), quantities[row.group], row.amount_nano
        )
        for row in shown.rows("dimension")
    ]


def _caching(shown: UsageCells) -> list[CachingRow]:
    """Of models that found something in the cache, the most saved first."""
    saved: dict[str, int] = {}
    for cell in shown.cells:
        saved[cell.endpoint_name] = saved.get(cell.endpoint_name, 0) + cell.saved_nano
    rows = [
        CachingRow(row.group, row.input, row.cached_input, saved[row.group])
        for row in shown.rows("model")
        if row.cached_input
    ]
    return sorted(rows, key=lambda row: (-row.saved_nano, row.model))


# --- the chart --------------------------------------------------------------------------


def spend_chart(view: UsageView) -> Markup:
    """Amounts by day, stacked; days without usage stay empty."""
    places = _places(max((sum(bar.parts) for bar in view.bars), default=0))
    return stacked_bars(
        view.bars,
        series=view.series,
        describe=lambda nano: format_nano(nano, view.currency, places),
        title=f"Spend by day, {_said(view.query.first)} to {_said(view.query.last)}",
    )


def _chart(shown: UsageCells, query: UsageQuery) -> tuple[list[str], list[Bar]]:
    """The series' names, and a bar for each day."""
    name_of, names = _split(shown, query.split)
    at = {name: index for index, name in enumerate(names)}
    days = {day.isoformat(): [0] * len(names) for day in query.days}
    for cell in shown.cells:
        parts = days.get(day_of(cell))
        if parts is not None:
            parts[at.get(name_of(cell), len(names) - 1)] += cell.amount_nano
    bars = [
        Bar(
            label=f"{day.day} {day:%b}",
            title=_said(day),
            parts=tuple(days[day.isoformat()]),
        )
        for day in query.days
    ]
    return names, bars


def _split(shown: UsageCells, split: str) -> tuple[Callable[[Cell], str], list[str]]:
    """How a cell's series is called, and all series: what has no place of its own is in the
    last."""
    if split == "use":
        use_of = {dimension: name for name, dimensions in USES for dimension in dimensions}
        return lambda cell: use_of.get(cell.dimension, USES[-1][0]), [name for name, _ in USES]
    name_of = _NAMES[split]
    sums: dict[str, int] = {}
    for cell in shown.cells:
        sums[name_of(cell)] = sums.get(name_of(cell), 0) + cell.amount_nano
    names = sorted(sums, key=lambda name: (-sums[name], name))
    if len(names) > NUM_SERIES:
        names = [*names[: NUM_SERIES - 1], "All others"]
    return name_of, names


def _said(day: date) -> str:
    return f"{day.day} {day:%b %Y}"


def _places(largest_nano: int) -> int:
    """Decimals that tell the chart's grid lines apart."""
    places = 2
    while places < 9 and largest_nano * 10**places < 40 * 10**9:
        places += 1
    return places
