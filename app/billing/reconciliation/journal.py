"""The journal against the database: what it has settled is there, once, and nothing waits long."""

from collections.abc import Iterable, Sequence

import msgspec
from sqlalchemy import Connection, bindparam, func, select

from app.billing.reconciliation.check import Check, Difference, Subject
from app.metering.tables import UsageEvent

JOURNAL = Subject(
    name="journal",
    title="Journal = requests",
    description="Every request that the journal has marked as settled is in the database "
    "exactly once, looked up until it is, and none waits for its settlement longer than a request "
    "may take.",
    left_label="Settled by the journal",
    right_label="Found in the database",
    unit="count",
)
MAX_SETTLED = 50_000  # that are kept until they are found
CHUNK = 500
SETTLED = "settled by the journal"


class JournalState(msgspec.Struct, frozen=True, kw_only=True):
    """What this process's journal says of itself: counts since its start, the requests settled
    since the last comparison, and how long the oldest of those that are not has been open."""

    num_admitted: int
    num_settled: int
    num_open: int
    oldest_open: str = ""  # a request id
    oldest_open_ms: int = 0
    settled_ids: Sequence[str] = ()
    num_not_kept: int = 0  # settled, but too many to be looked up


class JournalWalk:
    """The journal hands its settled requests out once, so they are kept here until they are found:
    what is missing is missed in every run, and nothing is lost with a run that fails."""

    def __init__(self) -> None:
        self._unseen: dict[str, None] = {}  # request ids, the oldest first
        self._num_left_out = 0

    def add(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if len(self._unseen) < MAX_SETTLED:
                self._unseen[request_id] = None
            else:
                self._num_left_out += 1

    def check(self, connection: Connection, state: JournalState, longest_ms: int) -> Check:
        ids = list(self._unseen)
        counts = _num_events(connection, ids)
        found = [
            Difference(request_id, 1, counts.get(request_id, 0), SETTLED)
            for request_id in ids
            if counts.get(request_id, 0) != 1
        ]
        num_missing, num_left_out = len(found), state.num_not_kept + self._num_left_out
        self._unseen = dict.fromkeys(difference.name for difference in found)
        self._num_left_out = 0
        if state.oldest_open_ms > longest_ms:
            note = f"not settled for {state.oldest_open_ms // 1000} s"
            found.append(Difference(state.oldest_open, 1, 0, note))
        note = (
            f"{state.num_settled:,} settled since the box started, {state.num_open:,} open; "
            f"{len(ids):,} looked up now"
        )
        if num_left_out:
            note += f", {num_left_out:,} were too many to look up"
        return JOURNAL.compared(len(ids), len(ids) - num_missing, found, note=f"{note}.")


_COUNTS = (
    select(UsageEvent.request_id, func.count())
    .where(UsageEvent.request_id.in_(bindparam("ids", expanding=True)))
    .group_by(UsageEvent.request_id)
)


def _num_events(connection: Connection, request_ids: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for at in range(0, len(request_ids), CHUNK):
        rows = connection.execute(_COUNTS, {"ids": request_ids[at : at + CHUNK]})
        counts.update((row[0], int(row[1])) for row in rows)
    return counts
