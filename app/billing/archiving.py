"""Usage leaves the database: receipts older than they are kept there move to files, seal by seal.

Owns the order of it: a file is durable before the first row goes, and a row goes only after it
was compared with what was read back from the file. However this ends, every receipt is in the
database, in the archive or in both. Ledger and hourly sums stay.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from datetime import datetime, timedelta

from sqlalchemy import Connection, Engine, delete, select

from app.billing.archive_file import ArchivedTransaction, ArchiveWriter
from app.billing.digests import ReceiptRecord, instant_text, merkle_root
from app.billing.hashed_rows import blocks_of, read_receipts
from app.billing.tables import LedgerTransaction, Seal, SealedTransaction
from app.billing.usage_archive import Span, UsageArchive
from app.core import clock
from app.core.database import Base, create_writer_engine
from app.core.failpoints import failpoint
from app.metering.tables import UsageEvent, UsageLine

EVENTS_PER_FILE = 16_384  # or more, by what is left of a seal
TRANSACTIONS_AT_ONCE = 256  # read, or deleted in one transaction
EVENTS_PER_DELETE = 250  # or more, by what is left of a ledger transaction
LEAST_AGE = timedelta(days=1)  # beyond what is kept, so that a quiet box makes one file a day

_event = Base.metadata.tables[UsageEvent.__tablename__]
_line = Base.metadata.tables[UsageLine.__tablename__]
_transaction = Base.metadata.tables[LedgerTransaction.__tablename__]
_seal = Base.metadata.tables[Seal.__tablename__]
_sealed = Base.metadata.tables[SealedTransaction.__tablename__]


class NotWhatWasSealed(Exception):
    """A receipt in the database is not what its ledger transaction was sealed with, or not what
    the archive has of it. Nothing is deleted; `tapeout ledger verify` says more."""


class Archivist:
    """Moves what is old. One per process."""

    def __init__(
        self,
        sync_database_url: str,
        archive: UsageArchive,
        detail_days: int,
        sync_journal: Callable[[], Awaitable[None]],
    ) -> None:
        """`sync_journal` makes durable what was settled: a journal that does not know would have a
        request settled again that the database no longer names."""
        self._sync_journal = sync_journal
        self._engine = create_writer_engine(sync_database_url)
        self._archive = archive
        self._detail_days = detail_days
        self._stopping = threading.Event()

    async def turn(self) -> int:
        """Moves all that is old enough; returns how many receipts that were."""
        await self._sync_journal()
        return await asyncio.to_thread(self._move)

    async def close(self) -> None:
        """A turn under way ends soon; the next one goes on where it was."""
        self._stopping.set()
        await asyncio.to_thread(self._engine.dispose)

    def _move(self) -> int:
        finish_dropping(self._engine, self._archive, self._stopping)
        before = clock.now() - timedelta(days=self._detail_days)
        return archive_before(self._engine, self._archive, before, self._stopping)


def finish_dropping(
    engine: Engine, archive: UsageArchive, stopping: threading.Event | None = None
) -> None:
    """Deletes what is archived but still in the database: an earlier process did not live to do
    it, or the database is an older one that was restored. Files are dropped in their order, so
    that none before one without rows has any."""
    spans = archive.spans()
    unfinished: list[Span] = []
    while spans and _has_rows(engine, spans[-1]):
        unfinished.append(spans.pop())
    for span in reversed(unfinished):
        drop_archived(engine, archive, span, stopping)


def archive_before(
    engine: Engine,
    archive: UsageArchive,
    before: datetime,
    stopping: threading.Event | None = None,
) -> int:
    """Moves the receipts of all seals made before an instant, if the oldest of them are a day
    older than that, or until it is to stop. Returns how many they were."""
    num_events = 0
    spans = archive.spans()
    start = spans[-1].last_seal + 1 if spans else 1
    numbers = _seals(engine, start, before)
    while numbers:
        writer = ArchiveWriter()
        latest_at = ""
        first = last = numbers[0]
        for number in numbers:
            if stopping is not None and stopping.is_set():
                return num_events
            last = number
            latest_at = max(latest_at, _add_seal(engine, number, writer))
            if writer.num_events >= EVENTS_PER_FILE:
                break
        span = Span(first, last)
        archive.write(span, writer.finish(first, last, latest_at))
        drop_archived(engine, archive, span, stopping)
        num_events += writer.num_events
        numbers = [number for number in numbers if number > last]
    return num_events


def _reading(engine: Engine) -> Engine:
    """On SQLite without the write lock."""
    return engine.execution_options(sqlite_begin="")


def _seals(engine: Engine, start: int, before: datetime) -> list[int]:
    """Up to the first that is to be kept, as a file has all the seals it is named by. One that is
    stamped after now, by a clock that was wrong, is as old as those on both sides of it."""
    later = select(_seal.c.number, _seal.c.created_at).where(_seal.c.number >= start)
    in_order = later.order_by(_seal.c.number)
    kept = in_order.where(_seal.c.created_at >= before, _seal.c.created_at <= clock.now())
    with _reading(engine).begin() as connection:
        first_kept = connection.scalar(kept.limit(1))
        if first_kept is not None:
            in_order = in_order.where(_seal.c.number < first_kept)
        rows = list(connection.execute(in_order))
    while rows and rows[-1].created_at >= before:
        rows.pop()
    if not any(row.created_at < before - LEAST_AGE for row in rows):
        return []
    return [row.number for row in rows]


def _add_seal(engine: Engine, number: int, writer: ArchiveWriter) -> str:
    """The receipts of a seal, some transactions at a time. Returns when the last of them ended or
    was posted; an instant after now is one of a clock that was wrong, and does not count."""
    query = (
        select(_transaction.c.id, _transaction.c.content_sha256, _transaction.c.created_at)
        .join(_sealed, _sealed.c.ledger_transaction_id == _transaction.c.id)
        .where(_sealed.c.seal_number == number, _transaction.c.kind == "usage")
        .order_by(_sealed.c.position)
    )
    with _reading(engine).begin() as connection:
        rows = connection.execute(query).all()
    latest_at, now = "", instant_text(clock.now())
    for some in blocks_of(rows, TRANSACTIONS_AT_ONCE):
        with _reading(engine).begin() as connection:
            receipts = read_receipts(connection, [row.id for row in some])
        for row in some:
            own = receipts.get(row.id, [])
            writer.add(row.id, own, _checked_root(row.id, own, row.content_sha256))
            instants = (instant_text(row.created_at), *(each.finished_at for each in own))
            latest_at = max(latest_at, *(at for at in instants if at <= now), "")
    return latest_at


def _checked_root(transaction_id: str, receipts: list[ReceiptRecord], content_sha256: str) -> bytes:
    """The root of the receipts, which is what the ledger has. Transactions from before there were
    roots have none there."""
    root = merkle_root([receipt.canonical for receipt in receipts])
    if content_sha256 and root.hex() != content_sha256:
        raise NotWhatWasSealed(
            f"the receipts of ledger transaction {transaction_id} are not those it was made of"
        )
    return root


def drop_archived(
    engine: Engine, archive: UsageArchive, span: Span, stopping: threading.Event | None = None
) -> None:
    """Deletes what a file has, as it is read back from the disk, from the database: little at a
    time, with as long a pause for those who settle."""
    for some in _batches(archive.transactions(span)):
        if stopping is not None and stopping.is_set():
            return
        with _reading(engine).begin() as connection:
            event_ids = _same_in_database(connection, some)
        if not event_ids:
            continue
        started = time.monotonic()
        with engine.begin() as connection:
            connection.execute(delete(_line).where(_line.c.event_id.in_(event_ids)))
            connection.execute(delete(_event).where(_event.c.id.in_(event_ids)))
            failpoint("archiving.before_commit")
        failpoint("archiving.after_commit")
        time.sleep(time.monotonic() - started)


def _batches(transactions: Iterable[ArchivedTransaction]) -> Iterator[list[ArchivedTransaction]]:
    batch: list[ArchivedTransaction] = []
    num_events = 0
    for transaction in transactions:
        batch.append(transaction)
        num_events += len(transaction.receipts)
        if num_events >= EVENTS_PER_DELETE or len(batch) >= TRANSACTIONS_AT_ONCE:
            yield batch
            batch, num_events = [], 0
    if batch:
        yield batch


def _same_in_database(connection: Connection, transactions: list[ArchivedTransaction]) -> list[str]:
    """The ids of those receipts that the database has as well, which never change there. Raises
    `NotWhatWasSealed` where it has something else than the archive."""
    stored = read_receipts(connection, [transaction.id for transaction in transactions])
    for transaction in transactions:
        own = stored.get(transaction.id)
        if own is not None and own != transaction.receipts:
            raise NotWhatWasSealed(
                f"the archive has other receipts of ledger transaction {transaction.id} than the "
                "database"
            )
    return [receipt.event_id for receipts in stored.values() for receipt in receipts]


def _has_rows(engine: Engine, span: Span) -> bool:
    """Whether a receipt of these seals is in the database."""
    query = (
        select(_event.c.id)
        .join(_sealed, _sealed.c.ledger_transaction_id == _event.c.ledger_transaction_id)
        .where(_sealed.c.seal_number >= span.first_seal, _sealed.c.seal_number <= span.last_seal)
    )
    with _reading(engine).begin() as connection:
        return connection.scalar(query.limit(1)) is not None
