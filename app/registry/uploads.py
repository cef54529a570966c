"""Resumable uploads: bytes that arrive in pieces, in order, over any number of connections.

Owns the files under `uploads/` and their rows. The bytes of an upload are exactly its file:
the file's size is the offset, so a cut or a killed server loses nothing that was written; only a
piece with a checksum counts as a whole (`piece_mark.py`). The HTTP side (tus) is
`app/api/uploads.py`; what is inside a file is `inspection.py`'s.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Select, delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.core.database import Database
from app.core.errors import AppError, Conflict, NotFound, StorageFull
from app.core.ids import new_id
from app.core.storage import Storage
from app.organizations.principal import Principal
from app.registry import piece_mark
from app.registry.received_file import Checksum, ReceivedFile, disk_full
from app.registry.tables import ModelVersion, Upload
from app.registry.transfers import Source, Transfer
from app.registry.upload_limits import ArrivingForm, UploadLimits, last_byte_at
from app.settings import Settings

LIFETIME = timedelta(hours=24)  # since the last byte
EMPTY_LIFETIME = timedelta(hours=1)  # of an upload that no byte came of
METADATA_SUFFIX = ".metadata"
MAX_FILENAME_CHARS = 255

T = TypeVar("T")


class ChecksumMismatch(AppError):
    """The piece arrived damaged; nothing of it was kept. 460 is the tus protocol's."""

    status, type, default_code = 460, "invalid_request_error", "checksum_mismatch"


class UploadGone(NotFound):
    """It was there once."""

    status, default_code = 410, "upload_expired"


