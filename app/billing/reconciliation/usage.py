"""Requests against the ledger: for each transaction of usage, its events, their lines and its
entries are one sum.

Owns which transactions a run looks at: the new ones, and a part of the old in turn, so that a run
takes bounded time however many there are.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import BindParameter, Connection, bindparam, select, text

from app.billing.ledger import REVENUE
from app.billing.reconciliation.check import MAX_NAMED, Check, Difference, Subject
from app.billing.reconciliation.sums import USAGE
from app.billing.tables import LedgerEntry, LedgerTransaction
from app.core.money import price_of
from app.metering.tables import UsageEvent, UsageLine

USAGE_SUBJECT = Subject(
    name="usage",
    title="Requests = lines = ledger",
    description="For each posting of usage: what its requests came to, their lines (quantity x "
    "price, rounded once), and what the ledger booked as revenue. New postings at once, older ones "
    "in turn.",
    left_label="Requests looked at",
    right_label="Their revenue in the ledger",
)
ORPHANS = Subject(
    name="orphans",
    title="Every request is in the ledger",
    description="Requests whose ledger transaction does not exist, looked for in turn through all "
    "of them.",
    left_label="Requests looked at",
    right_label="With a transaction",
    unit="count",
)
NEW_SECONDS = 5.0
OLD_SECONDS = 1.0
CHUNK = 100  # transactions read at once
MAX_NEW = 20_000
NUM_EVENTS = 5_000  # that `orphans` looks at in one run
_ARCHIVE_MARGIN = timedelta(days=2)


class Finding(NamedTuple):
    """Sums over some transactions, and what differs in them. `unbalanced` do not sum to zero."""

    events_nano: int
    revenue_nano: int
    num_transactions: int
    differences: list[Difference]
    unbalanced: list[Difference]


class UsageWalk:
    """Remembers how far transactions and events have been looked at. Transactions are told apart
    by their seals, which have an order; what is not sealed yet is looked at each time."""

    def __init__(self, until: int = 0) -> None:
        self.until = until  # the last seal whose transactions were all found clean
        self._old = 0  # the last seal looked at in turn
        self._event_id = ""

    def check(
        self, connection: Connection, detail_from: datetime
    ) -> tuple[Check, list[Difference]]:
        """`detail_from`: requests that ended before may have been archived. Also returns
        transactions that do not sum to zero, which are the ledger's matter."""
        newest = connection.scalar(text("SELECT max(number) FROM seal")) or 0
        unsealed = connection.scalars(
            text("SELECT ledger_transaction_id FROM unsealed_transaction LIMIT :most"),
            {"most": MAX_NEW},
        )
        fresh = list(unsealed) + _sealed(connection, self.until, newest)
        found, num_done = _look(connection, fresh, detail_from, NEW_SECONDS)
        if num_done == len(fresh) < MAX_NEW and not found.differences and not found.unbalanced:
            self.until = newest
        old, last = _next_seals(connection, self._old)
        seen, num_old = _look(connection, old, detail_from, OLD_SECONDS)
        if num_old == len(old):
            self._old = last
        found = _joined(found, seen)
        note = (
            f"{num_done:,} of {len(fresh):,} new postings and {num_old:,} older ones looked at, "
            f"{num_done + num_old - found.num_transactions:,} of them not of usage."
        )
        check = USAGE_SUBJECT.compared(
            found.events_nano,
            found.revenue_nano,
            found.differences[:MAX_NAMED],
            note=note,
            num_more=max(0, len(found.differences) - MAX_NAMED),
        )
        return check, found.unbalanced

    def check_orphans(self, connection: Connection) -> Check:
        """Goes on where it stopped, by the events' ids, and begins again at their end."""
        ids = connection.scalars(
            select(UsageEvent.id)
            .where(UsageEvent.id > self._event_id)
            .order_by(UsageEvent.id)
            .limit(NUM_EVENTS)
        ).all()
        first, self._event_id = self._event_id, ids[-1] if len(ids) == NUM_EVENTS else ""
        if not ids:
            return ORPHANS.compared(0, 0)
        rows = connection.execute(
            text(
                "SELECT v.id, v.amount_nano FROM usage_event v"
                " LEFT JOIN ledger_transaction t ON t.id = v.ledger_transaction_id"
                " WHERE v.id > :first AND v.id <= :last AND t.id IS NULL"
                # Requests of before this ledger that cost nothing were never posted.
                " AND (v.ledger_transaction_id <> '' OR v.amount_nano <> 0)"
            ),
            {"first": first, "last": ids[-1]},
        ).all()
        found = [
            Difference(event_id, int(nano), 0, "has no ledger transaction")
            for event_id, nano in rows[:MAX_NAMED]
        ]
        return ORPHANS.compared(
            len(ids), len(ids) - len(rows), found, num_more=max(0, len(rows) - MAX_NAMED)
        )


def _sealed(connection: Connection, after: int, until: int) -> list[str]:
    if after >= until:
        return []
    return list(
        connection.scalars(
            text(
                "SELECT ledger_transaction_id FROM sealed_transaction"
                " WHERE seal_number > :after AND seal_number <= :until"
                " ORDER BY seal_number, position LIMIT :most"
            ),
            {"after": after, "until": until, "most": MAX_NEW},
        )
    )


def _next_seals(connection: Connection, after: int) -> tuple[list[str], int]:
    """Transactions of the next few seals, and the last of these; 0 to begin again."""
    rows = connection.execute(
        text("SELECT number, num_transactions FROM seal WHERE number > :after ORDER BY 1 LIMIT 50"),
        {"after": after},
    ).all()
    last, num_transactions = after, 0
    for number, count in rows:
        if num_transactions and num_transactions + count > MAX_NEW:
            break
        last, num_transactions = number, num_transactions + count
    is_end = len(rows) < 50 and bool(rows) and last == rows[-1][0]
    return _sealed(connection, after, last), 0 if is_end or not rows else last


