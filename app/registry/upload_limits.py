"""What may begin: an upload that fits the box's limits, its organization's and the disk."""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.core.database import Database
from app.core.errors import Conflict, InvalidRequest, StorageFull, TooLarge
from app.core.storage import Storage
from app.organizations.tables import Organization
from app.registry.tables import Upload
from app.settings import Settings

QUOTA_FACTOR = 4  # an organization's quota where none is set, in largest uploads
RECENT = timedelta(minutes=10)
EXPECTED_BYTES = 1024**3  # of an organization's uploads under way, before they have brought as much
FORM_COPIES = 2  # a form's file lies in a temporary one first, mostly on the same disk
FORM_CHECK_BYTES = 1024**2  # of a form, after which the disk is looked at again


class UnderWay(NamedTuple):
    """An upload that bytes came of lately: what it has brought, and what it says is to come."""

    organization_id: str
    brought_bytes: int
    missing_bytes: int


class ArrivingForm:
    """A form with a file of `num_bytes`, as it arrives in a temporary file."""

    def __init__(self, storage: Storage, organization_id: str, num_bytes: int) -> None:
        self._storage = storage
        self.organization_id = organization_id
        self.num_bytes = num_bytes
        self.brought_bytes = 0
        self._checked_bytes = 0

    def came(self, num_bytes: int) -> None:
        """So many bytes of it. Raises `StorageFull` once others have taken the disk meanwhile."""
        self.brought_bytes += num_bytes
        if self.brought_bytes - self._checked_bytes >= FORM_CHECK_BYTES:
            self._checked_bytes = self.brought_bytes
            try:
                self._storage.require_space(0)
            except StorageFull:
                raise form_does_not_fit() from None

    def under_way(self, copies: int) -> UnderWay:
        """With what is still to be written of it, in so many files."""
        missing_bytes = max(copies * self.num_bytes - self.brought_bytes, 0)
        return UnderWay(self.organization_id, self.brought_bytes, missing_bytes)


