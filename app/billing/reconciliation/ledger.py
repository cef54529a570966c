"""The ledger against itself: every transaction sums to zero, and so does each currency."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, text

from app.billing.reconciliation.check import Check, Difference, Subject
from app.billing.reconciliation.sums import LedgerTotals

ZERO = Subject(
    name="ledger",
    title="Credits = debits",
    description="Every posting takes from some accounts what it adds to others: each transaction "
    "sums to zero, and so does each currency as a whole.",
    left_label="Credits",
    right_label="Debits",
)
COMPLETE = Subject(
    name="complete",
    title="Ledger = sealed and queued",
    description="Every transaction of the ledger is sealed or waits for its seal, and every entry "
    "belongs to one. All of the ledger is counted for this, of a large one once a day.",
    left_label="Entries in the ledger",
    right_label="Entries of known transactions",
    unit="count",
)


def check_zero(totals: LedgerTotals, unbalanced: Sequence[Difference]) -> Check:
    """`unbalanced` are transactions of the part that this run looked at."""
    credits = sum(nano for nano in totals.sums.values() if nano > 0)
    debits = -sum(nano for nano in totals.sums.values() if nano < 0)
    found = [
        Difference(f"all of {currency}", nano, 0)
        for currency, nano in sorted(totals.by_currency().items())
        if nano
    ]
    return ZERO.compared(credits, debits, [*found, *unbalanced])


def check_complete(connection: Connection, now: datetime) -> Check:
    """Reads all of the ledger."""
    num_entries = connection.scalar(text("SELECT count(*) FROM ledger_entry")) or 0
    queued = (
        "SELECT ledger_transaction_id AS id FROM sealed_transaction"
        " UNION ALL SELECT ledger_transaction_id FROM unsealed_transaction"
    )
    num_known = connection.scalar(
        text(
            f"SELECT count(*) FROM ({queued}) q"  # noqa: S608
            " JOIN ledger_entry e ON e.transaction_id = q.id"
        )
    )
    missing = connection.execute(
        text(
            f"SELECT t.id FROM ledger_transaction t LEFT JOIN ({queued}) q ON q.id = t.id"  # noqa: S608
            " WHERE q.id IS NULL LIMIT 50"
        )
    )
    found = [
        Difference(transaction_id, 1, 0, "is neither sealed nor waits for a seal")
        for (transaction_id,) in missing
    ]
    gone = connection.execute(
        text(
            f"SELECT q.id FROM ({queued}) q LEFT JOIN ledger_transaction t ON t.id = q.id"  # noqa: S608
            " WHERE t.id IS NULL LIMIT 50"
        )
    )
    found += [
        Difference(transaction_id, 0, 1, "is sealed or queued, but not in the ledger")
        for (transaction_id,) in gone
    ]
    note = f"Counted at {now:%Y-%m-%d %H:%M:%S} UTC."
    return COMPLETE.compared(num_entries, num_known or 0, found, note=note)
