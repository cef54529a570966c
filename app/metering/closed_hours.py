"""Sums over hours that have ended, kept in memory: nothing is posted in an hour that is over, so
that only the running one has to be added up for every page.

Nothing here is needed to answer right, and money is not moved by it: it is lost with the process.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock

HOURS_PER_DAY = 24
MARGIN = timedelta(minutes=5)  # for transactions that began in the hour before
MAX_ROWS = 500_000  # in memory, of one database
MAX_ROWS_OF_ONE = 50_000

Rows = list[tuple[Any, ...]]
Read = Callable[[int, int], Awaitable[Rows]]


class _Kept(NamedTuple):
    read_at: datetime
    rows: Rows


_kept: WeakKeyDictionary[Engine | Connection, OrderedDict[Hashable, _Kept]] = WeakKeyDictionary()


def open_day(now: datetime) -> int:
    """The first hour of the first day that has not ended for good."""
    ended = _ended(now)
    return ended - ended % HOURS_PER_DAY


def _ended(now: datetime) -> int:
    return int((now - MARGIN).timestamp()) // 3600


async def read_in_parts(
    session: AsyncSession,
    name: tuple[Hashable, ...],
    first: int,
    until: int,
    read: Read,
    now: datetime,
) -> Rows:
    """The rows of hours [first, until) (since 1970, UTC), which `read` gives for a part of them and
    which can be added up: those of ended days, of ended hours since, and of the rest. No part but
    the first is of several days. `name` tells what is read."""
    ended = _ended(now)
    midnight = int(now.timestamp()) // 3600
    midnight -= midnight % HOURS_PER_DAY
    marks = (mark for mark in (open_day(now), ended, midnight) if first < mark < until)
    rows: Rows = []
    for begin, end in pairwise(sorted({first, *marks, until})):
        if end <= ended:
            rows += await _once(session, (*name, begin, end), lambda b=begin, e=end: read(b, e))
        else:
            rows += await read(begin, end)
    return rows


async def _once(session: AsyncSession, key: Hashable, read: Callable[[], Awaitable[Rows]]) -> Rows:
    """As it was read before, unless the clock was set back since: then what had ended may not
    have."""
    kept = _kept.setdefault(session.get_bind(), OrderedDict())
    now = clock.now()
    found = kept.get(key)
    if found is not None and found.read_at <= now:
        kept.move_to_end(key)
        return found.rows
    rows = await read()
    kept.pop(key, None)
    if len(rows) <= MAX_ROWS_OF_ONE:
        kept[key] = _Kept(now, rows)
        while sum(len(each.rows) for each in kept.values()) > MAX_ROWS:
            kept.popitem(last=False)
    return rows
