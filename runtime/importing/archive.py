"""Unpacks an upload: tells archives from single files and extracts them under hard limits.

Owns everything about archives as containers (links, names, sizes, bombs). What the files are is
`unpacked.py`'s to tell. Executes nothing of it.
"""

import gzip
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO

from runtime.importing.formats import describe_foreign_zip, describe_unknown, is_onnx
from runtime.importing.program import ImportFailure
from runtime.importing.unpacked import (
    TITLES,
    ZIP_DAMAGE,
    ProgramKind,
    UnpackedUpload,
    damaged,
    program_kind,
    recognise,
)

__all__ = ["TITLES", "UnpackedUpload", "unpack"]

MAX_MEMBERS = 20_000
MAX_RATIO = 100  # unpacked bytes per uploaded byte
MAX_UNPACKED_BYTES = 512 * 1024**3
RATIO_ALLOWANCE_BYTES = 1024**2  # so that tiny text files cannot trip the ratio
MAX_DEPTH = 16
MAX_PATH_BYTES = 1024
CHUNK_BYTES = 1024**2

GZIP_MAGIC = b"\x1f\x8b"
ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
TAR_MAGIC_AT = 257
TAR_MAGIC = b"ustar"

# What the standard library raises for archives that are cut short, altered or too exotic.
_DAMAGE = (*ZIP_DAMAGE, tarfile.TarError, gzip.BadGzipFile, UnicodeDecodeError)


