"""What the page Usage shows, added up from one reading of the hourly sums."""

from collections.abc import Callable, Sequence
from datetime import date
from itertools import chain
from operator import attrgetter

import msgspec
from markupsafe import Markup
from sqlalchemy.ext.asyncio import AsyncSession

from app.console.charts import Bar, stacked_bars
from app.console.usage_query import CONSOLE_KEY, UsageQuery
from app.core import clock
from app.core.money import format_nano
from app.metering.hours import Cell, start_of
from app.metering.kept_sums import Column, Sums, read_spend, read_sums
from app.metering.requests import RequestFilter, read_requests
from app.metering.service import UsageCells, UsageRow, read_usage_days
from app.metering.tables import UsageEvent
from app.metering.waived import Waived, read_waived

NUM_RECENT = 25
NUM_ROWS = 50  # of a table; all are in its file
_COLUMNS: dict[str, Column] = {
    "use": "dimension",
    "model": "endpoint_name",
    "key": "api_key_name",
    "class": "service_class",
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
        """Title, by what it groups, and its rows, the dearest first."""
        return [
            ("By model", "model", self.by_model),
            ("By key", "key", self.by_key),
            ("By class", "class", self.by_class),
        ]


async def read_cells_of(
    session: AsyncSession, organization_id: str, query: UsageQuery
) -> tuple[UsageCells, UsageCells]:
    """All usage of the query's days by day, and what its filters leave of it."""
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
    period = (session, organization_id, query.start, query.end)
    of = {"api_key_id": query.key_id, "endpoint_name": query.endpoint_name}
    now = clock.now()
    everything = await read_sums(*period, now=now)
    shown = await read_sums(*period, **of, now=now) if query.is_filtered else everything
    spend = await read_spend(*period, _COLUMNS[query.split], **of, now=now)
    wanted = RequestFilter(
        start=query.start,
        end=query.end,
        api_key_id=query.key_id,
        endpoint_name=query.endpoint_name,
    )
    series, bars = _chart(shown, spend, query)
    by_model = shown.by_model.rows("model")
    return UsageView(
        query=query,
        currency=currency,
        models=sorted({cell.endpoint_name for cell in everything.by_model.cells}),
        keys=_keys(everything.by_key.cells),
        by_model=by_model,
        by_key=shown.by_key.rows("key"),
        by_class=shown.by_class.rows("class"),
        by_dimension=_dimensions(shown.by_class),
        caching=_caching(shown.by_model, by_model),
        waived=await read_waived(*period, **of),
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


def _caching(shown: UsageCells, by_model: list[UsageRow]) -> list[CachingRow]:
    """Of models that found something in the cache, the most saved first."""
    saved: dict[str, int] = {}
    for cell in shown.cells:
        saved[cell.endpoint_name] = saved.get(cell.endpoint_name, 0) + cell.saved_nano
    rows = [
        CachingRow(row.group, row.input, row.cached_input, saved[row.group])
        for row in by_model
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


def _chart(
    shown: Sums, spend: list[tuple[int, str, int]], query: UsageQuery
) -> tuple[list[str], list[Bar]]:
    """The series' names, and a bar for each day."""
    name_of, names = _split(shown, query.split)
    at = {name: index for index, name in enumerate(names)}
    days = {day.isoformat(): [0] * len(names) for day in query.days}
    group_of = attrgetter(_COLUMNS[query.split])
    open_days = (
        (cell.hour, group_of(cell), cell.amount_nano)
        for cell in _cells(shown, query.split)
        if cell.hour >= shown.open_from
    )
    for hour, group, amount_nano in chain(spend, open_days):
        parts = days.get(start_of(hour).date().isoformat())
        if parts is not None:
            parts[at.get(name_of(group), len(names) - 1)] += amount_nano
    bars = [
        Bar(
            label=f"{day.day} {day:%b}",
            title=_said(day),
            parts=tuple(days[day.isoformat()]),
        )
        for day in query.days
    ]
    return names, bars


def _cells(shown: Sums, split: str) -> list[Cell]:
    """In which what the chart is parted by is told apart."""
    return {"model": shown.by_model, "key": shown.by_key}.get(split, shown.by_class).cells


def _split(shown: Sums, split: str) -> tuple[Callable[[str], str], list[str]]:
    """What a group's series is called, and all series: what has no place of its own is in the
    last."""
    if split == "use":
        use_of = {dimension: name for name, dimensions in USES for dimension in dimensions}
        return lambda group: use_of.get(group, USES[-1][0]), [name for name, _ in USES]
    group_of = attrgetter(_COLUMNS[split])
    sums: dict[str, int] = {}
    for cell in _cells(shown, split):
        sums[group_of(cell)] = sums.get(group_of(cell), 0) + cell.amount_nano
    names = sorted(sums, key=lambda name: (-sums[name], name))
    if len(names) > NUM_SERIES:
        names = [*names[: NUM_SERIES - 1], "All others"]
    return lambda group: group, names


def _said(day: date) -> str:
    return f"{day.day} {day:%b %Y}"


def _places(largest_nano: int) -> int:
    """Decimals that tell the chart's grid lines apart."""
    places = 2
    while places < 9 and largest_nano * 10**places < 40 * 10**9:
        places += 1
    return places