def _look(
    connection: Connection, ids: Sequence[str], detail_from: datetime, seconds: float
) -> tuple[Finding, int]:
    """Looks at transactions in order until the time is used up; returns how many were."""
    until = time.monotonic() + seconds
    found, num_done = Finding(0, 0, 0, [], []), 0
    for at in range(0, len(ids), CHUNK):
        if at and time.monotonic() > until:
            break
        chunk = ids[at : at + CHUNK]
        found = _joined(found, check_transactions(connection, chunk, detail_from))
        num_done += len(chunk)
    return found, num_done


def _joined(one: Finding, other: Finding) -> Finding:
    known = {difference.name for difference in one.differences}
    zero = {difference.name for difference in one.unbalanced}
    return Finding(
        one.events_nano + other.events_nano,
        one.revenue_nano + other.revenue_nano,
        one.num_transactions + other.num_transactions,
        one.differences + [d for d in other.differences if d.name not in known],
        one.unbalanced + [d for d in other.unbalanced if d.name not in zero],
    )


_IDS: BindParameter[list[str]] = bindparam("ids", expanding=True)
_TRANSACTIONS = (
    select(
        LedgerTransaction.id,
        LedgerTransaction.kind,
        LedgerTransaction.organization_id,
        LedgerTransaction.created_at,
        LedgerEntry.account,
        LedgerEntry.amount_nano,
    )
    .outerjoin(LedgerEntry, LedgerEntry.transaction_id == LedgerTransaction.id)
    .where(LedgerTransaction.id.in_(_IDS))
)
_EVENTS = select(
    UsageEvent.ledger_transaction_id,
    UsageEvent.id,
    UsageEvent.organization_id,
    UsageEvent.amount_nano,
).where(UsageEvent.ledger_transaction_id.in_(_IDS))
_LINES = (
    select(
        UsageLine.event_id,
        UsageLine.dimension,
        UsageLine.quantity,
        UsageLine.price_nano,
        UsageLine.unit_scale,
        UsageLine.amount_nano,
        UsageLine.disposition,
    )
    .join(UsageEvent, UsageEvent.id == UsageLine.event_id)
    .where(UsageEvent.ledger_transaction_id.in_(_IDS))
)


class _Posting(NamedTuple):
    organization_id: str
    created_at: datetime
    revenue_nano: int


def check_transactions(
    connection: Connection, ids: Sequence[str], detail_from: datetime
) -> Finding:
    """All of these, each by itself."""
    postings, unbalanced = _postings(connection, ids)
    events: dict[str, int] = defaultdict(int)
    differences: list[Difference] = []
    amounts: dict[str, int] = {}
    for transaction_id, event_id, organization_id, nano in connection.execute(
        _EVENTS, {"ids": ids}
    ):
        amounts[event_id] = nano
        events[transaction_id] += nano
        posting = postings.get(transaction_id)
        if posting is None:
            note = "is posted by a transaction that is not one of usage"
            differences.append(Difference(event_id, nano, 0, note))
        elif posting.organization_id not in ("", organization_id):
            note = f"is {organization_id}'s, but posted for {posting.organization_id}"
            differences.append(Difference(event_id, nano, nano, note))
    differences += _line_differences(connection, ids, amounts)
    sums = [0, 0]
    for transaction_id, posting in postings.items():
        if transaction_id not in events and posting.created_at < detail_from + _ARCHIVE_MARGIN:
            continue  # its requests are archived
        nano = events.get(transaction_id, 0)
        sums[0] += nano
        sums[1] += posting.revenue_nano
        if nano != posting.revenue_nano:
            note = "requests against revenue of this transaction"
            differences.append(Difference(transaction_id, nano, posting.revenue_nano, note))
    return Finding(sums[0], sums[1], len(postings), differences, unbalanced)


def _postings(
    connection: Connection, ids: Sequence[str]
) -> tuple[dict[str, _Posting], list[Difference]]:
    """The transactions of usage, and any that do not sum to zero."""
    postings: dict[str, _Posting] = {}
    totals: dict[str, int] = defaultdict(int)
    for id_, kind, organization_id, created_at, account, nano in connection.execute(
        _TRANSACTIONS, {"ids": ids}
    ):
        totals[id_] += nano or 0
        if kind == USAGE:
            before = postings[id_].revenue_nano if id_ in postings else 0
            revenue_nano = before + (nano if account == REVENUE else 0)
            postings[id_] = _Posting(organization_id, created_at, revenue_nano)
    note = "does not sum to zero"
    unbalanced = [Difference(id_, nano, 0, note) for id_, nano in totals.items() if nano]
    return postings, unbalanced


def _line_differences(
    connection: Connection, ids: Sequence[str], amounts: dict[str, int]
) -> list[Difference]:
    """Events that are not the sum of their lines, and lines that are not quantity x price."""
    differences: list[Difference] = []
    sums: dict[str, int] = defaultdict(int)
    for event_id, dimension, quantity, price_nano, scale, nano, disposition in connection.execute(
        _LINES, {"ids": ids}
    ):
        sums[event_id] += nano
        due = price_of(quantity, price_nano, scale) if disposition == "billed" else 0
        if nano != due:
            note = f"{disposition}: {quantity} x {price_nano} / {scale}"
            differences.append(Difference(f"{event_id} {dimension}", nano, due, note))
    for event_id, nano in amounts.items():
        if sums.get(event_id, 0) != nano:
            note = "request against the sum of its lines"
            differences.append(Difference(event_id, nano, sums.get(event_id, 0), note))
    return differences
