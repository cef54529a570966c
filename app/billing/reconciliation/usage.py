"""Requests against the ledger: for each transaction of usage, its requests, their lines and its
entries are one sum, and its hash is that of their receipts.

Owns which transactions a run looks at: those that are new, and requests of no transaction in turn,
so that a run takes bounded time however many there are. What is sealed is `seals.py`'s for good.
"""

import time
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, select, text

from app.billing.digests import ReceiptRecord, TransactionRecord, instant_text, merkle_root
from app.billing.hashed_rows import read_receipts, read_transactions
from app.billing.ledger import REVENUE
from app.billing.proofs import wrong_line
from app.billing.reconciliation.check import MAX_NAMED, Check, Difference, Subject
from app.billing.reconciliation.sums import USAGE
from app.metering.tables import UsageEvent

POSTINGS = Subject(
    name="usage",
    title="Requests = lines = ledger",
    description="For each new posting of usage: what its requests came to, their lines (quantity "
    "x price, rounded once), and what the ledger booked as revenue. Older postings are verified "
    "with their seals.",
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
SECONDS = 5.0
CHUNK = 100  # transactions read at once
MAX_NEW = 20_000
NUM_EVENTS = 5_000  # that `check_orphans` looks at in one run
EVENTS_AT_ONCE = 500

_ORPHANS = text(
    "SELECT v.id, v.amount_nano FROM usage_event v"
    " LEFT JOIN ledger_transaction t ON t.id = v.ledger_transaction_id"
    " WHERE v.id IN :ids AND t.id IS NULL"
    # Requests of before this ledger that cost nothing were never posted.
    " AND (v.ledger_transaction_id <> '' OR v.amount_nano <> 0)"
).bindparams(bindparam("ids", expanding=True))


class Place(NamedTuple):
    """Of a transaction in the chain of seals."""

    seal_number: int
    position: int


class Finding(NamedTuple):
    """Sums over some transactions, and what differs in them. `unbalanced` do not sum to zero."""

    events_nano: int
    revenue_nano: int
    differences: list[Difference]
    unbalanced: list[Difference]


class UsageWalk:
    """Remembers how far transactions and events have been looked at. Transactions are told apart
    by their seals, which have an order; what is not sealed yet is looked at each time, after what
    is, so that every run gets on in the chain. It stops before the first that differs."""

    def __init__(self, until: int = 0) -> None:
        self.until = until  # the last seal whose transactions were all found clean
        self._within = Place(0, 0)  # and the last of these in the seal after it
        self._event_id = ""
        self.orphans: list[str] = []  # requests that were found last

    def check(self, connection: Connection, kept_from: datetime) -> tuple[Check, list[Difference]]:
        """Requests posted before `kept_from` may be in the archive. Also returns transactions
        that do not sum to zero, which are the ledger's matter."""
        newest = connection.scalar(text("SELECT max(number) FROM seal")) or 0
        unsealed = connection.scalars(
            text("SELECT ledger_transaction_id FROM unsealed_transaction LIMIT :most"),
            {"most": MAX_NEW},
        ).all()
        sealed = _sealed(connection, self.until, self._within, newest)
        fresh = [*(name for name, _ in sealed), *unsealed]
        found, num_done, num_clean = _look(connection, fresh, kept_from)
        self._go_on([place for _, place in sealed], num_clean, newest)
        note = f"{num_done:,} of {len(fresh):,} new postings looked at."
        check = POSTINGS.compared(
            found.events_nano,
            found.revenue_nano,
            found.differences[:MAX_NAMED],
            note=note,
            num_more=max(0, len(found.differences) - MAX_NAMED),
        )
        return check, found.unbalanced

    def _go_on(self, places: Sequence[Place], num_clean: int, newest: int) -> None:
        """Past as many of these as were clean."""
        if num_clean >= len(places) < MAX_NEW:
            self.until = newest
        elif num_clean:
            # More of its seal may be to come.
            self._within = places[min(num_clean, len(places)) - 1]
            self.until = self._within.seal_number - 1

    def check_orphans(self, connection: Connection) -> Check:
        """Goes on where it stopped, by the events' ids, and begins again at their end. What was
        found last is looked at again each time, until it is right."""
        ids = connection.scalars(
            select(UsageEvent.id)
            .where(UsageEvent.id > self._event_id)
            .order_by(UsageEvent.id)
            .limit(NUM_EVENTS)
        ).all()
        self._event_id = ids[-1] if len(ids) == NUM_EVENTS else ""
        looked_at = list(dict.fromkeys([*self.orphans, *ids]))
        found = _orphans(connection, looked_at)
        named = found[:MAX_NAMED]
        self.orphans = [difference.name for difference in named]
        return ORPHANS.compared(
            len(looked_at), len(looked_at) - len(found), named, num_more=len(found) - len(named)
        )


def _orphans(connection: Connection, event_ids: Sequence[str]) -> list[Difference]:
    amounts: dict[str, int] = {}
    for at in range(0, len(event_ids), EVENTS_AT_ONCE):
        rows = connection.execute(_ORPHANS, {"ids": event_ids[at : at + EVENTS_AT_ONCE]})
        amounts.update((event_id, int(nano)) for event_id, nano in rows)
    return [
        Difference(event_id, amounts[event_id], 0, "has no ledger transaction")
        for event_id in event_ids
        if event_id in amounts
    ]


def _sealed(
    connection: Connection, after: int, within: Place, until: int
) -> list[tuple[str, Place]]:
    """The next in the chain, after a seal and what was looked at of the following one."""
    if after >= until:
        return []
    rows = connection.execute(
        text(
            "SELECT ledger_transaction_id, seal_number, position FROM sealed_transaction"
            " WHERE seal_number > :after AND seal_number <= :until"
            " AND (seal_number <> :seal_number OR position > :position)"
            " ORDER BY seal_number, position LIMIT :most"
        ),
        {"after": after, "until": until, "most": MAX_NEW, **within._asdict()},
    )
    return [(name, Place(number, position)) for name, number, position in rows]


def _look(
    connection: Connection, ids: Sequence[str], kept_from: datetime
) -> tuple[Finding, int, int]:
    """Looks at transactions in order until the time is used up; returns how many were, and how
    many of them come before the first that differs, or some less."""
    ends_at = time.monotonic() + SECONDS
    found, num_done, num_clean = Finding(0, 0, [], []), 0, 0
    for at in range(0, len(ids), CHUNK):
        if at and time.monotonic() > ends_at:
            break
        chunk = ids[at : at + CHUNK]
        more = check_transactions(connection, chunk, kept_from)
        found = Finding(
            found.events_nano + more.events_nano,
            found.revenue_nano + more.revenue_nano,
            found.differences + more.differences,
            found.unbalanced + more.unbalanced,
        )
        num_done += len(chunk)
        if not found.differences and not found.unbalanced:
            num_clean = num_done
    return found, num_done, num_clean


def check_transactions(connection: Connection, ids: Sequence[str], kept_from: datetime) -> Finding:
    """All of these, each by itself."""
    records, receipts = read_transactions(connection, ids), read_receipts(connection, ids)
    differences: list[Difference] = []
    events_nano = revenue_nano = 0
    for id_, record in records.items():
        own = receipts.get(id_, [])
        differences += _of_receipts(record, own)
        if record.kind != USAGE or (not own and record.created_at < instant_text(kept_from)):
            continue
        spent = sum(receipt.amount_nano for receipt in own)
        revenue = dict(record.entries).get(REVENUE, 0)
        events_nano, revenue_nano = events_nano + spent, revenue_nano + revenue
        if spent != revenue:
            note = "requests against revenue of this transaction"
            differences.append(Difference(id_, spent, revenue, note))
        elif record.content_sha256 not in ("", _root(own)):
            note = "a receipt is not what was posted: the hashes differ"
            differences.append(Difference(id_, spent, revenue, note))
    unbalanced = [
        Difference(id_, total, 0, "does not sum to zero")
        for id_, record in records.items()
        if (total := sum(nano for _, nano in record.entries))
    ]
    return Finding(events_nano, revenue_nano, differences, unbalanced)


def _root(receipts: Sequence[ReceiptRecord]) -> str:
    return merkle_root([receipt.canonical for receipt in receipts]).hex()


def _of_receipts(record: TransactionRecord, receipts: Sequence[ReceiptRecord]) -> list[Difference]:
    """Requests that are not the sum of their lines, and those that another posting should have."""
    differences: list[Difference] = []
    for receipt in receipts:
        nano = receipt.amount_nano
        if wrong := wrong_line(receipt):
            lines_nano = sum(line[4] for line in receipt.lines)
            differences.append(Difference(receipt.event_id, nano, lines_nano, wrong))
        if record.kind != USAGE:
            note = f"is posted by {record.id}, which is not of usage"
            differences.append(Difference(receipt.event_id, nano, 0, note))
        elif record.organization_id not in ("", receipt.organization_id):
            note = f"is {receipt.organization_id}'s, but posted for {record.organization_id}"
            differences.append(Difference(receipt.event_id, nano, nano, note))
    return differences
