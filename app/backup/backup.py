"""Taking a backup beside a box that serves. Making a box of one: `restore.py`.

Owns the order that makes the copy whole: the journal first, then the database at one moment, then
the files that its rows name. What is settled in between is settled once when the copy starts, for
settlements are idempotent; what came after that moment is not in it.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import msgspec
from sqlalchemy import select

from app.backup.dump import TableFile, dump_table, revision_of, snapshot, tables
from app.core import clock
from app.core.database import create_writer_engine
from app.core.errors import InvalidRequest
from app.core.storage import fsync_directory
from app.registry.tables import Artifact

MANIFEST = "manifest.json"
DATABASE, FILES = "database", "files"
BEFORE = ("journal",)  # copied before the database's moment, the others after it
AFTER = ("keys", "archive", "uploads", "artifacts")
NOT_COPIED = frozenset({"lock"})
ATTEMPTS = 3  # a version may be deleted between its row and its files

Report = Callable[[str], object]


class BackedUpFile(msgspec.Struct, frozen=True):
    size_bytes: int
    sha256: str


class BackupManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup holds. It is written last: without it there is no backup."""

    form: int = 1
    revision: str
    taken_at: datetime
    tables: dict[str, TableFile]
    files: dict[str, BackedUpFile]


def take_backup(
    data_dir: Path, database_url: str, target: Path, report: Report = lambda _: None
) -> BackupManifest:
    """Writes a backup to `target`, which must not exist yet, beside whatever serves. Raises
    `InvalidRequest` or `OSError`; an unfinished target is removed."""
    if target.exists():
        raise InvalidRequest(f"{target} exists already; a backup is a new directory.")
    if not (data_dir / "journal").is_dir():
        raise InvalidRequest(f"There is no box in {data_dir}; name its data directory.")
    target.mkdir(parents=True, mode=0o700)
    try:
        for _ in range(ATTEMPTS):
            manifest = _copy(data_dir, database_url, target, report)
            if manifest is not None:
                return manifest
        raise InvalidRequest("Models are being deleted faster than they are copied; try again.")
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _copy(data_dir: Path, database_url: str, target: Path, report: Report) -> BackupManifest | None:
    """None when files that the database names were deleted meanwhile."""
    for part in (DATABASE, FILES):
        shutil.rmtree(target / part, ignore_errors=True)
        (target / part).mkdir(mode=0o700)
    files = _copy_files(data_dir, target / FILES, BEFORE, report)
    engine = create_writer_engine(database_url).execution_options(sqlite_begin="")
    dumped: dict[str, TableFile] = {}
    try:
        with snapshot(engine) as connection:
            taken_at = clock.now()
            revision = revision_of(connection)
            for table in tables():
                path = target / DATABASE / f"{table.name}.msgpack.z"
                dumped[table.name] = dump_table(connection, table, path)
                report(f"{table.name}: {dumped[table.name].num_rows:,} rows")
            artifact_ids = list(connection.scalars(select(Artifact.__table__.c.id)))
    finally:
        engine.dispose()
    files |= _copy_files(data_dir, target / FILES, AFTER, report)
    if any(not (target / FILES / "artifacts" / name).exists() for name in artifact_ids):
        return None
    manifest = BackupManifest(revision=revision, taken_at=taken_at, tables=dumped, files=files)
    _write_durably(target / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    fsync_directory(target)
    return manifest


def _copy_files(
    source: Path, target: Path, parts: tuple[str, ...], report: Report
) -> dict[str, BackedUpFile]:
    copied: dict[str, BackedUpFile] = {}
    for part in parts:
        for path in sorted((source / part).rglob("*")):
            name = path.relative_to(source).as_posix()
            if path.is_symlink() or not path.is_file() or path.name in NOT_COPIED:
                continue
            try:
                copied[name] = copy_file(path, target / name)
            except FileNotFoundError:
                (target / name).unlink(missing_ok=True)  # deleted since it was listed
        size = sum(file.size_bytes for name, file in copied.items() if name.startswith(part))
        report(f"{part}: {size:,} bytes")
    return copied


def copy_file(source: Path, target: Path, mode: int | None = None) -> BackedUpFile:
    """Copies the bytes, durably, and gives what was copied. The mode is the source's, but never
    lets others write; or it is `mode`, from before the first byte."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    digest, size_bytes = hashlib.sha256(), 0
    with source.open("rb") as reading, target.open("wb") as writing:
        os.fchmod(writing.fileno(), source.stat().st_mode & 0o755 if mode is None else mode)
        while data := reading.read(1024 * 1024):
            digest.update(data)
            writing.write(data)
            size_bytes += len(data)
        writing.flush()
        os.fsync(writing.fileno())
    return BackedUpFile(size_bytes, digest.hexdigest())


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(backup: Path) -> BackupManifest:
    """Raises `InvalidRequest`."""
    try:
        return msgspec.json.decode((backup / MANIFEST).read_bytes(), type=BackupManifest)
    except FileNotFoundError:
        raise InvalidRequest(f"{backup} is no backup: it has no {MANIFEST}.") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{backup / MANIFEST} cannot be read: {error}.") from error
