"""The journal's files: numbered segments of checksummed records.

Owns the form on disk. A segment is a 12-byte header and then records, each a length, a CRC-32
and that many bytes of msgpack. A crash may tear the last record of any segment; what follows
a torn or damaged record is not read.
"""

import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from app.core.errors import Conflict
from app.core.failpoints import failpoint
from app.core.storage import fsync_directory
from app.metering.records import AnyRecord

MAGIC = b"tapeout-jnl1"
PREFIX = struct.Struct("<II")  # length, CRC-32 of the payload
MAX_RECORD_BYTES = 16 * 1024**2

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyRecord)


def encode(record: AnyRecord) -> bytes:
    payload = _encoder.encode(record)
    return PREFIX.pack(len(payload), zlib.crc32(payload)) + payload


def segment_path(directory: Path, number: int) -> Path:
    return directory / f"{number:012d}.journal"


def segment_numbers(directory: Path) -> list[int]:
    """The segments that exist, oldest first."""
    return sorted(int(path.stem) for path in directory.glob("*.journal") if path.stem.isdigit())


class Segment:
    """A segment open for appending. Every method may raise `OSError`."""

    def __init__(self, directory: Path, number: int) -> None:
        self.number = number
        self.size_bytes = len(MAGIC)
        path = segment_path(directory, number)
        failpoint("segments.before_create")
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        failpoint("segments.after_create")
        try:
            _write_all(self._descriptor, MAGIC)
            failpoint("segments.before_directory_sync")
            fsync_directory(directory)
            failpoint("segments.after_directory_sync")
        except OSError:
            os.close(self._descriptor)
            raise

    def append(self, payloads: Iterable[bytes]) -> None:
        data = b"".join(payloads)
        failpoint("segments.before_append")
        _write_all(self._descriptor, data)
        failpoint("segments.after_append")
        self.size_bytes += len(data)

    def sync(self) -> None:
        failpoint("segments.before_sync")
        os.fdatasync(self._descriptor)
        failpoint("segments.after_sync")

    def close(self) -> None:
        os.close(self._descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class SegmentReader:
    """Yields the sound records of one segment; afterwards `num_unread_bytes` says what of its
    end could not be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_unread_bytes = 0

    def __iter__(self) -> Iterator[AnyRecord]:
        data = self.path.read_bytes()
        offset = len(MAGIC)
        if data[:offset] != MAGIC:
            self.num_unread_bytes = len(data)
            return
        while offset < len(data):
            payload = _payload_at(data, offset)
            if payload is None:
                self.num_unread_bytes = len(data) - offset
                return
            offset += PREFIX.size + len(payload)
            try:
                yield _decoder.decode(payload)
            except msgspec.ValidationError as error:
                raise Conflict(
                    f"{self.path} was written by another version of Tapeout ({error}). "
                    "Start that version once, so that it settles its requests."
                ) from error


def _payload_at(data: bytes, offset: int) -> bytes | None:
    """None when the record is cut short or does not match its checksum."""
    start = offset + PREFIX.size
    if start > len(data):
        return None
    length, checksum = PREFIX.unpack_from(data, offset)
    payload = data[start : start + length]
    if not 0 < length <= MAX_RECORD_BYTES or len(payload) < length:
        return None
    return payload if zlib.crc32(payload) == checksum else None
