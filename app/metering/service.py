"""Usage added up for people: by key, model, class, dimension, hour or day.

What is read is in `hours.py`; this adds it up one way or another.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Literal

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from app.metering.hours import HOURS_PER_DAY, Cell, Period, period, read_cells, start_of

GroupBy = Literal["model", "key", "day", "hour", "dimension", "class"]
COUNTED = ("input", "cached_input", "output", "device_ms")
# A group, and what it is called: two keys may have one name.
_GROUPS: dict[GroupBy, Callable[[Cell], tuple[str, str]]] = {
    "model": lambda cell: (cell.endpoint_name, cell.endpoint_name),
    "key": lambda cell: (cell.api_key_id, cell.api_key_name),
    "day": lambda cell: (day := day_of(cell), day),
    "hour": lambda cell: (hour := f"{start_of(cell.hour):%Y-%m-%dT%H:00Z}", hour),
    "dimension": lambda cell: (cell.dimension, cell.dimension),
    "class": lambda cell: (cell.service_class, cell.service_class),
}
# Hours that a cell may span and still be in one group. Days can be added up to anything but hours.
_NUM_HOURS: dict[GroupBy, int] = {"day": HOURS_PER_DAY, "hour": 1}


class UsageRow(msgspec.Struct, frozen=True):
    """What one group used. Waived usage counts as used, not as owed."""

    group: str
    requests: int
    input: int
    cached_input: int
    output: int
    device_ms: int
    amount_nano: int


class UsageCells(msgspec.Struct, frozen=True):
    """All that one organization used in a period, read once and added up as is asked for. Groups
    by day need cells of days, by hour those of hours."""

    cells: list[Cell]

    def rows(self, group_by: GroupBy) -> list[UsageRow]:
        """Days and hours in order, others the dearest first. In the group of a dimension only
        that dimension is counted, and requests only in their own."""
        counts: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        amounts: defaultdict[str, int] = defaultdict(int)
        labels: defaultdict[str, str] = defaultdict(str)
        named = _GROUPS[group_by]
        for cell in self.cells:  # tens of thousands for a page
            group, label = named(cell)
            if label > labels[group]:
                labels[group] = label
            counts[group][cell.dimension] += cell.quantity
            amounts[group] += cell.amount_nano
        rows = [
            UsageRow(
                group=labels[group],
                requests=count["request"],
                input=count["input"],
                cached_input=count["cached_input"],
                output=count["output"],
                device_ms=count["device_ms"],
                amount_nano=amounts[group],
            )
            for group, count in counts.items()
        ]
        if group_by in ("day", "hour"):
            return sorted(rows, key=lambda row: row.group)
        return sorted(rows, key=lambda row: (-row.amount_nano, row.group))

    @property
    def total_nano(self) -> int:
        return sum(cell.amount_nano for cell in self.cells)

    @property
    def saved_nano(self) -> int:
        """How much more the cached tokens would have cost at the input price of their request.
        Waived requests saved nothing, because they cost nothing."""
        return sum(cell.saved_nano for cell in self.cells)

    def quantities(self) -> dict[str, int]:
        """What was used of each dimension."""
        return _sums((cell.dimension, cell.quantity) for cell in self.cells)

    def spend_by_day(self) -> dict[str, dict[str, int]]:
        """Nano-units by UTC day (`YYYY-MM-DD`) and dimension."""
        spend: dict[str, dict[str, int]] = {}
        for cell in self.cells:
            day = spend.setdefault(day_of(cell), {})
            day[cell.dimension] = day.get(cell.dimension, 0) + cell.amount_nano
        return spend


def day_of(cell: Cell) -> str:
    return start_of(cell.hour).date().isoformat()


def _sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, number in pairs:
        sums[name] = sums.get(name, 0) + number
    return sums


async def read_usage(
    session: AsyncSession, organization_id: str, within: Period, group_by: GroupBy
) -> UsageCells:
    """What was posted in a period, read as coarsely as groups of this kind allow."""
    num_hours = _NUM_HOURS.get(group_by, 0)
    return UsageCells(await read_cells(session, organization_id, within, num_hours))


async def read_usage_days(
    session: AsyncSession, organization_id: str, start: datetime, end: datetime
) -> UsageCells:
    """What was posted in [start, end), for any group but hours."""
    cells = await read_cells(session, organization_id, period(start, end), HOURS_PER_DAY)
    return UsageCells(cells)


async def usage_by(
    session: AsyncSession,
    organization_id: str,
    group_by: GroupBy,
    start: datetime,
    end: datetime,
) -> list[UsageRow]:
    """Usage posted in [start, end), of which the single requests of partial hours are kept."""
    cells = await read_usage(session, organization_id, period(start, end), group_by)
    return cells.rows(group_by)


async def total_nano(
    session: AsyncSession, organization_id: str, start: datetime, end: datetime
) -> int:
    """What was posted in [start, end), of which likewise."""
    cells = await read_usage(session, organization_id, period(start, end), "model")
    return cells.total_nano
