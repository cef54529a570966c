"""Artifacts: what a successful build leaves behind, checked, hashed and moved into place.

Owns the files below `artifacts/` and the digest that names their content. Rows are written by
`builder.py`. Everything here blocks on the disk, so it is called in a thread.
"""

import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec

from app.core.storage import fsync_directory
from app.deployments.acceptance import NotAcceptable

MAX_FILES = 20_000
CHUNK_BYTES = 1024**2


class StoredFiles(msgspec.Struct, frozen=True):
    """`digest` is SHA-256 over names, sizes and contents in order of name."""

    digest: str
    size_bytes: int
    num_files: int


def store(output_dir: Path, artifact_dir: Path) -> StoredFiles:
    """Hashes what a build wrote, makes it durable and read-only, and moves it into place in one
    step. Raises `NotAcceptable` for anything but plain files and folders, and `OSError`."""
    digest = hashlib.sha256()
    size_bytes = num_files = 0
    for name, path in _files(output_dir):
        num_files += 1
        if num_files > MAX_FILES:
            raise NotAcceptable(f"it wrote more than {MAX_FILES:,} files")
        size_bytes += _read_whole(path, name, digest.update)
    if not num_files:
        raise NotAcceptable("it wrote no files")
    for folder, _, _ in os.walk(output_dir):
        fsync_directory(Path(folder))
    output_dir.rename(artifact_dir)
    fsync_directory(artifact_dir.parent)
    return StoredFiles(digest.hexdigest(), size_bytes, num_files)


def remove(path: Path) -> None:
    """A directory with everything in it, if it exists."""
    shutil.rmtree(path, ignore_errors=True)


def remove_unknown(artifacts_dir: Path, known_ids: set[str]) -> list[str]:
    """Removes artifacts that no row names; returns their ids."""
    unknown = [entry for entry in artifacts_dir.iterdir() if entry.name not in known_ids]
    for entry in unknown:
        remove(entry)
    return [entry.name for entry in unknown]


def _files(directory: Path) -> list[tuple[str, Path]]:
    """(name relative to `directory`, path), sorted by name. Follows no link."""
    found: list[tuple[str, Path]] = []
    for folder, folders, names in os.walk(directory):
        for name in [*folders, *names]:
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise NotAcceptable(f"it wrote {name!a}, which is neither a file nor a folder")
            if stat.S_ISREG(mode):
                found.append((path.relative_to(directory).as_posix(), path))
    return sorted(found, key=lambda item: os.fsencode(item[0]))


def _read_whole(path: Path, name: str, update: Callable[[bytes], None]) -> int:
    """Feeds name, size and content to `update`; returns the size."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        size_bytes = os.fstat(descriptor).st_size
        update(os.fsencode(name) + b"\0" + size_bytes.to_bytes(8, "little"))
        while chunk := file.read(CHUNK_BYTES):
            update(chunk)
        os.fchmod(descriptor, 0o400)
        os.fsync(descriptor)
    return size_bytes
