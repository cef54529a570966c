"""What is hashed, read back from the database: ledger transactions and the receipts they are of.

Owns the way from rows to `digests.py`'s records, which must be the one that settling takes.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, select

from app.billing.digests import Line, ReceiptRecord, TransactionRecord, instant_text
from app.billing.tables import LedgerEntry, LedgerTransaction
from app.core.database import Base
from app.metering.tables import UsageEvent, UsageLine

IDS_AT_ONCE = 2_000  # in one query

_transaction = Base.metadata.tables[LedgerTransaction.__tablename__]
_entry = Base.metadata.tables[LedgerEntry.__tablename__]
_event = Base.metadata.tables[UsageEvent.__tablename__]
_line = Base.metadata.tables[UsageLine.__tablename__]

Item = TypeVar("Item")


def read_transactions(connection: Connection, ids: Sequence[str]) -> dict[str, TransactionRecord]:
    """Those of these ledger transactions that there are."""
    entries: dict[str, list[tuple[str, int]]] = defaultdict(list)
    rows: list[Row[*tuple[Any, ...]]] = []
    for some in blocks_of(ids, IDS_AT_ONCE):
        for name, account, amount_nano in connection.execute(
            select(_entry.c.transaction_id, _entry.c.account, _entry.c.amount_nano).where(
                _entry.c.transaction_id.in_(some)
            )
        ):
            entries[name].append((account, amount_nano))
        rows += connection.execute(select(_transaction).where(_transaction.c.id.in_(some))).all()
    return {
        row.id: TransactionRecord(
            id=row.id,
            idempotency_key=row.idempotency_key,
            kind=row.kind,
            organization_id=row.organization_id,
            currency=row.currency,
            content_sha256=row.content_sha256,
            created_at=instant_text(row.created_at),
            entries=sorted(entries[row.id]),
        )
        for row in rows
    }


def read_receipts(
    connection: Connection, transaction_ids: Sequence[str]
) -> dict[str, list[ReceiptRecord]]:
    """The receipts of these transactions that are in the database, in the order of their tree's
    leaves."""
    lines: dict[str, list[Line]] = defaultdict(list)
    events: list[Row[*tuple[Any, ...]]] = []
    for some in blocks_of(transaction_ids, IDS_AT_ONCE):
        wanted = _event.c.ledger_transaction_id.in_(some)
        for event_id, *line in connection.execute(
            select(_line).join(_event, _event.c.id == _line.c.event_id).where(wanted)
        ):
            lines[event_id].append(tuple(line))  # type: ignore[arg-type]
        events += connection.execute(select(_event).where(wanted)).all()
    found: dict[str, list[ReceiptRecord]] = defaultdict(list)
    for row in sorted(events, key=lambda event: event.id):
        found[row.ledger_transaction_id].append(receipt_record(row, lines[row.id]))
    return found


def receipt_record(event: Any, lines: Iterable[Line]) -> ReceiptRecord:
    """`event` has the columns of `usage_event`."""
    return ReceiptRecord(
        event_id=event.id,
        organization_id=event.organization_id,
        api_key_id=event.api_key_id,
        api_key_name=event.api_key_name,
        endpoint_name=event.endpoint_name,
        version_number=event.version_number,
        route=event.route,
        service_class=event.service_class,
        outcome=event.outcome,
        finish_reason=event.finish_reason,
        price_book_id=event.price_book_id,
        currency=event.currency,
        amount_nano=event.amount_nano,
        started_at=instant_text(event.started_at),
        finished_at=instant_text(event.finished_at),
        duration_ns=event.duration_ns,
        first_token_ns=event.first_token_ns,
        lines=sorted(lines),
    )


def blocks_of(items: Sequence[Item], size: int) -> Iterable[Sequence[Item]]:
    """The items in their order, at most `size` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))
