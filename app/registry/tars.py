"""Tar archives (ustar, pax, GNU; plain or gzipped), walked once, forwards, in constant memory.

Python's `tarfile` is not used: a header can make it loop, or read any amount into memory.
"""

import gzip
import re
from collections.abc import Iterator
from typing import BinaryIO, Protocol

from app.registry.archives import (
    MAX_MEMBERS,
    Member,
    Totals,
    check_name,
    checked_name,
    damaged,
    reading,
    special_member,
)

MAX_HEADER_BYTES = 64 * 1024  # of one pax or GNU header
MAX_GZIP_BYTES = 4 * 1024**3  # of a compressed archive are looked at; the build sees the rest
BLOCK = 512

_PAX_RECORD = re.compile(rb"(\d{1,6}) ([^=\n]{1,200})=")


class Stream(Protocol):
    """A sequence of bytes that is walked once, forwards."""

    def read(self, num_bytes: int) -> bytes: ...
    def skip(self, num_bytes: int) -> None: ...
    def tell(self) -> int | None: ...


class PlainStream:
    """An uncompressed file: skipping costs nothing, and others may read the file in between."""

    def __init__(self, file: BinaryIO, size_bytes: int) -> None:
        self._file, self._size_bytes, self._at = file, size_bytes, 0

    def read(self, num_bytes: int) -> bytes:
        self._file.seek(self._at)
        data = self._file.read(num_bytes)
        self._at += len(data)
        return data

    def skip(self, num_bytes: int) -> None:
        if self._at + num_bytes > self._size_bytes:
            raise damaged("it is cut short")
        self._at += num_bytes

    def tell(self) -> int | None:
        return self._at


class _EnoughError(Exception):
    """The part of a compressed archive that is looked at ends here."""


class GzipStream:
    """A compressed file, unpacked in constant memory up to a limit."""

    def __init__(self, file: BinaryIO, totals: Totals) -> None:
        file.seek(0)
        self._file = gzip.GzipFile(fileobj=file)
        self._totals = totals
        self._num_bytes = 0

    def read(self, num_bytes: int) -> bytes:
        with reading():
            data = self._file.read(num_bytes)
        self._num_bytes += len(data)
        self._totals.check(self._num_bytes)
        if self._num_bytes > MAX_GZIP_BYTES:
            raise _EnoughError
        return data

    def skip(self, num_bytes: int) -> None:
        while num_bytes:
            data = self.read(min(num_bytes, 1024**2))
            if not data:
                raise damaged("it is cut short")
            num_bytes -= len(data)

    def tell(self) -> int | None:
        return None


def tar_members(stream: Stream, totals: Totals) -> Iterator[Member]:
    """Every regular file of a tar (ustar, pax or GNU). Raises `Unprocessable`."""
    try:
        yield from _tar_members(stream, totals)
    except _EnoughError:
        totals.is_cut = True


def _tar_members(stream: Stream, totals: Totals) -> Iterator[Member]:
    seen: set[str] = set()
    override: dict[str, str] = {}
    num_headers = 0
    while True:
        header = stream.read(BLOCK)
        if len(header) < BLOCK or not header.strip(b"\0"):
            return
        num_headers += 1
        if num_headers > 3 * MAX_MEMBERS:
            raise damaged("it has too many headers")
        kind, name, size_bytes = _tar_header(header)
        padding = -size_bytes % BLOCK
        if kind in b"xgLK":
            override |= _extension(kind, stream, size_bytes)
            stream.skip(padding)
            continue
        name, size_bytes = override.get("path", name), int(override.get("size", size_bytes))
        override = {}
        if kind not in b"0\x007" + b"5":
            raise special_member(name)
        if kind == b"5" or (kind in b"0\0" and name.endswith("/")):
            totals.add(0)
            if name.strip("./"):
                check_name(name)
            continue
        totals.add(size_bytes)
        name = checked_name(name, seen)
        member = _TarFile(stream, size_bytes)
        yield Member(name, size_bytes, stream.tell(), member.read)
        stream.skip(member.left_bytes + -size_bytes % BLOCK)


class _TarFile:
    """One member's bytes, in a stream that stands at their beginning."""

    def __init__(self, stream: Stream, size_bytes: int) -> None:
        self._stream = stream
        self.left_bytes = size_bytes

    def read(self, num_bytes: int) -> bytes:
        data = self._stream.read(min(num_bytes, self.left_bytes))
        self.left_bytes -= len(data)
        return data


def _tar_header(header: bytes) -> tuple[bytes, str, int]:
    """(kind, name, size) of a header block whose checksum is right."""
    with reading():
        stated = _tar_number(header[148:156])
        if stated != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
            raise ValueError("a header's checksum is wrong")
        size_bytes = _tar_number(header[124:136])
        name = header[:100].split(b"\0", 1)[0]
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix and header[257:263] == b"ustar\0":
            name = prefix + b"/" + name
        return header[156:157], name.decode("utf-8", "replace"), size_bytes


def _tar_number(field: bytes) -> int:
    """Octal digits or, for large values, GNU's big-endian form. Never negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    text = field.split(b"\0", 1)[0].strip()
    if text and not re.fullmatch(rb"[0-7]+", text):
        raise ValueError("a header's number is not one")
    return int(text or b"0", 8)


def _extension(kind: bytes, stream: Stream, size_bytes: int) -> dict[str, str]:
    """What a pax or GNU header says about the next member."""
    if size_bytes > MAX_HEADER_BYTES:
        raise damaged(f"a header of {size_bytes:,} bytes")
    data = stream.read(size_bytes)
    if len(data) < size_bytes:
        raise damaged("it is cut short")
    if kind == b"L":
        return {"path": data.split(b"\0", 1)[0].decode("utf-8", "replace")}
    if kind == b"K":
        return {}  # the target of a link, which is refused when it comes
    found: dict[str, str] = {}
    at = 0
    while at < size_bytes:
        record = _PAX_RECORD.match(data, at)
        if record is None or int(record[1]) < len(record[0]) + 1:
            raise damaged("a pax header makes no sense")
        end = at + int(record[1])
        keyword, value = record[2].decode("utf-8", "replace"), data[record.end() : end - 1]
        if keyword.startswith("GNU.sparse"):
            raise damaged("it holds sparse files; pack them plainly")
        if keyword == "size" and not re.fullmatch(rb"[0-9]{1,18}", value):
            raise damaged("a pax header makes no sense")
        if keyword in ("path", "size"):
            if kind == b"g":
                raise damaged("a global header names one file")
            found[keyword] = value.decode("utf-8", "replace")
        at = end
    return found