class UploadStore:
    """Every upload of the box."""

    def __init__(self, database: Database, storage: Storage, settings: Settings) -> None:
        self._database = database
        self._storage = storage
        self._limits = UploadLimits(storage, settings)
        self.max_bytes = settings.max_upload_bytes
        self._transfers: dict[str, Transfer] = {}

    async def create(
        self, principal: Principal, filename: str, length_bytes: int, metadata: str = ""
    ) -> Upload:
        """A new, empty upload; `metadata` is tus's header, kept for whoever asks. Raises what
        `UploadLimits` does, before anything of the file has travelled."""
        principal.require("write")
        self._limits.check_length(length_bytes)
        moment = clock.now()
        upload = Upload(
            id=new_id("upload"),
            organization_id=principal.organization_id,
            filename=clean_filename(filename),
            length_bytes=length_bytes,
            received_bytes=0,
            sha256=None,
            status="receiving",
            created_at=moment,
            expires_at=moment + EMPTY_LIFETIME,
        )
        async with self._database.write() as session:
            await self._limits.check_room(session, upload.organization_id, length_bytes)
            session.add(upload)
        await asyncio.to_thread(self._touch, upload.id, metadata)
        return upload

    @asynccontextmanager
    async def receiving_form(
        self, principal: Principal, num_bytes: int
    ) -> AsyncGenerator[ArrivingForm]:
        """While a form arrives that holds a file of `num_bytes`, which then is made an upload; it
        is to be told what comes. Raises what `create` does, before anything of it has travelled."""
        principal.require("write")
        organization_id = principal.organization_id
        async with self._limits.counting_form(self._database, organization_id, num_bytes) as form:
            yield form

    def _touch(self, upload_id: str, metadata: str) -> None:
        if metadata:
            path = self._metadata_path(upload_id)
            path.touch(0o600)
            path.write_text(metadata)
        self._storage.upload(upload_id).touch(0o600)

    def _metadata_path(self, upload_id: str) -> Path:
        return self._storage.upload(f"{upload_id}{METADATA_SUFFIX}")

    async def metadata(self, upload_id: str) -> str:
        """tus's header as it came with the creation; the caller has found the upload."""
        try:
            return await asyncio.to_thread(self._metadata_path(upload_id).read_text)
        except FileNotFoundError:
            return ""

    async def list_open(self, organization_id: str) -> list[Upload]:
        """Those that bytes are missing of, with their true offsets, newest first."""
        async with self._database.read() as session:
            rows = await session.scalars(
                select(Upload)
                .where(Upload.organization_id == organization_id, Upload.status == "receiving")
                .order_by(Upload.created_at.desc(), Upload.id)
            )
            uploads = list(rows)
        for upload in uploads:
            with suppress(NotFound):
                upload.received_bytes = await asyncio.to_thread(self._num_bytes_on_disk, upload.id)
        return uploads

    async def get(self, upload_id: str, organization_id: str) -> Upload:
        """An upload with its true offset. Raises `NotFound`, also once it has expired."""
        upload = await self._find(upload_id, organization_id)
        is_whole = upload.received_bytes == upload.length_bytes
        if is_whole and upload.status == "receiving" and not self._is_live(upload_id):
            # The server was stopped between the last byte and its record.
            await self.append(upload_id, organization_id, upload.length_bytes, _nothing())
            upload = await self._find(upload_id, organization_id)
        return upload

    async def append(
        self,
        upload_id: str,
        organization_id: str,
        offset: int,
        chunks: AsyncIterator[bytes],
        checksum: Checksum | None = None,
    ) -> int:
        """Appends what `chunks` yields and returns the new offset; the last byte completes the
        upload. Whatever interrupts it, bytes that arrived stay, except that a piece with a
        `checksum` is kept whole or not at all.

        A later call takes over from an earlier one: a client that lost its connection comes back
        before the server has noticed. Raises `Conflict` for a wrong offset or a transfer that was
        taken over, `TooLarge` for bytes beyond the declared length, `ChecksumMismatch`.
        """
        await self._find(upload_id, organization_id)
        transfer = self._transfers.setdefault(upload_id, Transfer())
        transfer.num_callers += 1
        transfer.interrupt()
        try:
            async with transfer.lock:
                upload = await self._find(upload_id, organization_id)
                _check_offset(upload, offset)
                return await self._receive(transfer, upload, chunks, checksum)
        except FileNotFoundError:
            raise _no_such_upload() from None  # deleted meanwhile
        finally:
            transfer.num_callers -= 1

    async def delete(self, upload_id: str, organization_id: str) -> None:
        """Removes an upload. Raises `Conflict` while a version is being built of it."""
        async with self._database.write() as session:
            await find_upload(session, upload_id, organization_id)
            if await session.scalar(_in_use().where(ModelVersion.upload_id == upload_id).limit(1)):
                raise Conflict("A version is being built of this upload.", code="upload_in_use")
            await session.execute(delete(Upload).where(Upload.id == upload_id))
        await self.remove_files([upload_id])

    async def expire(self) -> int:
        """Removes what nobody continued or used for a day, what no byte came of for an hour, and
        files without a row; to be called now and then. Returns how many uploads ended."""
        async with self._database.write() as session:
            due = await session.scalars(
                select(Upload).where(
                    Upload.status != "expired",
                    Upload.expires_at <= clock.now(),
                    Upload.id.not_in(_in_use()),
                )
            )
            idle = [one for one in due if not self._is_live(one.id)]
            ended = [one.id for one in idle if not self._is_growing(one)]
            await session.execute(
                update(Upload).where(Upload.id.in_(ended)).values(status="expired")
            )
        names = await asyncio.to_thread(os.listdir, self._storage.upload("any").parent)
        async with self._database.read() as session:
            rows = await session.scalars(select(Upload.id).where(Upload.status != "expired"))
            known = set(rows)
        gone = {_upload_id(name) for name in names} - known
        await self.remove_files(sorted(gone))
        return len(ended)

    def _is_live(self, upload_id: str) -> bool:
        """Whether a connection brings bytes of it now; silence ends one soon."""
        transfer = self._transfers.get(upload_id)
        return transfer is not None and transfer.num_callers > 0

    def _is_growing(self, upload: Upload) -> bool:
        """Whether bytes came of late that are not recorded: a kill loses the record."""
        if upload.status != "receiving":
            return False
        arrived_at = last_byte_at(self._storage.upload(upload.id))
        return arrived_at is not None and arrived_at + LIFETIME > clock.now()

    async def remove_files(self, upload_ids: list[str]) -> None:
        """Deletes the bytes of uploads whose rows are gone."""
        for upload_id in upload_ids:
            if (transfer := self._transfers.pop(upload_id, None)) is not None:
                transfer.interrupt()
            path = self._storage.upload(upload_id)
            for each in (path, self._metadata_path(upload_id), piece_mark.mark_path(path)):
                await asyncio.to_thread(each.unlink, missing_ok=True)

    # --- rows ---------------------------------------------------------------------------

    async def _find(self, upload_id: str, organization_id: str) -> Upload:
        async with self._database.read() as session:
            upload = await find_upload(session, upload_id, organization_id)
        if upload.status == "receiving":
            upload.received_bytes = await asyncio.to_thread(self._num_bytes_on_disk, upload_id)
        return upload

    def _num_bytes_on_disk(self, upload_id: str) -> int:
        try:
            return piece_mark.counted_bytes(self._storage.upload(upload_id))
        except FileNotFoundError:
            raise _no_such_upload() from None

    async def _record(self, upload: Upload, file: ReceivedFile) -> None:
        values: dict[str, object] = {"received_bytes": file.num_bytes}
        is_whole = file.num_bytes == upload.length_bytes
        if is_whole or file.num_bytes > upload.received_bytes:
            values["expires_at"] = clock.now() + LIFETIME
        if is_whole:
            await _to_the_end(file.sync)
            values |= {"status": "complete", "sha256": file.sha256}
            self._transfers.pop(upload.id, None)
        async with self._database.write() as session:
            await session.execute(update(Upload).where(Upload.id == upload.id).values(**values))

    # --- bytes --------------------------------------------------------------------------

    async def _receive(
        self,
        transfer: Transfer,
        upload: Upload,
        chunks: AsyncIterator[bytes],
        checksum: Checksum | None,
    ) -> int:
        self._require_space(0)
        file = transfer.file
        if file is None or file.num_bytes != upload.received_bytes:
            path = self._storage.upload(upload.id)
            file = transfer.file = await _to_the_end(lambda: ReceivedFile.resume(path))
        source = Source(transfer, chunks, upload.length_bytes - file.num_bytes)
        mark = await _to_the_end(lambda: file.mark(checksum))
        try:
            while piece := await source.next_piece():
                await _to_the_end(lambda piece=piece: self._write(file, piece))
            if source.failure is not None:
                raise source.failure
            if checksum is not None and file.piece_digest() != checksum.digest:
                raise ChecksumMismatch("The piece does not match its checksum; send it again.")
            if checksum is not None:
                await _to_the_end(file.accept)
        except BaseException:
            if checksum is not None:
                await _to_the_end(lambda: file.rewind(mark))
            raise
        finally:
            await self._record(upload, file)
        return file.num_bytes

    def _write(self, file: ReceivedFile, piece: bytes) -> None:
        self._require_space(len(piece))  # builds and the journal take of the disk too
        file.append(piece)

    def _require_space(self, num_bytes: int) -> None:
        try:
            self._storage.require_space(num_bytes)
        except StorageFull:
            raise disk_full() from None


