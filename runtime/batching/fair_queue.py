"""Decides which rows share a run: fair between callers, in order within each, similar lengths.

Plain Python: no clock, no threads, no tensors. When a run begins is `waiting.py`'s.
"""

from collections.abc import Hashable, Iterator
from itertools import count
from typing import Generic, TypeVar

import msgspec

Item = TypeVar("Item")

SLACK = 8  # a row may always be padded by so much
SLACK_SHARE = 4  # or by this part of its own length
MAX_REMEMBERED_CALLERS = 4096
NUM_APART = 32  # requests of a caller that share no run with others' after one has failed


class Pending(Generic[Item]):
    """Rows of one request that wait. Those of equal `group` may share a run if their `length`s are
    similar; `cost` is what a row counts for between callers: its number of values."""

    __slots__ = (
        *("caller", "came_ms", "cost", "group", "item", "length"),
        *("order", "rows", "start", "turn"),
    )

    def __init__(
        self,
        item: Item,
        caller: str,
        group: Hashable,
        rows: int,
        *,
        length: int = 0,
        cost: int = 1,
    ) -> None:
        self.item = item
        self.caller = caller
        self.group = group
        self.rows = rows  # that wait
        self.length = length
        self.cost = cost
        self.start = 0  # the first of them, in the request
        self.turn = 0  # rows taken since it came to the front
        self.order = 0
        self.came_ms = 0.0


class Slice(msgspec.Struct, Generic[Item], frozen=True):
    """Rows `start` to `stop` of a request."""

    pending: Pending[Item]
    start: int
    stop: int


class _Apart(msgspec.Struct, frozen=True):
    """The group of a caller whose requests share runs with one another alone."""

    caller: str
    group: Hashable


class _Caller(Generic[Item]):
    def __init__(self, served: float) -> None:
        self.served = served
        self.groups: dict[Hashable, list[Pending[Item]]] = {}

    def oldest(self) -> Pending[Item]:
        return min((waiting[0] for waiting in self.groups.values()), key=lambda each: each.order)


