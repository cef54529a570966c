"""Making a box of a backup.

A backup may have travelled: its names and modes are not believed, and every byte of it is checked
before the first file is copied. Whatever fails, what was copied is removed, so that the same
command can be given again.
"""

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

from sqlalchemy import Connection, Engine, delete, update

from app.backup.backup import (
    AFTER,
    BEFORE,
    DATABASE,
    FILES,
    BackedUpFile,
    BackupManifest,
    Report,
    copy_file,
    read_manifest,
)
from app.backup.dump import DumpError, is_empty, load_table, revision_of, tables
from app.backup.triggers import without_triggers
from app.billing.payments.tables import StripeOperation
from app.core.database import create_writer_engine
from app.core.errors import Conflict, InvalidRequest
from app.core.lock import hold_data_dir
from app.core.migration import upgrade
from app.organizations.tables import Invitation, SetupToken, SignIn

PARTS = BEFORE + AFTER  # the only folders of a box that a backup may write to
SECRET_PARTS = frozenset({"keys"})
READ_BYTES = 1024 * 1024


def restore_backup(
    backup: Path, data_dir: Path, database_url: str, report: Report = lambda _: None
) -> BackupManifest:
    """Makes a box of a backup, in an empty data directory and an empty database. Everything is
    checked before anything is copied; the database's rows come in one transaction, at the end.
    Raises `InvalidRequest`, `Conflict` or `OSError`, and leaves no file of the backup then."""
    manifest = read_manifest(backup)
    with hold_data_dir(data_dir):
        if any((data_dir / part).exists() and any((data_dir / part).iterdir()) for part in PARTS):
            raise Conflict(f"{data_dir} has a box already; restore into an empty directory.")
        _check_names(manifest)
        _check_files(backup, manifest)
        report(f"{len(manifest.files):,} files checked")
        engine = create_writer_engine(database_url)
        try:
            upgrade(engine)
            _restore(engine, backup, data_dir, manifest, report)
        except DumpError as error:
            raise InvalidRequest(f"Nothing was restored: {error}") from error
        finally:
            engine.dispose()
    return manifest


def _restore(
    engine: Engine, backup: Path, data_dir: Path, manifest: BackupManifest, report: Report
) -> None:
    copied: list[Path] = []  # directories and files, in the order in which they were made
    try:
        with engine.begin() as connection:
            _check_database(connection, manifest)
            for name, expected in manifest.files.items():
                _restore_file(backup, data_dir, name, expected, copied)
            with without_triggers(connection):
                _restore_rows(connection, backup, manifest)
    except BaseException:
        _remove(copied)
        raise
    report(f"{len(manifest.files):,} files")
    report(f"{sum(file.num_rows for file in manifest.tables.values()):,} rows")


# --- what is believed ---------------------------------------------------------------------


def _check_names(manifest: BackupManifest) -> None:
    """Every name is a plain path below one of `PARTS`, and every table is there."""
    for name in manifest.files:
        part, *rest = name.split("/")
        is_plain = all(step not in ("", ".", "..") for step in rest) and name.isprintable()
        if part not in PARTS or not rest or not is_plain or "\\" in name:
            raise InvalidRequest(f"{name!r} is no file of a box; nothing was restored.")
    for table in tables():
        if table.name not in manifest.tables:
            raise InvalidRequest(
                f"The table {table.name} is missing from the manifest; nothing was restored."
            )


def _check_files(backup: Path, manifest: BackupManifest) -> None:
    """Every byte is what was written when the backup was taken."""
    for name, expected in manifest.files.items():
        if _read(backup, f"{FILES}/{name}") != expected:
            raise InvalidRequest(f"{name} is damaged: it is not what was copied.")
    for name, expected in manifest.tables.items():
        path = f"{DATABASE}/{name}.msgpack.z"
        if "/" in name or _read(backup, path).sha256 != expected.sha256:
            raise InvalidRequest(f"{path} is damaged: it is not what was copied.")


def _read(backup: Path, name: str) -> BackedUpFile:
    """The file's size and hash. Raises `InvalidRequest` unless it is one, by no link."""
    path = backup
    try:
        for step in name.split("/"):
            path = path / step
            if stat.S_ISLNK(path.lstat().st_mode):
                raise InvalidRequest(f"{path} is a link, and a backup holds none.")
        if not stat.S_ISREG(path.lstat().st_mode):
            raise InvalidRequest(f"{path} is damaged: it is no file.")
        digest, size_bytes = hashlib.sha256(), 0
        with path.open("rb") as file:
            while data := file.read(READ_BYTES):
                digest.update(data)
                size_bytes += len(data)
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidRequest(f"{name} is missing from the backup.") from None
    return BackedUpFile(size_bytes, digest.hexdigest())


def _check_database(connection: Connection, manifest: BackupManifest) -> None:
    revision = revision_of(connection)
    if revision != manifest.revision:
        raise InvalidRequest(
            f"This backup has the schema {manifest.revision}, this Tapeout {revision}. Restore "
            "it with the version that made it; the newer one then brings it up to date."
        )
    if not is_empty(connection):
        raise Conflict("The database has a box already; restore into an empty one.")


# --- what is made -------------------------------------------------------------------------


def _restore_file(
    backup: Path, data_dir: Path, name: str, expected: BackedUpFile, copied: list[Path]
) -> None:
    directory = data_dir
    *steps, _ = name.split("/")
    for step in steps:
        directory = directory / step
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
            copied.append(directory)
        if steps[0] in SECRET_PARTS:
            directory.chmod(0o700)
    target = data_dir / name
    copied.append(target)
    # A copy on a stick or in a bucket has lost its modes: what is secret is closed again.
    mode = 0o600 if steps[0] in SECRET_PARTS else None
    if copy_file(backup / FILES / name, target, mode) != expected:
        raise InvalidRequest(f"{name} changed while it was copied; nothing was restored.")


def _restore_rows(connection: Connection, backup: Path, manifest: BackupManifest) -> None:
    for table in tables():
        path = backup / DATABASE / f"{table.name}.msgpack.z"
        load_table(connection, table, path, manifest.tables[table.name])
    # Links may have been used since, and sessions ended: all are made anew.
    for table in (SignIn, Invitation, SetupToken):
        connection.execute(delete(table))
    # What was to be done at Stripe may have been done after the backup: it is looked for there by
    # our own marks before anything is sent again.
    connection.execute(
        update(StripeOperation)
        .where(StripeOperation.state.in_(("planned", "sent")))
        .values(state="unknown", first_sent_at=manifest.taken_at)
    )


def _remove(copied: list[Path]) -> None:
    for path in reversed(copied):
        with suppress(FileNotFoundError):
            if path.is_dir():
                os.rmdir(path)
            else:
                path.unlink()
