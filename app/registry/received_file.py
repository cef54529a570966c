"""One upload's file while it grows: appends, hashes, goes back to a mark, makes durable.

Everything here blocks and belongs in a thread.
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from app.core.errors import StorageFull
from app.core.storage import fsync_directory, is_full
from app.registry.piece_mark import counted_bytes, lift_mark, mark_path, set_mark

READ_BYTES = 4 * 1024**2
WRITE_OUT_BYTES = 8 * 1024**2
CHECKSUMS = {"sha1": 20, "sha256": 32}  # tus's names, with their digests' bytes; sha1 is its least


class Hash(Protocol):
    """The part of hashlib's objects that is used here; hashlib does not export their type."""

    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...
    def copy(self) -> "Hash": ...


class Checksum(NamedTuple):
    """What a piece must hash to."""

    algorithm: str  # a name of CHECKSUMS
    digest: bytes


class Mark(NamedTuple):
    """A place in the file to go back to, with the hash of everything before it."""

    num_bytes: int
    sha256: Hash


class ReceivedFile:
    """`num_bytes` were received and hashed; the file holds exactly these."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sha256: Hash = hashlib.sha256()
        self._piece_hash: Hash | None = None
        self._written_out_bytes = 0  # up to here the disk has been told to begin
        self.num_bytes = 0

    @classmethod
    def resume(cls, path: Path) -> "ReceivedFile":
        """What an earlier process left, hashed again: gigabytes a second, in constant memory. Of
        a checked piece that it did not finish, nothing is left."""
        file = cls(path)
        num_bytes = counted_bytes(path)
        with path.open("r+b") as source:
            _cut(source, num_bytes)
            while data := source.read(READ_BYTES):
                file._sha256.update(data)
                file.num_bytes += len(data)
        file._written_out_bytes = file.num_bytes
        return file

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def mark(self, checksum: Checksum | None = None) -> Mark:
        """Starts a piece. One with a checksum is hashed on its own too, and counts only once it
        is accepted, whatever happens to this process."""
        self._truncate()
        self._piece_hash = None
        if checksum is None:
            lift_mark(self._path)
        else:
            self._piece_hash = hashlib.new(checksum.algorithm, usedforsecurity=False)
            set_mark(self._path, self.num_bytes)
        return Mark(self.num_bytes, self._sha256.copy())

    def append(self, data: bytes) -> None:
        """Raises `StorageFull` when the disk is; nothing of `data` is kept then."""
        try:
            with self._path.open("r+b") as file:
                file.seek(self.num_bytes)
                file.write(data)
                file.flush()
                self._begin_write_out(file.fileno(), self.num_bytes + len(data))
        except FileNotFoundError:
            raise
        except OSError as error:
            self._truncate()
            if is_full(error):
                raise disk_full() from error
            raise
        self._sha256.update(data)
        if self._piece_hash is not None:
            self._piece_hash.update(data)
        self.num_bytes += len(data)

    def _begin_write_out(self, descriptor: int, end: int) -> None:
        # The kernel would keep gigabytes back, for which the last piece's answer then waited.
        if end - self._written_out_bytes >= WRITE_OUT_BYTES:
            os.posix_fadvise(
                descriptor,
                self._written_out_bytes,
                end - self._written_out_bytes,
                os.POSIX_FADV_DONTNEED,
            )
            self._written_out_bytes = end

    def piece_digest(self) -> bytes:
        """Of what came since the mark, by its checksum's algorithm."""
        assert self._piece_hash is not None, "the mark asked for a checked piece"
        return self._piece_hash.digest()

    def accept(self) -> None:
        """The piece with a checksum is right: it counts."""
        lift_mark(self._path)

    def rewind(self, mark: Mark) -> None:
        """Forgets everything since the mark."""
        self.num_bytes = mark.num_bytes
        self._sha256 = mark.sha256
        self._written_out_bytes = min(self._written_out_bytes, mark.num_bytes)
        self._truncate()

    def sync(self) -> None:
        """Returns once a power loss cannot take the bytes away; all that is there counts."""
        mark_path(self._path).unlink(missing_ok=True)
        with self._path.open("r+b") as file:
            os.fsync(file.fileno())
        fsync_directory(self._path.parent)

    def _truncate(self) -> None:
        with self._path.open("r+b") as file:
            _cut(file, self.num_bytes)


def disk_full() -> StorageFull:
    """In the middle of an upload, whose room was looked at before."""
    return StorageFull("The box's disk is full. What arrived is kept; go on once there is room.")


def _cut(file: BinaryIO, num_bytes: int) -> None:
    """A file that is not longer is left alone: a cut would move the time of its last byte."""
    if os.fstat(file.fileno()).st_size != num_bytes:
        file.truncate(num_bytes)
