"""What `push` sends: one file as it is, or several as a tar that is never written to disk.

The tar is a list of pieces with known lengths, so its size is known before it is read and an
upload can go on from any offset. It is reproducible: equal files give equal bytes.
"""

import hashlib
import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from app.cli.client import Refused

EXAMPLES_NAME = "examples.npz"

Piece = bytes | Path


class FileChanged(Refused):
    """What was uploaded so far is no file that there ever was."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} changed while it was being uploaded; push again.")


class Stamp(NamedTuple):
    """By which a file is the same one, unchanged."""

    num_bytes: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> "Stamp":
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


class Parcel:
    """Bytes to upload, addressable by offset, of files as they are when it is made. `filename` is
    what the box shows people."""

    def __init__(self, filename: str, pieces: list[Piece]) -> None:
        self.filename = filename
        self._pieces = pieces
        self._stamps = {p: Stamp.of(p.stat()) for p in pieces if isinstance(p, Path)}
        lengths = [len(p) if isinstance(p, bytes) else self._stamps[p].num_bytes for p in pieces]
        self._ends = list(accumulate(lengths))
        self._starts = [end - length for end, length in zip(self._ends, lengths, strict=True)]
        self.num_bytes = self._ends[-1] if pieces else 0

    def fingerprint(self) -> str:
        """Of the name and the files, by path, size, time of change and inode."""
        digest = hashlib.sha256(self.filename.encode())
        for piece in self._pieces:
            if isinstance(piece, bytes):
                digest.update(piece)
            else:
                digest.update(f"{piece.resolve()}\n{tuple(self._stamps[piece])}".encode())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raises `FileChanged`."""
        for path, stamp in self._stamps.items():
            try:
                is_same = Stamp.of(path.stat()) == stamp
            except FileNotFoundError:
                is_same = False
            if not is_same:
                raise FileChanged(path)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Up to `num_bytes` from `offset`; fewer only at the end. Raises `FileChanged`."""
        chunks: list[bytes] = []
        index = bisect_right(self._ends, offset)
        while num_bytes and index < len(self._pieces):
            chunk = self._read_piece(index, offset - self._starts[index], num_bytes)
            chunks.append(chunk)
            offset += len(chunk)
            num_bytes -= len(chunk)
            index = bisect_right(self._ends, offset)
        return b"".join(chunks)

    def _read_piece(self, index: int, start: int, num_bytes: int) -> bytes:
        piece = self._pieces[index]
        if isinstance(piece, bytes):
            return piece[start : start + num_bytes]
        wanted = min(num_bytes, self._ends[index] - self._starts[index] - start)
        try:
            with piece.open("rb") as file:
                file.seek(start)
                chunk = file.read(wanted)
                is_same = Stamp.of(os.fstat(file.fileno())) == self._stamps[piece]
        except FileNotFoundError:
            raise FileChanged(piece) from None
        if not is_same or len(chunk) != wanted:
            raise FileChanged(piece)
        return chunk


def pack(path: Path, tokenizer: Path | None, examples: Path | None = None) -> Parcel:
    """The parcel for a model file or directory, with a tokenizer directory and an `.npz` of
    example inputs beside it if given.

    Raises `Refused` for a path that is missing or empty.
    """
    if not path.exists():
        raise Refused(f"{path} does not exist.")
    if tokenizer is not None and not tokenizer.is_dir():
        raise Refused(f"--tokenizer {tokenizer} is not a directory.")
    if examples is not None and not examples.is_file():
        raise Refused(f"--example {examples} is not a file.")
    beside = _beside(tokenizer, examples)
    if path.is_dir():
        files = _files_below(path, "")
        if examples is not None:
            files = [(name, file) for name, file in files if name != EXAMPLES_NAME]
        return _tar(f"{path.resolve().name}.tar", files + beside)
    if not beside:
        return Parcel(path.name, [path])
    return _tar(f"{path.stem}.tar", [(path.name, path), *beside])


def _beside(tokenizer: Path | None, examples: Path | None) -> list[tuple[str, Path]]:
    files = _files_below(tokenizer, "tokenizer/") if tokenizer else []
    return [*files, (EXAMPLES_NAME, examples)] if examples else files


def _files_below(directory: Path, prefix: str) -> list[tuple[str, Path]]:
    """(name in the tar, file), sorted; hidden files stay home and links are followed."""
    files = [
        (prefix + file.relative_to(directory).as_posix(), file)
        for file in sorted(directory.rglob("*"))
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(directory).parts)
    ]
    if not files:
        raise Refused(f"{directory} holds no files.")
    return files


def _tar(filename: str, files: Iterable[tuple[str, Path]]) -> Parcel:
    pieces: list[Piece] = []
    total = 0
    for name, file in files:
        entry = tarfile.TarInfo(name)
        entry.size = file.stat().st_size
        header = entry.tobuf(tarfile.PAX_FORMAT)
        padding = bytes(-entry.size % tarfile.BLOCKSIZE)
        pieces += [header, *([file] if entry.size else []), *([padding] if padding else [])]
        total += len(header) + entry.size + len(padding)
    end = 2 * tarfile.BLOCKSIZE
    pieces.append(bytes(end + -(total + end) % tarfile.RECORDSIZE))
    return Parcel(filename, pieces)
