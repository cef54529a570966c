"""Uploads that are cut, resumed, taken over, damaged, too large; and restarts in between."""

import asyncio
import errno
import hashlib
import os
import tempfile
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from pathlib import Path

import pytest
from msgspec.structs import replace
from sqlalchemy import select, update

from app.core import clock
from app.core.database import Database
from app.core.errors import Conflict, Forbidden, InvalidRequest, NotFound, StorageFull, TooLarge
from app.core.storage import Storage
from app.organizations.principal import Principal
from app.registry import received_file, service, transfers
from app.registry.received_file import Checksum
from app.registry.tables import ModelVersion, Upload
from app.registry.uploads import ChecksumMismatch, UploadGone, UploadStore, clean_filename
from app.settings import Settings
from tests.app.registry.conftest import stream

DATA = os.urandom(3 * 1024**2 + 17)
GIB = 1024**3
SHA256 = hashlib.sha256(DATA).hexdigest()


class CutError(Exception):
    """Stands for a connection that breaks."""


@pytest.fixture
def restarted(database: Database, storage: Storage, settings: Settings) -> UploadStore:
    """The store as a new process sees it."""
    return UploadStore(database, storage, settings)


async def send(
    store: UploadStore, upload: Upload, offset: int, data: bytes, **arguments: object
) -> int:
    return await store.append(
        upload.id,
        upload.organization_id,
        offset,
        stream(data),
        **arguments,  # type: ignore[arg-type]
    )


def sha256(data: bytes) -> Checksum:
    return Checksum("sha256", hashlib.sha256(data).digest())


def content(storage: Storage, upload: Upload) -> bytes:
    return storage.upload(upload.id).read_bytes()


# --- whole ------------------------------------------------------------------------------


async def test_a_whole_upload(uploads: UploadStore, storage: Storage, principal: Principal) -> None:
    upload = await uploads.create(principal, "model.pt2", len(DATA))
    assert (upload.status, upload.received_bytes) == ("receiving", 0)
    chunks = [DATA[at : at + 65_536] for at in range(0, len(DATA), 65_536)]
    organization_id = principal.organization_id
    assert await uploads.append(upload.id, organization_id, 0, stream(*chunks)) == len(DATA)
    done = await uploads.get(upload.id, organization_id)
    assert (done.status, done.received_bytes, done.sha256) == ("complete", len(DATA), SHA256)
    assert content(storage, upload) == DATA
    with pytest.raises(Conflict, match="complete"):
        await send(uploads, upload, len(DATA), b"")


async def test_many_uploads_at_once(
    uploads: UploadStore, storage: Storage, principal: Principal
) -> None:
    async def one(number: int) -> None:
        data = bytes([number]) * (300_000 + number)
        upload = await uploads.create(principal, "m", len(data))
        for at in range(0, len(data), 100_000):
            await send(uploads, upload, at, data[at : at + 100_000])
        done = await uploads.get(upload.id, principal.organization_id)
        assert done.sha256 == hashlib.sha256(data).hexdigest()
        assert content(storage, upload) == data

    await asyncio.gather(*(one(number) for number in range(8)))