# --- small parts ------------------------------------------------------------------------


async def find_upload(session: AsyncSession, upload_id: str, organization_id: str) -> Upload:
    """The row. Raises `NotFound`, also for another organization's, and `UploadGone`."""
    upload = await session.scalar(
        select(Upload).where(Upload.id == upload_id, Upload.organization_id == organization_id)
    )
    if upload is None:
        raise _no_such_upload()
    if upload.status == "expired":
        raise UploadGone(
            "This upload has expired: a day went by without a byte, or an hour without the first. "
            "Begin it anew."
        )
    return upload


def _no_such_upload() -> NotFound:
    return NotFound("There is no such upload.", code="upload_not_found")


def clean_filename(filename: str) -> str:
    """The last part of a path from anywhere, printable and not too long: for display alone."""
    name = filename.replace("\\", "/").rsplit("/", 1)[-1]
    name = "".join(char for char in name if char.isprintable()).strip()
    return name[-MAX_FILENAME_CHARS:] or "upload"


def _upload_id(name: str) -> str:
    """Whose file in `uploads/` this is."""
    return name.removesuffix(METADATA_SUFFIX).removesuffix(piece_mark.SUFFIX)


def _in_use() -> Select[str]:
    """The uploads whose bytes a build still needs."""
    return select(ModelVersion.upload_id).where(ModelVersion.status.in_(("queued", "building")))


def _check_offset(upload: Upload, offset: int) -> None:
    if upload.status != "receiving":
        raise Conflict("This upload is complete.", code="upload_complete")
    if offset != upload.received_bytes:
        raise Conflict(
            f"The box has {upload.received_bytes} bytes; go on from there, not from {offset}.",
            code="wrong_offset",
            param="Upload-Offset",
        )


async def _nothing() -> AsyncIterator[bytes]:
    for chunk in ():
        yield chunk


async def _to_the_end(work: Callable[[], T]) -> T:
    """Runs in a thread and, even if cancelled, waits for it: two threads never share a file."""
    future = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise
