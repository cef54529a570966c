"""Resumable uploads: bytes that arrive in pieces, in order, over any number of connections.

Owns the files under `uploads/` and their rows. The bytes of an upload are exactly its file:
the file's size is the offset, so a cut or a killed server loses nothing that was written. The
HTTP side (tus) is `app/api/uploads.py`; what is inside a file is `inspection.py`'s.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import TypeVar

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.core.database import Database
from app.core.errors import AppError, Conflict, InvalidRequest, NotFound, TooLarge
from app.core.ids import new_id
from app.core.storage import Storage
from app.organizations.principal import Principal
from app.organizations.tables import Organization
from app.registry.received_file import ReceivedFile
from app.registry.tables import ModelVersion, Upload
from app.settings import Settings

BUFFER_BYTES = 1024**2  # written and hashed at once, in a thread
STALL_SECONDS = 60.0
LIFETIME = timedelta(hours=24)  # since the last byte
MAX_OPEN_UPLOADS = 16  # of one organization
QUOTA_FACTOR = 4  # what an organization's uploads may add up to, in largest uploads
MAX_FILENAME_CHARS = 255

T = TypeVar("T")


class ChecksumMismatch(AppError):
    """The piece arrived damaged; nothing of it was kept. 460 is the tus protocol's."""

    status, type, default_code = 460, "invalid_request_error", "checksum_mismatch"


class UploadStore:
    """Every upload of the box."""

    def __init__(self, database: Database, storage: Storage, settings: Settings) -> None:
        self._database = database
        self._storage = storage
        self.max_bytes = settings.max_upload_bytes
        self._transfers: dict[str, _Transfer] = {}

    async def create(self, principal: Principal, filename: str, length_bytes: int) -> Upload:
        """A new, empty upload. Raises `TooLarge` beyond the limit or the organization's quota,
        and `StorageFull` when the disk could not take it together with all others under way."""
        principal.require("write")
        if length_bytes < 1:
            raise InvalidRequest("The file is empty.", param="Upload-Length", code="empty")
        if length_bytes > self.max_bytes:
            raise TooLarge(
                f"The file has {length_bytes:,} bytes; the largest upload this box accepts is "
                f"{self.max_bytes:,} (its setting TAPEOUT_MAX_UPLOAD)."
            )
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
            expires_at=moment + LIFETIME,
        )
        async with self._database.write() as session:
            await self._check_quota(session, upload)
            self._storage.require_space(length_bytes + await _outstanding_bytes(session))
            session.add(upload)
        await asyncio.to_thread(self._storage.upload(upload.id).touch, 0o600)
        return upload

    async def get(self, upload_id: str, organization_id: str) -> Upload:
        """An upload with its true offset. Raises `NotFound`, also once it has expired."""
        upload = await self._find(upload_id, organization_id)
        is_idle = upload_id not in self._transfers or self._transfers[upload_id].num_callers == 0
        if (
            upload.received_bytes == upload.length_bytes
            and upload.status == "receiving"
            and is_idle
        ):
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
        checksum: bytes | None = None,
    ) -> int:
        """Appends what `chunks` yields and returns the new offset; the last byte completes the
        upload. Whatever interrupts it, bytes that arrived stay, except that a piece with a
        `checksum` (SHA-256) is kept whole or not at all.

        A later call takes over from an earlier one: a client that lost its connection comes back
        before the server has noticed. Raises `Conflict` for a wrong offset or a transfer that was
        taken over, `TooLarge` for bytes beyond the declared length, `ChecksumMismatch`.
        """
        await self._find(upload_id, organization_id)
        transfer = self._transfers.setdefault(upload_id, _Transfer())
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
        """Removes what nobody continued or used for a day, and files without a row; to be called
        now and then. Returns how many uploads ended."""
        async with self._database.write() as session:
            ended = await session.scalars(
                update(Upload)
                .where(Upload.status != "expired", Upload.expires_at <= clock.now())
                .where(Upload.id.not_in(_in_use()))
                .values(status="expired")
                .returning(Upload.id)
            )
            num_ended = len(ended.all())
        names = await asyncio.to_thread(os.listdir, self._storage.upload("any").parent)
        async with self._database.read() as session:
            rows = await session.scalars(select(Upload.id).where(Upload.status != "expired"))
            known = set(rows)
        await self.remove_files([name for name in names if name not in known])
        return num_ended

    async def remove_files(self, upload_ids: list[str]) -> None:
        """Deletes the bytes of uploads whose rows are gone."""
        for upload_id in upload_ids:
            if (transfer := self._transfers.pop(upload_id, None)) is not None:
                transfer.interrupt()
            path = self._storage.upload(upload_id)
            await asyncio.to_thread(path.unlink, missing_ok=True)

    # --- rows ---------------------------------------------------------------------------

    async def _find(self, upload_id: str, organization_id: str) -> Upload:
        async with self._database.read() as session:
            upload = await find_upload(session, upload_id, organization_id)
        if upload.status == "receiving":
            upload.received_bytes = await asyncio.to_thread(self._num_bytes_on_disk, upload_id)
        return upload

    def _num_bytes_on_disk(self, upload_id: str) -> int:
        try:
            return self._storage.upload(upload_id).stat().st_size
        except FileNotFoundError:
            raise _no_such_upload() from None

    async def _check_quota(self, session: AsyncSession, upload: Upload) -> None:
        # The lock keeps uploads created at the same moment from passing the quota together.
        await session.execute(
            select(Organization.id)
            .where(Organization.id == upload.organization_id)
            .with_for_update()
        )
        num_open, num_bytes = (
            await session.execute(
                select(
                    func.count().filter(Upload.status == "receiving"),
                    func.coalesce(func.sum(Upload.length_bytes), 0),
                ).where(
                    Upload.organization_id == upload.organization_id, Upload.status != "expired"
                )
            )
        ).one()
        if num_open >= MAX_OPEN_UPLOADS:
            raise Conflict(
                f"{num_open} uploads are unfinished, which is as many as may be. Finish or delete "
                "one first.",
                code="too_many_uploads",
            )
        quota_bytes = QUOTA_FACTOR * self.max_bytes
        if num_bytes + upload.length_bytes > quota_bytes:
            raise TooLarge(
                f"Your organization's uploads would exceed {quota_bytes:,} bytes. Uploads are "
                "removed a day after their last use; delete some to go on now.",
                code="quota_exceeded",
            )

    async def _record(self, upload: Upload, file: ReceivedFile) -> None:
        values: dict[str, object] = {
            "received_bytes": file.num_bytes,
            "expires_at": clock.now() + LIFETIME,
        }
        if file.num_bytes == upload.length_bytes:
            await _to_the_end(file.sync)
            values |= {"status": "complete", "sha256": file.sha256}
            self._transfers.pop(upload.id, None)
        async with self._database.write() as session:
            await session.execute(update(Upload).where(Upload.id == upload.id).values(**values))

    # --- bytes --------------------------------------------------------------------------

    async def _receive(
        self,
        transfer: "_Transfer",
        upload: Upload,
        chunks: AsyncIterator[bytes],
        checksum: bytes | None,
    ) -> int:
        self._storage.require_space(0)
        file = transfer.file
        if file is None or file.num_bytes != upload.received_bytes:
            path = self._storage.upload(upload.id)
            file = transfer.file = await _to_the_end(lambda: ReceivedFile.resume(path))
        source = _Source(transfer, chunks, upload.length_bytes - file.num_bytes)
        mark = file.mark(is_checked=checksum is not None)
        try:
            while piece := await source.next_piece():
                await _to_the_end(lambda piece=piece: file.append(piece))
            if source.failure is not None:
                raise source.failure
            if checksum is not None and file.piece_digest() != checksum:
                raise ChecksumMismatch("The piece does not match its checksum; send it again.")
        except BaseException:
            if checksum is not None:
                await _to_the_end(lambda: file.rewind(mark))
            raise
        finally:
            await self._record(upload, file)
        return file.num_bytes