async def test_memory_does_not_grow_with_the_upload(
    uploads: UploadStore, principal: Principal
) -> None:
    num_bytes = 48 * 1024**2
    upload = await uploads.create(principal, "m", num_bytes)
    chunk = bytes(256 * 1024)

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(num_bytes // len(chunk)):
            yield chunk

    tracemalloc.start()
    try:
        await uploads.append(upload.id, principal.organization_id, 0, endless())
        assert tracemalloc.get_traced_memory()[1] < 16 * 1024**2
    finally:
        tracemalloc.stop()


# --- cut and resumed --------------------------------------------------------------------


async def test_a_cut_keeps_what_arrived(
    uploads: UploadStore, restarted: UploadStore, storage: Storage, principal: Principal
) -> None:
    upload = await uploads.create(principal, "m", len(DATA))
    organization_id = principal.organization_id
    with pytest.raises(CutError):
        await uploads.append(
            upload.id, organization_id, 0, stream(DATA[:2_000_000], error=CutError())
        )
    for store in (uploads, restarted):
        assert (await store.get(upload.id, organization_id)).received_bytes == 2_000_000
    assert await send(restarted, upload, 2_000_000, DATA[2_000_000:]) == len(DATA)
    done = await restarted.get(upload.id, organization_id)
    assert (done.status, done.sha256) == ("complete", SHA256)
    assert content(storage, upload) == DATA


async def test_a_process_killed_while_writing(
    uploads: UploadStore, restarted: UploadStore, storage: Storage, principal: Principal
) -> None:
    upload = await uploads.create(principal, "m", len(DATA))
    storage.upload(upload.id).write_bytes(DATA[:1_234_567])  # written, but never recorded
    found = await restarted.get(upload.id, principal.organization_id)
    assert found.received_bytes == 1_234_567
    await send(restarted, upload, 1_234_567, DATA[1_234_567:])
    done = await restarted.get(upload.id, principal.organization_id)
    assert done.sha256 == SHA256


async def test_a_process_killed_after_the_last_byte(
    uploads: UploadStore, restarted: UploadStore, storage: Storage, principal: Principal
) -> None:
    upload = await uploads.create(principal, "m", len(DATA))
    storage.upload(upload.id).write_bytes(DATA)
    done = await restarted.get(upload.id, principal.organization_id)
    assert (done.status, done.sha256) == ("complete", SHA256)


async def test_a_cancelled_request_never_writes_beside_its_successor(
    uploads: UploadStore, storage: Storage, principal: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = await uploads.create(principal, "m", len(DATA))
    append = received_file.ReceivedFile.append

    def slow_append(file: received_file.ReceivedFile, data: bytes) -> None:
        import time

        time.sleep(0.1)
        append(file, data)

    monkeypatch.setattr(received_file.ReceivedFile, "append", slow_append)
    task = asyncio.create_task(send(uploads, upload, 0, DATA[:1_500_000]))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    offset = (await uploads.get(upload.id, principal.organization_id)).received_bytes
    await send(uploads, upload, offset, DATA[offset:])
    done = await uploads.get(upload.id, principal.organization_id)
    assert done.sha256 == SHA256


async def test_wrong_offsets(uploads: UploadStore, principal: Principal) -> None:
    upload = await uploads.create(principal, "m", len(DATA))
    await send(uploads, upload, 0, DATA[:1000])
    for offset in (0, 999, 1001, len(DATA)):
        with pytest.raises(Conflict) as caught:
            await send(uploads, upload, offset, DATA[offset:])
        assert caught.value.code == "wrong_offset"
    assert await send(uploads, upload, 1000, DATA[1000:]) == len(DATA)


async def test_a_returning_client_takes_over_from_its_dead_connection(
    uploads: UploadStore, storage: Storage, principal: Principal
) -> None:
    upload = await uploads.create(principal, "m", len(DATA))
    organization_id = principal.organization_id
    started = asyncio.Event()

    async def dead() -> AsyncIterator[bytes]:
        yield DATA[:1000]
        started.set()
        await asyncio.Event().wait()

    hung = asyncio.create_task(uploads.append(upload.id, organization_id, 0, dead()))
    await started.wait()
    with pytest.raises(Conflict) as caught:  # its bytes were still underway when it asked
        await send(uploads, upload, 0, DATA)
    assert caught.value.code == "wrong_offset"
    with pytest.raises(Conflict) as caught:
        await hung
    assert caught.value.code == "interrupted"
    assert await send(uploads, upload, 1000, DATA[1000:]) == len(DATA)
    assert content(storage, upload) == DATA


async def test_a_silent_connection_ends(
    uploads: UploadStore, principal: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "STALL_SECONDS", 0.02)
    upload = await uploads.create(principal, "m", 10)

    async def silent() -> AsyncIterator[bytes]:
        yield b"abc"
        await asyncio.Event().wait()

    with pytest.raises(Conflict, match="nothing came"):
        await uploads.append(upload.id, principal.organization_id, 0, silent())
    assert (await uploads.get(upload.id, principal.organization_id)).received_bytes == 3


async def test_a_connection_that_trickles_ends_and_what_came_is_kept(
    uploads: UploadStore, principal: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "STALL_SECONDS", 0.05)
    upload = await uploads.create(principal, "m", len(DATA))
    num_sent = 0

    async def trickle() -> AsyncIterator[bytes]:
        nonlocal num_sent
        while num_sent < len(DATA):
            yield DATA[num_sent : num_sent + 1]
            num_sent += 1
            await asyncio.sleep(0.01)

    with pytest.raises(Conflict, match="nothing came"):
        await uploads.append(upload.id, principal.organization_id, 0, trickle())
    assert 0 < num_sent < 10
    assert (await uploads.get(upload.id, principal.organization_id)).received_bytes == num_sent
    await send(uploads, upload, num_sent, DATA[num_sent:])
    assert (await uploads.get(upload.id, principal.organization_id)).sha256 == SHA256


async def test_more_bytes_than_announced(
    uploads: UploadStore, storage: Storage, principal: Principal
) -> None:
    upload = await uploads.create(principal, "m", 10)
    with pytest.raises(TooLarge):
        await uploads.append(upload.id, principal.organization_id, 0, stream(b"12345", b"678901"))
    assert content(storage, upload) == b"12345"


# --- checksums --------------------------------------------------------------------------


async def test_a_damaged_piece_leaves_nothing(
    uploads: UploadStore, restarted: UploadStore, storage: Storage, principal: Principal
) -> None:
    upload = await uploads.create(principal, "m", len(DATA))
    organization_id = principal.organization_id
    await send(uploads, upload, 0, DATA[:1000], checksum=sha256(DATA[:1000]))
    with pytest.raises(ChecksumMismatch):
        await send(uploads, upload, 1000, DATA[1000:], checksum=Checksum("sha256", bytes(32)))
    with pytest.raises(CutError):
        await uploads.append(
            upload.id,
            organization_id,
            1000,
            stream(DATA[1000:2_500_000], error=CutError()),
            sha256(DATA[1000:]),
        )
    assert content(storage, upload) == DATA[:1000]
    checksum = sha256(DATA[1000:])
    assert await send(uploads, upload, 1000, DATA[1000:], checksum=checksum) == len(DATA)
    assert (await restarted.get(upload.id, organization_id)).sha256 == SHA256


async def test_of_a_checked_piece_nothing_counts_before_its_end(
    uploads: UploadStore, restarted: UploadStore, storage: Storage, principal: Principal
) -> None:
    upload = await uploads.create(principal, "m", len(DATA))
    organization_id = principal.organization_id
    await send(uploads, upload, 0, DATA[:1000], checksum=sha256(DATA[:1000]))
    rest = DATA[1000:]
    path = storage.upload(upload.id)
    left = b""

    async def damaged() -> AsyncIterator[bytes]:
        nonlocal left
        yield bytes(1_500_000)
        left = path.read_bytes()
        for store in (uploads, restarted):
            assert (await store.get(upload.id, organization_id)).received_bytes == 1000
        mark = path.with_name(f"{path.name}.mark").read_bytes()
        assert int(mark) == 1000
        raise CutError

    with pytest.raises(CutError):
        await uploads.append(upload.id, organization_id, 1000, damaged(), sha256(rest))
    assert len(left) == 1_501_000
    assert await send(uploads, upload, 1000, rest, checksum=sha256(rest)) == len(DATA)
    assert (await uploads.get(upload.id, organization_id)).sha256 == SHA256
    assert [file.name for file in path.parent.iterdir()] == [upload.id]


@pytest.mark.parametrize("is_checked", [True, False])
async def test_a_process_killed_in_a_checked_piece(
    uploads: UploadStore,
    restarted: UploadStore,
    storage: Storage,
    principal: Principal,
    is_checked: bool,
) -> None:
    upload = await uploads.create(principal, "m", len(DATA))
    organization_id = principal.organization_id
    await send(uploads, upload, 0, DATA[:1000], checksum=sha256(DATA[:1000]))
    path = storage.upload(upload.id)
    killed = received_file.ReceivedFile.resume(path)
    killed.mark(sha256(DATA[1000:]))
    killed.append(bytes(len(DATA) - 1000))  # all of it is there, and wrong
    for store in (uploads, restarted):
        assert (await store.get(upload.id, organization_id)).received_bytes == 1000
    checksum = sha256(DATA[1000:2000]) if is_checked else None
    assert await send(restarted, upload, 1000, DATA[1000:2000], checksum=checksum) == 2000
    assert content(storage, upload) == DATA[:2000]
    assert await send(restarted, upload, 2000, DATA[2000:]) == len(DATA)
    assert (await restarted.get(upload.id, organization_id)).sha256 == SHA256


# --- limits -----------------------------------------------------------------------------


async def test_sizes(
    database: Database, storage: Storage, settings: Settings, principal: Principal
) -> None:
    uploads = UploadStore(database, storage, replace(settings, max_upload_bytes=1000))
    with pytest.raises(TooLarge, match="1,000"):
        await uploads.create(principal, "m", 1001)
    for length_bytes in (0, -5):
        with pytest.raises(InvalidRequest):
            await uploads.create(principal, "m", length_bytes)
    for _ in range(4):
        await uploads.create(principal, "m", 1000)
    with pytest.raises(TooLarge) as caught:
        await uploads.create(principal, "m", 1)
    assert caught.value.code == "quota_exceeded"
    assert "4,000 of the 4,000" in caught.value.message


async def test_unfinished_uploads_are_bounded(
    uploads: UploadStore, principal: Principal, stranger: Principal, settings: Settings
) -> None:
    made = [await uploads.create(principal, "m", 10) for _ in range(settings.max_open_uploads)]
    with pytest.raises(Conflict) as caught:
        await uploads.create(principal, "m", 10)
    assert caught.value.code == "too_many_uploads"
    await uploads.create(stranger, "m", 10)
    await send(uploads, made[0], 0, bytes(10))
    await uploads.create(principal, "m", 10)


async def test_the_disk_must_hold_every_upload_under_way(
    uploads: UploadStore, storage: Storage, principal: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes = 256 * 1024**2 + 1000
    monkeypatch.setattr(storage, "free_bytes", lambda: free_bytes)
    upload = await uploads.create(principal, "m", 601)
    await send(uploads, upload, 0, b"x")
    with pytest.raises(StorageFull):
        await uploads.create(principal, "m", 600)
    await uploads.create(principal, "m", 400)


async def test_what_was_only_announced_or_stopped_takes_no_room_from_others(
    uploads: UploadStore,
    storage: Storage,
    principal: Principal,
    stranger: Principal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda: 256 * 1024**2 + 1000)
    await uploads.create(principal, "m", 1000)
    stopped = await uploads.create(principal, "m", 1000)
    await send(uploads, stopped, 0, b"x")
    with pytest.raises(StorageFull):
        await uploads.create(stranger, "m", 600)
    at = (clock.now() - timedelta(minutes=11)).timestamp()
    os.utime(storage.upload(stopped.id), (at, at))
    await uploads.create(stranger, "m", 600)


async def test_what_is_announced_takes_no_more_room_than_what_has_come(
    uploads: UploadStore,
    storage: Storage,
    principal: Principal,
    stranger: Principal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free_bytes = 60 * GIB
    monkeypatch.setattr(storage, "free_bytes", lambda: free_bytes + 256 * 1024**2)
    large = await uploads.create(principal, "m", 59 * GIB)
    await send(uploads, large, 0, b"x")
    other = await uploads.create(principal, "m", 40 * GIB)
    await send(uploads, other, 0, b"x")
    await uploads.create(stranger, "m", 59 * GIB)
    with pytest.raises(StorageFull):
        await uploads.create(stranger, "m", 59 * GIB + 1)
    os.truncate(storage.upload(large.id), 20 * GIB)  # stands for bytes: they take no disk here
    await uploads.create(stranger, "m", 39 * GIB)
    with pytest.raises(StorageFull):
        await uploads.create(stranger, "m", 41 * GIB)
    os.truncate(storage.upload(large.id), 58 * GIB)
    os.truncate(storage.upload(other.id), 39 * GIB)
    await uploads.create(stranger, "m", 58 * GIB)  # less is to come by now than has come


async def test_what_forms_announce_takes_no_more_room_than_what_has_come(
    uploads: UploadStore,
    storage: Storage,
    principal: Principal,
    stranger: Principal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda: 20 * GIB + 256 * 1024**2)
    async with AsyncExitStack() as forms:
        arriving = [
            await forms.enter_async_context(uploads.receiving_form(principal, GIB // 2))
            for _ in range(16)
        ]
        await uploads.create(stranger, "m", 19 * GIB)
        with pytest.raises(StorageFull):
            await uploads.create(stranger, "m", 19 * GIB + 1)
        for form in arriving:
            form.came(GIB // 4)  # which brings them nearer to their end, twice over
        with pytest.raises(StorageFull):
            await uploads.create(stranger, "m", 16 * GIB + 1)
        await uploads.create(stranger, "m", 16 * GIB)


async def test_the_quota_is_a_setting(
    database: Database, storage: Storage, settings: Settings, principal: Principal
) -> None:
    limits = replace(settings, max_open_uploads=2, upload_quota_bytes=50)
    uploads = UploadStore(database, storage, limits)
    for length_bytes in (20, 30):
        await uploads.create(principal, "m", length_bytes)
    with pytest.raises(Conflict):
        await uploads.create(principal, "m", 1)
    with pytest.raises(TooLarge):
        await UploadStore(database, storage, replace(limits, max_open_uploads=9)).create(
            principal, "m", 1
        )


async def test_files_that_arrive_in_forms_count(
    database: Database,
    storage: Storage,
    settings: Settings,
    principal: Principal,
    stranger: Principal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = replace(settings, max_open_uploads=2, upload_quota_bytes=500)
    uploads = UploadStore(database, storage, limits)
    async with uploads.receiving_form(principal, 300):
        with pytest.raises(TooLarge, match="300 of the 500"):
            await uploads.create(principal, "m", 201)
        await uploads.create(principal, "m", 200)
        with pytest.raises(Conflict):
            async with uploads.receiving_form(principal, 1):
                pass
        # As an upload, and as a temporary file before.
        monkeypatch.setattr(storage, "free_bytes", lambda: 256 * 1024**2 + 1000)
        with pytest.raises(StorageFull):
            async with uploads.receiving_form(stranger, 201):
                pass
        with pytest.raises(StorageFull):
            await uploads.create(stranger, "m", 401)
        async with uploads.receiving_form(stranger, 200):
            pass
    async with uploads.receiving_form(principal, 300):
        pass
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/proc")  # where nothing is free
    with pytest.raises(StorageFull, match="temporary"):
        async with uploads.receiving_form(principal, 300):
            pass


async def test_what_lies_on_the_disk_is_not_counted_twice(
    uploads: UploadStore, storage: Storage, principal: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve_bytes = 256 * 1024**2
    monkeypatch.setattr(storage, "free_bytes", lambda: reserve_bytes + 1000)
    upload = await uploads.create(principal, "m", 900)
    storage.upload(upload.id).write_bytes(bytes(800))  # in the middle of a long piece
    monkeypatch.setattr(storage, "free_bytes", lambda: reserve_bytes + 200)
    with pytest.raises(StorageFull):
        await uploads.create(principal, "m", 101)
    await uploads.create(principal, "m", 100)


async def test_an_upload_leaves_the_reserve_alone(
    uploads: UploadStore, storage: Storage, principal: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = await uploads.create(principal, "m", len(DATA))

    def free_bytes() -> int:
        return 256 * 1024**2 + 2 * 1024**2 - len(content(storage, upload))

    monkeypatch.setattr(storage, "free_bytes", free_bytes)
    chunks = [DATA[at : at + 65_536] for at in range(0, len(DATA), 65_536)]
    with pytest.raises(StorageFull, match="go on once there is room"):
        await uploads.append(upload.id, principal.organization_id, 0, stream(*chunks))
    assert content(storage, upload) == DATA[: 2 * 1024**2]
    monkeypatch.undo()
    await send(uploads, upload, 2 * 1024**2, DATA[2 * 1024**2 :])
    assert (await uploads.get(upload.id, principal.organization_id)).sha256 == SHA256


async def test_a_full_disk_keeps_what_arrived(
    uploads: UploadStore, storage: Storage, principal: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = await uploads.create(principal, "m", len(DATA))
    await send(uploads, upload, 0, DATA[:1000])
    path_open = Path.open

    def failing_open(path: Path, mode: str = "r", **arguments: object) -> object:
        file = path_open(path, mode, **arguments)  # type: ignore[call-overload]
        return FullFile(file) if mode == "r+b" and path.name == upload.id else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing_open)
        with pytest.raises(StorageFull):
            await send(uploads, upload, 1000, DATA[1000:])
    assert content(storage, upload) == DATA[:1000]
    await send(uploads, upload, 1000, DATA[1000:])
    assert (await uploads.get(upload.id, principal.organization_id)).sha256 == SHA256


class FullFile:
    """A file on a disk that fills up in the middle of a write."""

    def __init__(self, file: object) -> None:
        self._file = file

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def __enter__(self) -> "FullFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # type: ignore[attr-defined]

    def write(self, data: bytes) -> int:
        self._file.write(data[:500])  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, "no space")


# --- whose, and until when --------------------------------------------------------------


async def test_uploads_of_another_organization_do_not_exist(
    uploads: UploadStore, principal: Principal, stranger: Principal
) -> None:
    upload = await uploads.create(principal, "m", 10)
    other = stranger.organization_id
    with pytest.raises(NotFound):
        await uploads.get(upload.id, other)
    with pytest.raises(NotFound):
        await uploads.append(upload.id, other, 0, stream(b"x"))
    with pytest.raises(NotFound):
        await uploads.delete(upload.id, other)
    assert uploads._transfers == {}


async def test_uploading_needs_the_scope(uploads: UploadStore, principal: Principal) -> None:
    with pytest.raises(Forbidden, match="'write'"):
        await uploads.create(replace(principal, scopes=frozenset({"read"})), "m", 10)


async def test_delete(uploads: UploadStore, storage: Storage, principal: Principal) -> None:
    upload = await uploads.create(principal, "m", 10)
    await send(uploads, upload, 0, b"12345")
    await uploads.delete(upload.id, principal.organization_id)
    assert not storage.upload(upload.id).exists()
    with pytest.raises(NotFound):
        await uploads.get(upload.id, principal.organization_id)
    assert uploads._transfers == {}


async def test_delete_ends_a_running_transfer(
    uploads: UploadStore, storage: Storage, principal: Principal
) -> None:
    upload = await uploads.create(principal, "m", 10)
    started = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        started.set()
        await asyncio.Event().wait()
        yield b""

    running = asyncio.create_task(uploads.append(upload.id, principal.organization_id, 0, slow()))
    await started.wait()
    await uploads.delete(upload.id, principal.organization_id)
    with pytest.raises((Conflict, NotFound)):
        await running
    assert not storage.upload(upload.id).exists()


async def test_an_upload_of_a_running_build_stays(
    uploads: UploadStore, database: Database, storage: Storage, principal: Principal
) -> None:
    upload = await uploads.create(principal, "m", 10)
    await send(uploads, upload, 0, bytes(10))
    upload = await uploads.get(upload.id, principal.organization_id)
    async with database.write() as session:
        await service.create_version(session, principal.organization_id, "m", upload)
        await session.execute(update(Upload).values(expires_at=clock.now()))
    with pytest.raises(Conflict):
        await uploads.delete(upload.id, principal.organization_id)
    assert await uploads.expire() == 0
    async with database.write() as session:
        await session.execute(update(ModelVersion).values(status="ready"))
    assert await uploads.expire() == 1
    assert not storage.upload(upload.id).exists()


async def test_expiry(
    uploads: UploadStore, database: Database, storage: Storage, principal: Principal
) -> None:
    old = await uploads.create(principal, "m", 10)
    young = await uploads.create(principal, "m", 10)
    stray = storage.upload("upload_of_a_row_that_is_gone")
    stray.write_bytes(b"x")
    async with database.write() as session:
        await session.execute(
            update(Upload)
            .where(Upload.id == old.id)
            .values(expires_at=clock.now() - timedelta(seconds=1))
        )
    assert await uploads.expire() == 1
    assert not storage.upload(old.id).exists()
    assert storage.upload(young.id).exists()
    assert not stray.exists()
    with pytest.raises(NotFound):
        await uploads.get(old.id, principal.organization_id)
    async with database.read() as session:
        rows = await session.execute(select(Upload.id, Upload.status))
        statuses = {upload_id: status for upload_id, status in rows}  # noqa: C416
    assert statuses == {old.id: "expired", young.id: "receiving"}


async def test_an_upload_that_no_byte_came_of_ends_after_an_hour(
    uploads: UploadStore,
    restarted: UploadStore,
    storage: Storage,
    principal: Principal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = await uploads.create(principal, "m", 10)
    await send(uploads, empty, 0, b"")  # which is no byte
    begun = await uploads.create(principal, "m", 10)
    await send(uploads, begun, 0, b"x")
    killed = await uploads.create(principal, "m", 10)
    storage.upload(killed.id).write_bytes(b"xy")  # written, but never recorded
    now = clock.now()
    monkeypatch.setattr(clock, "now", lambda: now + timedelta(minutes=59))
    assert await restarted.expire() == 0
    monkeypatch.setattr(clock, "now", lambda: now + timedelta(minutes=61))
    assert await restarted.expire() == 1
    with pytest.raises(UploadGone, match="Begin it anew"):
        await restarted.get(empty.id, principal.organization_id)
    monkeypatch.setattr(clock, "now", lambda: now + timedelta(hours=25))
    assert await restarted.expire() == 2


@pytest.mark.parametrize("checksum", [None, sha256(b""), sha256(b"damaged")])
async def test_a_piece_without_bytes_prolongs_nothing(
    uploads: UploadStore,
    restarted: UploadStore,
    storage: Storage,
    principal: Principal,
    stranger: Principal,
    monkeypatch: pytest.MonkeyPatch,
    checksum: Checksum | None,
) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda: 256 * 1024**2 + 1000)
    upload = await uploads.create(principal, "m", 1000)
    await send(uploads, upload, 0, b"x")
    until = (await uploads.get(upload.id, principal.organization_id)).expires_at
    stopped_at = (clock.now() - timedelta(minutes=11)).timestamp()
    os.utime(storage.upload(upload.id), (stopped_at, stopped_at))
    for store in (uploads, restarted):
        with suppress(ChecksumMismatch):
            await send(store, upload, 1, b"", checksum=checksum)
    assert (await uploads.get(upload.id, principal.organization_id)).expires_at == until
    await uploads.create(stranger, "m", 1000)
    now = clock.now()
    monkeypatch.setattr(clock, "now", lambda: now + timedelta(hours=24))
    assert await restarted.expire() == 2


async def test_a_complete_upload_is_kept_for_a_day_though_its_record_was_lost(
    uploads: UploadStore, storage: Storage, principal: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = await uploads.create(principal, "m", 2)
    storage.upload(upload.id).write_bytes(b"xy")
    now = clock.now() + timedelta(hours=2)
    monkeypatch.setattr(clock, "now", lambda: now)
    done = await uploads.get(upload.id, principal.organization_id)
    assert (done.status, done.expires_at) == ("complete", now + timedelta(days=1))


async def test_a_piece_that_takes_longer_than_a_day_is_not_expired(
    uploads: UploadStore, storage: Storage, principal: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = await uploads.create(principal, "m", 3)
    now = clock.now()
    num_ended: list[int] = []

    async def slow() -> AsyncIterator[bytes]:
        for hours in (0, 20, 40):
            monkeypatch.setattr(clock, "now", lambda hours=hours: now + timedelta(hours=hours))
            num_ended.append(await uploads.expire())
            yield b"x"

    assert await uploads.append(upload.id, principal.organization_id, 0, slow()) == 3
    assert num_ended == [0, 0, 0]
    assert (await uploads.get(upload.id, principal.organization_id)).status == "complete"


@pytest.mark.parametrize(
    ("filename", "clean"),
    [
        ("model.pt2", "model.pt2"),
        ("../../etc/passwd", "passwd"),
        ("C:\\models\\a b.tar", "a b.tar"),
        ("a\x00\nb", "ab"),
        ("", "upload"),
        ("dir/", "upload"),
        ("x" * 300 + ".pt2", "x" * 251 + ".pt2"),
    ],
)
def test_filenames(filename: str, clean: str) -> None:
    assert clean_filename(filename) == clean


async def test_nobody_waits_for_room_that_waits_for_a_thread(
    uploads: UploadStore, principal: Principal, database: Database, no_threads: None
) -> None:
    """Whoever looks for room may keep everybody else from writing."""
    creating = asyncio.create_task(uploads.create(principal, "m", 9))
    try:
        async with asyncio.timeout(10), database.write() as session:
            found = await session.scalars(select(Upload.length_bytes))
        while not found.all():  # it may come after
            async with asyncio.timeout(10), database.write() as session:
                found = await session.scalars(select(Upload.length_bytes))
    finally:
        creating.cancel()
        await asyncio.gather(creating, return_exceptions=True)