def unpack(path: Path, directory: Path, max_bytes: int = MAX_UNPACKED_BYTES) -> UnpackedUpload:
    """Make the upload at `path` loadable, extracting into the empty `directory` if it is an
    archive. Raises `ImportFailure` on anything that is not one of the accepted forms."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(ZIP_MAGIC):
        try:
            if kind := _unpack_zip(path, directory, max_bytes):
                return UnpackedUpload(kind=kind, path=path)
        except _DAMAGE as error:
            raise damaged(error) from error
    elif head.startswith(GZIP_MAGIC) or head[TAR_MAGIC_AT:].startswith(TAR_MAGIC):
        is_gzip = head.startswith(GZIP_MAGIC)
        _extract_tar(path, directory, _Budget(path, directory, max_bytes), is_gzip=is_gzip)
    elif is_onnx(head):
        return UnpackedUpload(kind="onnx", path=path)
    else:
        raise describe_unknown(path, head)
    return recognise(directory)


# --- limits -----------------------------------------------------------------------------


class _Budget:
    """What an archive may still unpack to; counts real bytes, never the sizes it declares."""

    def __init__(self, path: Path, directory: Path, max_bytes: int) -> None:
        self.packed_bytes = path.stat().st_size
        self.max_bytes = max_bytes
        self.free_bytes = shutil.disk_usage(directory).free
        self.unpacked_bytes = 0
        self.num_members = 0

    def add_member(self) -> None:
        self.num_members += 1
        if self.num_members > MAX_MEMBERS:
            raise ImportFailure(
                "archive_members",
                f"The archive has more than {MAX_MEMBERS:,} members. Pack only the model's files.",
            )

    def add_bytes(self, num_bytes: int) -> None:
        self.unpacked_bytes += num_bytes
        if self.unpacked_bytes > MAX_RATIO * self.packed_bytes + RATIO_ALLOWANCE_BYTES:
            raise ImportFailure(
                "archive_ratio",
                f"The archive unpacks to more than {MAX_RATIO} times its size, which model files "
                "never do. Pack the model's files without padding.",
            )
        if self.unpacked_bytes > self.max_bytes:
            raise ImportFailure(
                "archive_size",
                f"The archive unpacks to more than {self.max_bytes:,} bytes, the limit here.",
            )
        if self.unpacked_bytes > self.free_bytes:
            raise ImportFailure(
                "disk_full",
                "The disk is too full to unpack this upload. Ask the operator for room.",
            )


class _BoundedReader:
    """A stream that charges every byte read from it, headers and padding included, so that no
    metadata of a compressed tar can grow without bound."""

    def __init__(self, stream: gzip.GzipFile | IO[bytes], add_bytes: Callable[[int], None]) -> None:
        self._stream = stream
        self._add_bytes = add_bytes

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(min(size, CHUNK_BYTES) if size >= 0 else CHUNK_BYTES)
        self._add_bytes(len(data))
        return data


# --- extraction -------------------------------------------------------------------------


def _unpack_zip(path: Path, directory: Path, max_bytes: int) -> ProgramKind | None:
    """Extracts an archive; a program, which may be a zip too, is only checked."""
    with zipfile.ZipFile(path) as archive:
        if kind := program_kind(archive, path):
            return kind
        if failure := describe_foreign_zip(archive):
            raise failure
        _extract_zip(archive, directory, _Budget(path, directory, max_bytes))
        return None


def _extract_zip(archive: zipfile.ZipFile, directory: Path, budget: _Budget) -> None:
    for member in archive.infolist():
        budget.add_member()
        mode = member.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _special_member(member.filename)
        if member.flag_bits & 0x1:
            raise ImportFailure(
                "archive_encrypted", "The archive is encrypted. Pack it without a password."
            )
        target = _target(directory, member.filename)
        if member.is_dir():
            _make_directory(target)
            continue
        with archive.open(member) as source:
            _write(source, target, budget.add_bytes)


def _extract_tar(path: Path, directory: Path, budget: _Budget, *, is_gzip: bool) -> None:
    with path.open("rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if is_gzip else raw
        reader = _BoundedReader(stream, budget.add_bytes)
        try:
            with tarfile.open(fileobj=reader, mode="r|") as archive:  # type: ignore[arg-type]
                for member in archive:
                    _extract_tar_member(archive, member, directory, budget)
        except _DAMAGE as error:
            raise damaged(error) from error


def _extract_tar_member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, directory: Path, budget: _Budget
) -> None:
    budget.add_member()
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        raise _special_member(member.name)
    if member.isdir() and PurePosixPath(member.name) == PurePosixPath("."):
        return
    target = _target(directory, member.name)
    if member.isdir():
        _make_directory(target)
        return
    source = archive.extractfile(member)
    assert source is not None, "a regular member has contents"
    _write(source, target, lambda _: None)  # the stream underneath has charged the bytes


def _target(directory: Path, name: str) -> Path:
    """Where a member goes, always inside `directory`."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    is_outside = name.startswith("/") or ".." in parts
    if is_outside or "\\" in name or ":" in name or "\0" in name or not parts:
        raise ImportFailure(
            "archive_path",
            f"The archive member {name[:200]!r} points outside the archive. Pack relative paths "
            "only, for example: tar -cf model.tar -C my-model .",
        )
    sizes = [len(os.fsencode(part)) for part in parts]
    if len(parts) > MAX_DEPTH or max(sizes) > 255 or sum(sizes) > MAX_PATH_BYTES:
        raise ImportFailure(
            "archive_path", f"The archive member {name[:200]!r} has too long a path."
        )
    return directory.joinpath(*parts)


def _write(source: IO[bytes], target: Path, add_bytes: Callable[[int], None]) -> None:
    _make_directory(target.parent)
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError as error:
        raise _duplicate(target) from error
    with os.fdopen(descriptor, "wb") as file:
        while chunk := source.read(CHUNK_BYTES):
            add_bytes(len(chunk))
            file.write(chunk)


def _make_directory(target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise _duplicate(target) from error


def _duplicate(target: Path) -> ImportFailure:
    return ImportFailure(
        "archive_duplicate", f"The archive holds {target.name!r} twice. Pack each file once."
    )


def _special_member(name: str) -> ImportFailure:
    return ImportFailure(
        "archive_link",
        f"The archive member {name[:200]!r} is a link or device; only files and directories are "
        "accepted. Pack the files themselves, for example: tar -chf model.tar -C my-model .",
    )