class _Transfer:
    """What this process knows of an upload under way: who may write, and the hash so far."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.num_callers = 0
        self.file: ReceivedFile | None = None
        self.waiting: asyncio.Timeout | None = None  # for the client's next bytes

    def interrupt(self) -> None:
        """Ends the wait for bytes of whoever is writing."""
        if self.waiting is not None and not self.waiting.expired():
            self.waiting.reschedule(asyncio.get_running_loop().time())


class _Source:
    """A connection's chunks, gathered into pieces worth a thread. Why it ended early is kept in
    `failure`, to be raised once the bytes that came before are safe."""

    def __init__(self, transfer: _Transfer, chunks: AsyncIterator[bytes], room_bytes: int) -> None:
        self._transfer = transfer
        self._chunks = chunks
        self._room_bytes = room_bytes
        self._is_ended = False
        self.failure: Exception | None = None

    async def next_piece(self) -> bytes:
        """Empty at the end."""
        buffer = bytearray()
        while not self._is_ended and len(buffer) < BUFFER_BYTES:
            chunk = await self._next_chunk()
            if len(chunk) > self._room_bytes:
                self._end(TooLarge("There are more bytes than Upload-Length announced."))
                break
            self._room_bytes -= len(chunk)
            buffer += chunk
        return bytes(buffer)

    async def _next_chunk(self) -> bytes:
        try:
            async with asyncio.timeout(STALL_SECONDS) as self._transfer.waiting:
                if self._transfer.num_callers > 1:
                    raise TimeoutError
                return await anext(self._chunks)
        except StopAsyncIteration:
            self._end(None)
        except TimeoutError:
            self._end(
                Conflict(
                    "Another transfer took over, or nothing came for a while. Ask for the offset "
                    "(HEAD) and go on from there.",
                    code="interrupted",
                )
            )
        except Exception as error:  # noqa: BLE001 - the connection's own, raised by the caller
            self._end(error)
        finally:
            self._transfer.waiting = None
        return b""

    def _end(self, failure: Exception | None) -> None:
        self._is_ended = True
        self.failure = failure


# --- small parts ------------------------------------------------------------------------


async def find_upload(session: AsyncSession, upload_id: str, organization_id: str) -> Upload:
    """The row. Raises `NotFound`, also for another organization's and an expired one."""
    upload = await session.scalar(
        select(Upload).where(
            Upload.id == upload_id,
            Upload.organization_id == organization_id,
            Upload.status != "expired",
        )
    )
    if upload is None:
        raise _no_such_upload()
    return upload


def _no_such_upload() -> NotFound:
    return NotFound("There is no such upload, or it has expired.", code="upload_not_found")


def clean_filename(filename: str) -> str:
    """The last part of a path from anywhere, printable and not too long: for display alone."""
    name = filename.replace("\\", "/").rsplit("/", 1)[-1]
    name = "".join(char for char in name if char.isprintable()).strip()
    return name[-MAX_FILENAME_CHARS:] or "upload"


def _in_use() -> Select[str]:
    """The uploads whose bytes a build still needs."""
    return select(ModelVersion.upload_id).where(ModelVersion.status.in_(("queued", "building")))


async def _outstanding_bytes(session: AsyncSession) -> int:
    """What every unfinished upload of the box has still to bring."""
    total = await session.scalar(
        select(func.sum(Upload.length_bytes - Upload.received_bytes)).where(
            Upload.status == "receiving"
        )
    )
    return total or 0


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
