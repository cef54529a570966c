"""The write-ahead journal: nothing leaves the box before its record is durable.

Owns the writing thread, group commit, and which segments may be deleted. What records mean is
in `records.py`, how they lie on disk in `segments.py`.
"""

import asyncio
import fcntl
import logging
import os
import queue
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from app.core.errors import Conflict, Unavailable
from app.core.failpoints import failpoint
from app.core.ids import new_id
from app.core.storage import fsync_directory
from app.metering.open_requests import OpenRequests
from app.metering.records import (
    AdmitRecord,
    FinishRecord,
    SettledRecord,
    StepRecord,
    Tally,
    Usage,
    use_of,
)
from app.metering.segments import (
    Segment,
    SegmentReader,
    encode,
    segment_numbers,
    segment_path,
)
from runtime.protocol import SequenceOutput

SEGMENT_BYTES = 32 * 1024**2
MAX_USES = 50_000  # in one record, some 5 MB; see `MAX_RECORD_BYTES`
LAZY_SECONDS = 0.02  # how long a record that nothing waits for may stay in memory

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """One thing for the writing thread to do."""

    payload: bytes
    waiter: "asyncio.Future[None] | None" = None  # resolved once durable
    admitted: str | None = None
    settled: tuple[str, ...] = ()


class _Entries:
    """What is to be written: `urgent` wakes the thread, `deferred` goes before what woke it."""

    def __init__(self) -> None:
        self.urgent: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self.deferred: deque[Entry] = deque()
        self.is_ended = False  # nobody takes any more

    def put(self, entry: Entry) -> bool:
        """Whether somebody will answer its waiter."""
        self.urgent.put(entry)
        return not self.is_ended  # asked last: `end` finds whatever came before it

    def end(self) -> "list[asyncio.Future[None]]":
        """Takes no more, and returns who still waits."""
        self.is_ended = True
        self.deferred.clear()
        waiters: list[asyncio.Future[None]] = []
        while not self.urgent.empty():
            entry = self.urgent.get()
            if entry is not None and entry.waiter is not None:
                waiters.append(entry.waiter)
        return waiters

    def take(self) -> tuple[list[Entry], bool]:
        """Waits, then returns everything, and whether the end was asked for."""
        urgent = [self.urgent.get()]
        while urgent[-1] is not None:
            try:
                urgent.append(self.urgent.get_nowait())
            except queue.Empty:
                break
        batch: list[Entry] = []
        while self.deferred:
            batch.append(self.deferred.popleft())
        batch += [entry for entry in urgent if entry is not None]
        return batch, urgent[-1] is None


