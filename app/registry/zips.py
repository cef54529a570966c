"""Zip archives, read member by member; their directory is believed only where it agrees with
itself. Writes nothing."""

import io
import stat
import struct
import zipfile
from collections.abc import Iterator
from typing import IO, BinaryIO

from app.core.errors import Unprocessable
from app.registry.archives import (
    Member,
    Totals,
    check_name,
    check_num_members,
    checked_name,
    damaged,
    reading,
    special_member,
)

MAX_READ_BYTES = 4 * 1024**2  # the most that a parser may ask for at once

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


class BoundedFile(io.RawIOBase):
    """A part of a file, as a file that refuses large reads: no length written in an archive can
    make a parser fill the memory."""

    def __init__(self, file: BinaryIO, start: int, size_bytes: int) -> None:
        self._file, self._start, self._size_bytes, self._at = file, start, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size_bytes}[whence]
        if base + offset < 0:
            raise ValueError("a negative offset")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._size_bytes - self._at, 0)
        size = left if size < 0 else min(size, left)
        if size > MAX_READ_BYTES:
            raise ValueError(f"a header of {size:,} bytes")
        self._file.seek(self._start + self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data


def open_zip(file: BinaryIO, start: int, size_bytes: int) -> zipfile.ZipFile:
    """The archive with its directory checked: nothing overlaps, no size contradicts another.
    Raises `Unprocessable`."""
    with reading():
        archive = zipfile.ZipFile(BoundedFile(file, start, size_bytes))
    infos = archive.infolist()
    check_num_members(len(infos))
    end_at = archive.start_dir
    for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
        if info.flag_bits & 0x1:
            raise Unprocessable(
                "The archive is encrypted. Pack it without a password.", code="archive_encrypted"
            )
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Unprocessable(
                f"{info.filename[:200]!r} is packed with a rare compression. Upload a plain "
                "archive:\n    tar -cf model.tar -C my-model .",
                code="compression",
            )
        with reading():
            data_at = _data_at(archive, info)
        if data_at + info.compress_size > end_at:
            raise damaged("its members overlap")
        end_at = info.header_offset
    return archive


def _data_at(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin, once its local header agrees with the directory."""
    file = archive.fp
    assert file is not None, "the archive is open"
    file.seek(info.header_offset)
    fields = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    magic, flags, name_bytes, extra_bytes = fields[0], fields[2], fields[-2], fields[-1]
    packed, unpacked = fields[-4], fields[-3]
    if magic != b"PK\x03\x04":
        raise ValueError("a member has no header")
    has_sizes = not flags & 0x8 and 0xFFFFFFFF not in (packed, unpacked)
    if has_sizes and (packed, unpacked) != (info.compress_size, info.file_size):
        raise ValueError("a member has two sizes")
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        raise ValueError("a stored member has two sizes")
    return info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes


def zip_members(archive: zipfile.ZipFile, totals: Totals) -> Iterator[Member]:
    """Every regular file of a checked archive. Raises `Unprocessable`."""
    seen: set[str] = set()
    for info in archive.infolist():
        totals.add(info.file_size)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise special_member(info.filename)
        if "\0" in info.orig_filename:
            check_name(info.orig_filename)
        name = checked_name(info.filename, seen)
        if info.is_dir():
            continue

        is_stored = info.compress_type == zipfile.ZIP_STORED
        data_at = _data_at(archive, info) if is_stored else None
        file = _ZipFile(archive, info)
        yield Member(name, info.file_size, data_at, file.read)
        file.close()


class _ZipFile:
    """One member's bytes, from the first on; opened only if someone asks."""

    def __init__(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        self._archive, self._info = archive, info
        self._file: IO[bytes] | None = None

    def read(self, num_bytes: int) -> bytes:
        with reading():
            if self._file is None:
                self._file = self._archive.open(self._info)
            return b"".join(_pieces(self._file, num_bytes))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _pieces(file: IO[bytes], num_bytes: int) -> Iterator[bytes]:
    while num_bytes and (piece := file.read(min(num_bytes, MAX_READ_BYTES // 4))):
        num_bytes -= len(piece)
        yield piece
