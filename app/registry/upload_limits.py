"""What may begin: an upload that fits the box's limits, its organization's and the disk."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

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
FORM_COPIES = 2  # a form's file lies in a temporary one first, mostly on the same disk


class UploadLimits:
    """The settings' limits, and the disk's."""

    def __init__(self, storage: Storage, settings: Settings) -> None:
        self._storage = storage
        self.max_bytes = settings.max_upload_bytes
        self.max_open = settings.max_open_uploads
        self.quota_bytes = settings.upload_quota_bytes or QUOTA_FACTOR * self.max_bytes
        # Files that arrive in forms: whose, and their bytes; by whatever tells the forms apart.
        self._forms: dict[object, tuple[str, int]] = {}

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
    ) -> AsyncGenerator[None]:
        """While a form arrives that holds a file of `num_bytes`: it counts like an upload under
        way. Raises what `check_length` and `check_room` do."""
        form = object()
        try:
            async with database.write() as session:
                await self._check_form(session, organization_id, num_bytes)
                self._forms[form] = (organization_id, num_bytes)
            yield
        finally:
            self._forms.pop(form, None)

    async def _check_form(
        self, session: AsyncSession, organization_id: str, num_bytes: int
    ) -> None:
        """A file of a form needs room for a temporary one too."""
        self.check_length(num_bytes)
        await self.check_room(session, organization_id, num_bytes, copies=FORM_COPIES)
        needed = num_bytes + sum(other for _, other in self._forms.values())
        if needed > shutil.disk_usage(tempfile.gettempdir()).free:
            raise StorageFull(
                "The box has no room for the temporary file of this form. Use the page with "
                "JavaScript or `tapeout push`, which need none, or free disk."
            )

    async def check_room(
        self, session: AsyncSession, organization_id: str, length_bytes: int, copies: int = 1
    ) -> None:
        """Whether the organization and the disk have room for one more, together with all that
        is still to come of others that bytes came of lately: what was only announced takes no
        room from anybody. Raises `Conflict`, `TooLarge` or `StorageFull`."""
        await self._check_organization(session, organization_id, length_bytes)
        rows = await session.execute(
            select(Upload.id, Upload.length_bytes).where(Upload.status == "receiving")
        )
        others = [(upload_id, length) for upload_id, length in rows]
        outstanding = await asyncio.to_thread(self._outstanding_bytes, others)
        in_forms = FORM_COPIES * sum(num_bytes for _, num_bytes in self._forms.values())
        self._storage.require_space(copies * length_bytes + outstanding + in_forms)

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
        in_forms = [n for owner_id, n in self._forms.values() if owner_id == organization_id]
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

    def _outstanding_bytes(self, uploads: Sequence[tuple[str, int]]) -> int:
        """What those under way have still to bring: announced, less what lies on the disk."""
        total = 0
        earliest = clock.now() - RECENT
        for upload_id, length_bytes in uploads:
            path = self._storage.upload(upload_id)
            arrived_at = last_byte_at(path)
            if arrived_at is not None and arrived_at > earliest:
                with suppress(FileNotFoundError):  # discarded meanwhile
                    total += length_bytes - path.stat().st_size
        return total


def last_byte_at(path: Path) -> datetime | None:
    """When a byte of the upload at `path` came last; none where none came, or it is gone."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return datetime.fromtimestamp(found.st_mtime, UTC) if found.st_size else None