class BatchQueue(Generic[Item]):
    """A run begins with the oldest request of whoever has been served least; rows that may share
    it fill it up, whoever's they are, again of the least served first. A request larger than a
    run is served in turns, between which others of its caller come to theirs."""

    def __init__(self, max_rows: int) -> None:
        assert max_rows >= 1, "a run takes at least one row"
        self._max_rows = max_rows
        self._callers: dict[str, _Caller[Item]] = {}  # those with rows that wait
        self._served: dict[str, float] = {}  # of those without, where it is above the floor
        self._apart: dict[str, int] = {}  # how many of their next requests share with none
        self._floor = 0.0
        self._orders = count()
        self._num_waiting = 0

    def __len__(self) -> int:
        """Requests with rows that wait."""
        return self._num_waiting

    def add(self, pending: Pending[Item]) -> None:
        """Queue a request of at least one row."""
        assert pending.rows >= 1, "a request has rows"
        caller = self._callers.get(pending.caller)
        if caller is None:
            served = max(self._served.pop(pending.caller, 0.0), self._floor)
            caller = self._callers[pending.caller] = _Caller(served)
        pending.order = next(self._orders)
        if num_apart := self._apart.pop(pending.caller, 0):
            pending.group = _Apart(pending.caller, pending.group)
            if num_apart > 1:
                self._apart[pending.caller] = num_apart - 1
        caller.groups.setdefault(pending.group, []).append(pending)
        self._num_waiting += 1

    def remove(self, pending: Pending[Item]) -> bool:
        """Whether rows of it still waited; they will not run."""
        caller = self._callers.get(pending.caller)
        waiting = caller.groups.get(pending.group, []) if caller else []
        if pending not in waiting:
            return False
        waiting.remove(pending)
        self._num_waiting -= 1
        self._tidy(pending.caller, pending.group)
        return True

    def blame(self, name: str, cost: int) -> None:
        """A request of that caller failed in runs that cost others, or itself again, so much.
        What waits of it and what comes next shares no run with others'."""
        if len(self._apart) >= MAX_REMEMBERED_CALLERS:
            self._apart.pop(next(iter(self._apart)))
        self._apart[name] = NUM_APART
        caller = self._callers.get(name)
        if caller is None:
            self._served[name] = max(self._served.get(name, 0.0), self._floor) + cost
            self._forget_callers()
            return
        caller.served += cost
        groups: dict[Hashable, list[Pending[Item]]] = {}
        for group, waiting in caller.groups.items():
            apart = group if isinstance(group, _Apart) else _Apart(name, group)
            for pending in waiting:
                pending.group = apart
            groups.setdefault(apart, []).extend(waiting)
        for waiting in groups.values():
            waiting.sort(key=lambda each: each.order)
        caller.groups = groups

    def head(self) -> Pending[Item] | None:
        """What the next run begins with."""
        if not self._callers:
            return None
        return min(self._callers.values(), key=lambda each: each.served).oldest()

    def num_rows(self, head: Pending[Item], most: int) -> int:
        """Rows that wait and might run with `head`, itself included; counted to `most`."""
        rows = 0
        for caller in self._callers.values():
            for pending in caller.groups.get(head.group, ()):
                if is_similar(pending.length, head.length, head.length):
                    rows += pending.rows
                    if rows >= most:
                        return most
        return rows

    def total_rows(self) -> int:
        return sum(pending.rows for pending in self._all())

    def take(self, max_rows: int) -> list[Slice[Item]]:
        """The next run, of at most `max_rows` rows; empty when nothing waits."""
        head = self.head()
        if head is None:
            return []
        self._floor = max(self._floor, self._callers[head.caller].served)
        callers = {
            name: iter(list(caller.groups[head.group]))
            for name, caller in self._callers.items()
            if head.group in caller.groups
        }
        room = min(max_rows, self._max_rows)
        shortest = longest = head.length
        slices: list[Slice[Item]] = []
        while room and callers:
            name = head.caller if not slices else min(callers, key=self._served_of)
            for pending in callers[name]:
                if is_similar(pending.length, shortest, longest):
                    break
            else:
                del callers[name]
                continue
            shortest, longest = min(shortest, pending.length), max(longest, pending.length)
            slices.append(self._slice(pending, min(room, pending.rows)))
            room -= slices[-1].stop - slices[-1].start
        for name in {each.pending.caller for each in slices}:
            self._settle(name, head.group)
        self._forget_callers()
        return slices

    def clear(self) -> list[Pending[Item]]:
        """Empty the queue and return what was in it."""
        dropped = list(self._all())
        self._callers.clear()
        self._num_waiting = 0
        return dropped

    def _all(self) -> Iterator[Pending[Item]]:
        for caller in self._callers.values():
            for waiting in caller.groups.values():
                yield from waiting

    def _served_of(self, name: str) -> float:
        return self._callers[name].served

    def _slice(self, pending: Pending[Item], rows: int) -> Slice[Item]:
        taken = Slice(pending, pending.start, pending.start + rows)
        pending.start += rows
        pending.rows -= rows
        pending.turn += rows
        self._callers[pending.caller].served += rows * pending.cost
        return taken

    def _settle(self, name: str, group: Hashable) -> None:
        """After a run took from `name`'s: drop what is whole, and end turns."""
        waiting = self._callers[name].groups[group]
        left = [pending for pending in waiting if pending.rows]
        self._num_waiting -= len(waiting) - len(left)
        over = [pending for pending in left if pending.turn >= self._max_rows]
        for pending in over:
            pending.turn = 0
            pending.order = next(self._orders)
        left = [pending for pending in left if pending not in over] + over
        self._callers[name].groups[group] = left
        self._tidy(name, group)

    def _tidy(self, name: str, group: Hashable) -> None:
        caller = self._callers[name]
        if not caller.groups[group]:
            del caller.groups[group]
        if not caller.groups:
            self._served[name] = caller.served
            del self._callers[name]

    def _forget_callers(self) -> None:
        """Those who have been served least, half of them: they lose little by it."""
        if len(self._served) > MAX_REMEMBERED_CALLERS:
            most = sorted(self._served, key=self._served.__getitem__)[MAX_REMEMBERED_CALLERS // 2 :]
            self._served = {name: self._served[name] for name in most}


def is_similar(length: int, shortest: int, longest: int) -> bool:
    """Whether padding everything to the longest would still waste little with `length` added."""
    least, most = min(length, shortest), max(length, longest)
    return most <= least + max(SLACK, least // SLACK_SHARE)
