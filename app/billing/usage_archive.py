"""The directory of archive files: writing one durably, and finding one request in it.

Owns names and the search; the files' bytes are `archive_file.py`'s, what is put into them
`archiving.py`'s. Every method blocks.
"""

import logging
import os
import re
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, NamedTuple

from app.billing.archive_file import (
    ArchivedTransaction,
    DamagedArchive,
    Header,
    read_header,
    read_random,
    read_transaction_at,
    read_transactions,
)
from app.billing.columns import RANDOM_BYTES
from app.core import clock
from app.core.errors import Unavailable
from app.core.failpoints import failpoint
from app.core.ids import id_parts
from app.core.storage import fsync_directory

NUM_FOUND_KEPT = 16
# Longer than anything takes that reads requests: what is about to be moved is as good as gone.
ABOUT_TO_GO = timedelta(hours=1)
INSTANT = timedelta(microseconds=1)  # what times are told to
NOTHING_ARCHIVED = datetime(1970, 1, 1, tzinfo=UTC)
_NAME = re.compile(r"(\d{12})-(\d{12})\.usage")

log = logging.getLogger(__name__)


class Span(NamedTuple):
    """The seals that a file has all requests of."""

    first_seal: int
    last_seal: int


def detail_from(detail_days: int, archived_until: datetime) -> datetime:
    """From when on the database has every single request, by its end as by its posting. What was
    archived while fewer days were kept does not come back with more of them."""
    about_to_go = clock.now() - timedelta(days=detail_days) + ABOUT_TO_GO
    return max(about_to_go, archived_until + INSTANT)


class UsageArchive:
    """Files are named by the seals they are of, which follow each other without a gap."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._headers: dict[Span, Header] = {}
        self._found: dict[str, ArchivedTransaction] = {}  # of late
        self._until: tuple[int, datetime] | None = None  # of the directory as last changed then

    def spans(self) -> list[Span]:
        """In order."""
        matches = (_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(Span(int(match[1]), int(match[2])) for match in matches if match)

    def path(self, span: Span) -> Path:
        return self.directory / f"{span.first_seal:012d}-{span.last_seal:012d}.usage"

    def archived_until(self) -> datetime:
        """No request that ended or was posted later has left the database. Cheap while no file
        is added or removed."""
        changed_ns = self.directory.stat().st_mtime_ns
        if self._until is not None and self._until[0] == changed_ns:
            return self._until[1]
        until = max(map(self._latest_at, self.spans()), default=NOTHING_ARCHIVED)
        # A file that comes within the same tick of the file system's clock shows in no time.
        if time.time_ns() - changed_ns > 2 * 10**9:
            self._until = changed_ns, until
        return until

    def _latest_at(self, span: Span) -> datetime:
        """Of a file that cannot tell, when it was written: sums are answered all the same."""
        try:
            header = self._header(span)
        except DamagedArchive:
            header = None
        if header is not None and header.latest_at:
            return datetime.fromisoformat(header.latest_at)
        if header is not None and not header.num_events:
            return NOTHING_ARCHIVED
        return datetime.fromtimestamp(int(self.path(span).stat().st_mtime) + 1, UTC)

    def write(self, span: Span, content: bytes) -> None:
        """Under its name once it is durable, so that a file there is always whole."""
        path = self.path(span)
        unfinished = path.with_suffix(".new")
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            failpoint("usage_archive.before_fsync")
            os.fsync(file.fileno())
        failpoint("usage_archive.before_rename")
        unfinished.replace(path)
        fsync_directory(self.directory)
        failpoint("usage_archive.after_rename")

    def transactions(self, span: Span) -> Iterator[ArchivedTransaction]:
        """Everything in one file. Raises `DamagedArchive`, naming the file."""
        with self._opened(span) as file:
            yield from read_transactions(file)

    def span_of(self, seal_number: int) -> Span | None:
        """The file that has the requests of this seal."""
        return next((s for s in self.spans() if s.first_seal <= seal_number <= s.last_seal), None)

    def find(self, request_id: str) -> ArchivedTransaction | None:
        """The transaction that settled a request last. Files that cannot be read take nothing away
        from the others. Raises `Unavailable` where one of them may have it."""
        found = self._found.get(request_id)
        if found is not None:
            return found
        damaged: Span | None = None
        for span in self.spans():
            try:
                found = self._found_in(span, request_id) or found
            except DamagedArchive as error:
                log.warning("a file of archived usage cannot be read: %s", error)
                damaged = damaged or span
        if damaged is None:
            if found is not None:
                self._remember(request_id, found)
        elif found is None:
            raise Unavailable(
                f"The archive file {self.path(damaged).name} is damaged, so it cannot be said "
                f"whether there is a receipt for {request_id!r}. The operator can bring the file "
                "back from a backup.",
                code="archive_damaged",
            )
        return found

    def _found_in(self, span: Span, request_id: str) -> ArchivedTransaction | None:
        """The last of one file. Raises `DamagedArchive`."""
        found: ArchivedTransaction | None = None
        for event in self._places(span, request_id):
            with self._opened(span) as file:
                transaction = read_transaction_at(file, event)
            events = (receipt.event_id for receipt in transaction.receipts)
            if any(each.rpartition(":")[0] == request_id for each in events):
                found = transaction
        return found

    def _remember(self, request_id: str, found: ArchivedTransaction) -> None:
        """Whoever asks for a receipt asks for its proof next, and reading a file takes long."""
        if len(self._found) >= NUM_FOUND_KEPT:
            self._found.clear()
        self._found[request_id] = found

    def _places(self, span: Span, request_id: str) -> Iterator[int]:
        """Which events of a file may be the request's. An id tells when it was made, and its random
        bytes can be looked for as they are."""
        header = self._header(span)
        parts = id_parts(request_id, "req")
        if parts is None:
            yield from range(header.num_events if header.odd_ids else 0)
            return
        made_ms, random = parts
        if not header.from_ms <= made_ms <= header.until_ms:
            return
        with self._opened(span) as file:
            column = read_random(file)
        start = column.find(random)
        while start >= 0:
            if start % RANDOM_BYTES == 0:
                yield start // RANDOM_BYTES
            start = column.find(random, start + 1)

    def _header(self, span: Span) -> Header:
        header = self._headers.get(span)
        if header is None:
            with self._opened(span) as file:
                header = self._headers[span] = read_header(file)
        return header

    @contextmanager
    def _opened(self, span: Span) -> Generator[BinaryIO]:
        """Raises `DamagedArchive`, naming the file, for all that keeps it from being read."""
        path = self.path(span)
        try:
            with path.open("rb") as file:
                yield file
        except DamagedArchive as error:
            raise DamagedArchive(f"{path}: {error}") from error
        except OSError as error:
            raise DamagedArchive(f"{path} cannot be read: {error.strerror}") from error
