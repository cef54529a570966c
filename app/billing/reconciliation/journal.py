"""The journal against the database: what it has settled is there, once, and nothing waits long."""

from collections.abc import Sequence

import msgspec
from sqlalchemy import Connection, bindparam, func, select

from app.billing.reconciliation.check import Check, Difference, Subject
from app.metering.tables import UsageEvent

JOURNAL = Subject(
    name="journal",
    title="Journal = requests",
    description="Every request that the journal has marked as settled since the last comparison "
    "is in the database exactly once, and none waits for its settlement longer than a request may "
    "take.",
    left_label="Settled by the journal",
    right_label="Found in the database",
    unit="count",
)
MAX_SETTLED = 50_000  # looked up in one run
CHUNK = 500


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


def check_journal(connection: Connection, state: JournalState, longest_ms: int) -> Check:
    ids = list(state.settled_ids)
    counts = _num_events(connection, ids)
    found = [
        Difference(request_id, 1, counts.get(request_id, 0), "settled by the journal")
        for request_id in ids
        if counts.get(request_id, 0) != 1
    ]
    num_missing = len(found)
    if state.oldest_open_ms > longest_ms:
        note = f"not settled for {state.oldest_open_ms // 1000} s"
        found.append(Difference(state.oldest_open, 1, 0, note))
    note = (
        f"{state.num_settled:,} settled since the box started, {state.num_open:,} open; "
        f"{len(ids):,} looked up now"
    )
    if state.num_not_kept:
        note += f", {state.num_not_kept:,} were too many to look up"
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