class Journal:
    """One directory of segments, used by one process at a time.

    `start` returns what earlier processes left unsettled. Afterwards every method may be called
    from the event loop; `settled` from any thread. An error that nobody foresaw ends the writing
    for good: whoever waits and whoever comes then gets `Unavailable`.
    """

    def __init__(self, directory: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.directory = directory
        self.id = ""
        self.open_requests = OpenRequests()
        self._segment_bytes = segment_bytes
        self._entries = _Entries()
        self._flush: asyncio.TimerHandle | None = None
        self._thread: threading.Thread | None = None
        self._lock_descriptor: int | None = None

    async def start(self) -> list[Usage]:
        """Takes the directory, reads what is there and begins a new segment.

        Raises `Conflict` when another process uses the directory.
        """
        self._lock_descriptor = _lock(self.directory)
        self.id = _directory_id(self.directory)
        recovery = await asyncio.to_thread(read_unsettled, self.directory)
        self.open_requests.admit(usage.admitted.request_id for usage in recovery.usages)
        failpoint("journal.after_recovery")
        self._loop = asyncio.get_running_loop()
        writer = _Writer(self.directory, self._segment_bytes, recovery.open_segments)
        self._thread = threading.Thread(
            target=writer.run, args=(self._entries, self._loop), name="journal", daemon=True
        )
        self._thread.start()
        return recovery.usages

    async def close(self) -> None:
        """Writes what is queued, then stops the thread and frees the directory."""
        if self._flush is not None:
            self._flush.cancel()
        if self._thread is not None:
            self._entries.urgent.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None

    @property
    def is_alive(self) -> bool:
        """Whether records are still written."""
        return self._thread is not None and not self._entries.is_ended

    def admit(self, record: AdmitRecord) -> None:
        """Not awaited: the first commit of the request's own output covers it. It is written
        within `LAZY_SECONDS` even if no output comes."""
        self.open_requests.admit((record.request_id,))
        self._defer(Entry(encode(record), admitted=record.request_id))

    async def commit_step(self, outputs: list[SequenceOutput]) -> None:
        """Returns once the record of this step is durable. Raises `Unavailable` if it cannot be:
        the outputs must then not be delivered."""
        uses = [use_of(output) for output in outputs]
        now_ns = time.time_ns()
        # A worker may send more outputs in one step than one record is allowed to hold.
        parts = (uses[at : at + MAX_USES] for at in range(0, len(uses), MAX_USES))
        await self._commit(b"".join(encode(StepRecord(now_ns, part)) for part in parts))

    async def finish(self, record: FinishRecord) -> None:
        """Returns once the end of the request is durable, or raises `Unavailable`."""
        await self._commit(encode(record))

    def note_finish(self, record: FinishRecord) -> None:
        """As `finish`, for an end that nothing waits for."""
        self._defer(Entry(encode(record)))

    def settled(self, request_ids: list[str]) -> None:
        """These are in the database for good. Any thread may call this. The mark spares recovery
        work for as long as the database tells what it has; see `sync`."""
        self.open_requests.settle(request_ids)
        if not self._entries.is_ended:
            payload = encode(SettledRecord(request_ids))
            self._entries.deferred.append(Entry(payload, settled=tuple(request_ids)))
            self._loop.call_soon_threadsafe(self._flush_soon)

    async def sync(self) -> None:
        """Returns once everything told so far is durable, marks of what is settled included. To be
        called before usage leaves the database, which from then on cannot tell that a request was
        settled. Raises `Unavailable`."""
        await self._commit(b"")

    def _defer(self, entry: Entry) -> None:
        """Written with the next commit, which it must not wake the thread for. Once the thread
        has ended, no output of the request can be delivered either."""
        if self._entries.is_ended:
            return
        self._entries.deferred.append(entry)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self._flush is None:
            self._flush = self._loop.call_later(LAZY_SECONDS, self._flush_deferred)

    def _flush_deferred(self) -> None:
        self._flush = None
        if self._entries.deferred:
            self._entries.urgent.put(Entry(b""))

    async def _commit(self, payload: bytes) -> None:
        waiter = self._loop.create_future()
        if not self._entries.put(Entry(payload, waiter)):
            waiter.cancel()
            raise _unavailable()
        await waiter


class _Writer:
    """The thread's own state: the open segment and which requests keep which segment alive."""

    def __init__(self, directory: Path, segment_bytes: int, open_segments: dict[str, int]) -> None:
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._open_segments = open_segments  # request id -> segment of its first record
        self._segment: Segment | None = None
        self._next_number = max(segment_numbers(directory), default=0) + 1
        self._oldest_number = min(segment_numbers(directory), default=self._next_number)
        self._carried: list[Entry] = []  # what of an unwritten batch still has to be kept

    def run(self, entries: _Entries, loop: asyncio.AbstractEventLoop) -> None:
        try:
            is_closing = False
            while not is_closing:
                is_closing = self._turn(entries, loop)
        except Exception:
            log.exception("the journal in %s has stopped; restart the box", self._directory)
        finally:
            waiters = entries.end()
            self._drop_segment()
            if waiters:
                loop.call_soon_threadsafe(_resolve, waiters, False)

    def _turn(self, entries: _Entries, loop: asyncio.AbstractEventLoop) -> bool:
        """Writes what there is and answers who waits for it; returns whether to end."""
        batch, is_closing = entries.take()
        waiters = [entry.waiter for entry in batch if entry.waiter is not None]
        is_durable = False
        try:
            is_durable = self._write(batch, is_sync=bool(waiters) or is_closing)
        except Exception:
            waiters += entries.end()  # before anybody is told: who hears of it finds it ended
            raise
        finally:
            if waiters:
                loop.call_soon_threadsafe(_resolve, waiters, is_durable)
        return is_closing

    def _write(self, batch: list[Entry], *, is_sync: bool) -> bool:
        """After an error the segment's end is not to be trusted: the next batch opens another."""
        batch = self._carried + batch
        try:
            if batch:
                self._append(batch, is_sync=is_sync)
        except OSError as error:
            log.error("the journal in %s cannot be written: %s", self._directory, error)
            self._drop_segment()
            self._carried = [e._replace(waiter=None) for e in batch if e.admitted or e.settled]
            return False
        self._carried = []
        return True

    def _drop_segment(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            with suppress(OSError):  # what was to be durable was synced before
                segment.close()

    def _append(self, batch: list[Entry], *, is_sync: bool) -> None:
        if self._segment is None:
            number, self._next_number = self._next_number, self._next_number + 1
            self._segment = Segment(self._directory, number)
        segment = self._segment
        segment.append([entry.payload for entry in batch])
        if is_sync:
            segment.sync()
        for entry in batch:
            if entry.admitted is not None:
                self._open_segments[entry.admitted] = segment.number
            for request_id in entry.settled:
                self._open_segments.pop(request_id, None)
        if segment.size_bytes >= self._segment_bytes:
            segment.sync()
            self._segment = None
            segment.close()
            failpoint("journal.after_rotation")
        if self._oldest_number < segment.number:
            self._delete_settled(segment.number)

    def _delete_settled(self, newest: int) -> None:
        """Records of a request never precede its admission, so everything older than the oldest
        open admission is done with."""
        oldest = min(self._open_segments.values(), default=newest)
        for number in range(self._oldest_number, min(oldest, newest)):
            failpoint("journal.before_delete")
            segment_path(self._directory, number).unlink(missing_ok=True)
            failpoint("journal.after_delete")
        self._oldest_number = max(self._oldest_number, min(oldest, newest))


def _resolve(waiters: "list[asyncio.Future[None]]", is_durable: bool) -> None:
    for waiter in waiters:
        if waiter.done():  # whoever waited was cancelled
            continue
        if is_durable:
            waiter.set_result(None)
        else:
            waiter.set_exception(_unavailable())


def _unavailable() -> Unavailable:
    return Unavailable(
        "The box cannot record usage at the moment, so it answers nothing.",
        code="journal_unavailable",
        retry_after_seconds=5,
    )


class Recovery(NamedTuple):
    """What a journal's segments hold that is not settled yet."""

    usages: list[Usage]
    open_segments: dict[str, int]


def read_unsettled(directory: Path) -> Recovery:
    """Adds up every request that has no settled mark. One that neither finished nor was ended is
    `lost`. Logs the bytes of segment ends that could not be read."""
    tallies: dict[str, Tally] = {}
    ends: dict[str, FinishRecord] = {}
    last_at_ns: dict[str, int] = {}
    segments: dict[str, int] = {}
    for number in segment_numbers(directory):
        reader = SegmentReader(segment_path(directory, number))
        for record in reader:
            if isinstance(record, AdmitRecord):
                tallies.setdefault(record.request_id, Tally(record))
                segments.setdefault(record.request_id, number)
            elif isinstance(record, StepRecord):
                for use in record.uses:
                    if use.request_id in tallies:
                        tallies[use.request_id].add(use, record.at_ns)
                        last_at_ns[use.request_id] = record.at_ns
            elif isinstance(record, FinishRecord):
                ends[record.request_id] = record
            else:
                for request_id in record.request_ids:
                    tallies.pop(request_id, None)
                    segments.pop(request_id, None)
        if reader.num_unread_bytes:
            log.warning("%s: %d bytes unread", reader.path.name, reader.num_unread_bytes)
    usages = [
        _closed(tally, ends.get(request_id), last_at_ns.get(request_id))
        for request_id, tally in tallies.items()
    ]
    return Recovery(usages, segments)


def _closed(tally: Tally, end: FinishRecord | None, last_at_ns: int | None) -> Usage:
    if end is not None:
        tally.close(end)
        return tally.usage(end.outcome, end.finish_reason, end.at_ns)
    outcome, reason = tally.outcome()
    if outcome == "cancelled" and not tally.admitted.is_stream:
        # Nothing of it was delivered, and nobody knows any more who ended it.
        outcome, reason = "lost", "lost"
    return tally.usage(outcome, reason, last_at_ns or tally.admitted.started_at_ns)


def _lock(directory: Path) -> int:
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise Conflict(f"Another process already uses the journal in {directory}.") from error
    return descriptor


def _directory_id(directory: Path) -> str:
    """The name under which this journal's process takes holds; made at first use, and durable
    before it is used: holds of a name that was lost would be nobody's."""
    path = directory / "id"
    if not path.exists():
        fresh = path.with_suffix(".new")
        with fresh.open("w") as file:
            file.write(new_id("jnl"))
            file.flush()
            os.fsync(file.fileno())
        failpoint("journal.before_identity")
        fresh.rename(path)
        fsync_directory(directory)
        failpoint("journal.after_identity")
    return path.read_text()