class UploadLimits:
    """The settings' limits, and the disk's."""

    def __init__(self, storage: Storage, settings: Settings) -> None:
        self._storage = storage
        self.max_bytes = settings.max_upload_bytes
        self.max_open = settings.max_open_uploads
        self.quota_bytes = settings.upload_quota_bytes or QUOTA_FACTOR * self.max_bytes
        self._forms: set[ArrivingForm] = set()

    def check_length(self, length_bytes: int) -> None:
        """Raises `InvalidRequest` for an empty file, `TooLarge` beyond the largest upload."""
        if length_bytes < 1:
            raise InvalidRequest("The file is empty.", param="Upload-Length", code="empty")
        if length_bytes > self.max_bytes:
            raise TooLarge(
                f"The file has {length_bytes:,} bytes; the largest upload this box accepts is "
                f"{self.max_bytes:,}. Its operator can raise that with TAPEOUT_MAX_UPLOAD."
            )

    @asynccontextmanager
    async def counting_form(
        self, database: Database, organization_id: str, num_bytes: int
    ) -> AsyncGenerator[ArrivingForm]:
        """While a form arrives that holds a file of `num_bytes`: it counts like an upload under
        way. Raises what `check_length` and `check_room` do."""
        form = ArrivingForm(self._storage, organization_id, num_bytes)
        try:
            async with database.write() as session:
                await self._check_form(session, organization_id, num_bytes)
                self._forms.add(form)
            yield form
        finally:
            self._forms.discard(form)

    async def _check_form(
        self, session: AsyncSession, organization_id: str, num_bytes: int
    ) -> None:
        """A file of a form needs room for a temporary one too."""
        self.check_length(num_bytes)
        await self.check_room(session, organization_id, num_bytes, copies=FORM_COPIES)
        others = expected_bytes(form.under_way(copies=1) for form in self._forms)
        if num_bytes + others > shutil.disk_usage(tempfile.gettempdir()).free:
            raise form_does_not_fit()

    async def check_room(
        self, session: AsyncSession, organization_id: str, length_bytes: int, copies: int = 1
    ) -> None:
        """Whether the organization and the disk have room for one more, together with all that
        can be expected of those under way: what was only announced takes no room from anybody.
        Raises `Conflict`, `TooLarge` or `StorageFull`."""
        await self._check_organization(session, organization_id, length_bytes)
        rows = await session.execute(
            select(Upload.id, Upload.organization_id, Upload.length_bytes).where(
                Upload.status == "receiving"
            )
        )
        others = [(upload_id, owner_id, length) for upload_id, owner_id, length in rows]
        # Not in a thread: while there is none, the transaction would hold up everybody's.
        under_way = self._under_way(others)
        under_way += [form.under_way(FORM_COPIES) for form in self._forms]
        self._storage.require_space(copies * length_bytes + expected_bytes(under_way))

    async def _check_organization(
        self, session: AsyncSession, organization_id: str, length_bytes: int
    ) -> None:
        # The lock keeps uploads created at the same moment from passing the quota together.
        await session.execute(
            select(Organization.id).where(Organization.id == organization_id).with_for_update()
        )
        num_open, num_bytes = (
            await session.execute(
                select(
                    func.count().filter(Upload.status == "receiving"),
                    func.coalesce(func.sum(Upload.length_bytes), 0),
                ).where(Upload.organization_id == organization_id, Upload.status != "expired")
            )
        ).one()
        in_forms = [f.num_bytes for f in self._forms if f.organization_id == organization_id]
        num_open, num_bytes = num_open + len(in_forms), num_bytes + sum(in_forms)
        if num_open >= self.max_open:
            raise Conflict(
                f"{num_open} uploads are unfinished, which is as many as may be. Finish or "
                "discard one first; the console's page Upload lists them.",
                code="too_many_uploads",
            )
        if num_bytes + length_bytes > self.quota_bytes:
            raise TooLarge(
                f"Your organization's uploads hold {num_bytes:,} of the {self.quota_bytes:,} bytes "
                f"they may, and this one has {length_bytes:,}. An upload is removed a day "
                "after its last use; discard some on the console's page Upload to go on now.",
                code="quota_exceeded",
            )

    def _under_way(self, uploads: Sequence[tuple[str, str, int]]) -> list[UnderWay]:
        """Those that got a byte lately, of these: ids, whose they are, and their lengths."""
        earliest = clock.now() - RECENT
        found: list[UnderWay] = []
        for upload_id, organization_id, length_bytes in uploads:
            path = self._storage.upload(upload_id)
            arrived_at = last_byte_at(path)
            if arrived_at is not None and arrived_at > earliest:
                try:
                    brought_bytes = path.stat().st_size
                except FileNotFoundError:  # discarded meanwhile
                    continue
                missing_bytes = length_bytes - brought_bytes
                found.append(UnderWay(organization_id, brought_bytes, missing_bytes))
        return found


def form_does_not_fit() -> StorageFull:
    """Before a form arrives, or once others have taken the disk meanwhile."""
    return StorageFull(
        "The box has no room for the temporary file of this form. Use the page with JavaScript or "
        "`tapeout push`, which need none, or free disk."
    )


def expected_bytes(under_way: Iterable[UnderWay]) -> int:
    """What they have still to bring; but of each organization, however much it announces, no more
    than as much again as it has brought."""
    brought: defaultdict[str, int] = defaultdict(int)
    missing: defaultdict[str, int] = defaultdict(int)
    for upload in under_way:
        brought[upload.organization_id] += upload.brought_bytes
        missing[upload.organization_id] += upload.missing_bytes
    return sum(min(missing[each], max(brought[each], EXPECTED_BYTES)) for each in missing)


def last_byte_at(path: Path) -> datetime | None:
    """When a byte of the upload at `path` came last; none where none came, or it is gone."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return datetime.fromtimestamp(found.st_mtime, UTC) if found.st_size else None
