"""Captured output of builds and workers: bounded in rate and size, read by offset.

A log is a row of segment files. The first lies at the log's path, later ones beside it with the
offset at which they begin as suffix, so that an offset stays valid when old segments are dropped.
What a worker prints is untrusted: it is made harmless when read.
"""

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

SEGMENT_BYTES = 1024**2
MAX_SEGMENTS = 4
RATE_BYTES_PER_SECOND = 64 * 1024
BURST_BYTES = 256 * 1024

_ESCAPE_SEQUENCE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def build_log_name(version_id: str) -> str:
    """For `Storage.log`: the log of a version's build."""
    return f"build-{version_id}"


def replica_log_name(replica_id: str) -> str:
    """For `Storage.log`: the log of a replica, across its restarts."""
    return f"replica-{replica_id}"


def clean_text(text: str, max_chars: int | None = None) -> str:
    """`text` without terminal escapes and control characters, cut to `max_chars`."""
    text = _ESCAPE_SEQUENCE.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    # A lone surrogate can be decoded from msgpack but not written as UTF-8.
    text = text.encode("utf-8", "replace").decode()
    if max_chars is not None and len(text) > max_chars:
        return text[: max_chars - 1] + "…"
    return text


class LogFile:
    """Appends to a log, from any thread. What comes faster than the rate is left out with a note,
    so that a process that floods its output neither blocks nor fills the disk."""

    def __init__(
        self,
        path: Path,
        *,
        rate_bytes_per_second: int = RATE_BYTES_PER_SECOND,
        burst_bytes: int = BURST_BYTES,
        segment_bytes: int = SEGMENT_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self._rate = rate_bytes_per_second
        self._burst = burst_bytes
        self._segment_bytes = segment_bytes
        self._clock = clock
        self._allowance = float(burst_bytes)
        self._refilled_at = clock()
        self._num_left_out_bytes = 0
        self._lock = threading.Lock()
        self._is_line_open = False
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        start, segment = (_segments(path) or [(0, path)])[-1]
        self._descriptor = _open_segment(segment)
        self._end = start + os.fstat(self._descriptor).st_size
        self._segment_start = start

    def write(self, data: bytes) -> None:
        """What the process printed."""
        with self._lock:
            now = self._clock()
            self._allowance = min(
                self._burst, self._allowance + (now - self._refilled_at) * self._rate
            )
            self._refilled_at = now
            kept = data[: int(self._allowance)]
            self._allowance -= len(kept)
            if kept and self._num_left_out_bytes:
                self._note_left_out()
            self._num_left_out_bytes += len(data) - len(kept)
            self._append(kept)

    def note(self, text: str) -> None:
        """A line of our own, never left out."""
        with self._lock:
            self._append_line(text)

    def close(self) -> None:
        with self._lock:
            if self._descriptor < 0:
                return
            if self._num_left_out_bytes:
                self._note_left_out()
            os.close(self._descriptor)
            self._descriptor = -1

    def _note_left_out(self) -> None:
        num_bytes, self._num_left_out_bytes = self._num_left_out_bytes, 0
        rate = self._rate // 1024
        self._append_line(f"[{num_bytes:,} bytes left out: more than {rate} KiB a second]")

    def _append_line(self, text: str) -> None:
        line = clean_text(text).replace("\n", " ") + "\n"
        self._append((("\n" if self._is_line_open else "") + line).encode())

    def _append(self, data: bytes) -> None:
        if not data or self._descriptor < 0:
            return
        if self._end - self._segment_start >= self._segment_bytes:
            self._begin_segment()
        os.write(self._descriptor, data)
        self._end = self._segment_start + os.fstat(self._descriptor).st_size
        self._is_line_open = not data.endswith(b"\n")

    def _begin_segment(self) -> None:
        os.close(self._descriptor)
        self._segment_start = self._end
        self._descriptor = _open_segment(self.path.with_name(f"{self.path.name}.{self._end}"))
        for _, old in _segments(self.path)[:-MAX_SEGMENTS]:
            old.unlink(missing_ok=True)


class LogSlice(msgspec.Struct, frozen=True):
    """`next_offset` is where to go on reading; it equals the log's end when nothing is left."""

    text: str
    next_offset: int


def read_log(path: Path, offset: int = 0, max_bytes: int = 256 * 1024) -> LogSlice:
    """The log from a byte offset; a negative one counts from the end. An empty slice if there is
    no such log. Reads files, so call it in a thread."""
    segments = _segments(path)
    if not segments:
        return LogSlice("", max(offset, 0))
    end = segments[-1][0] + _size(segments[-1][1])
    if offset < 0:
        offset = max(0, end + offset)
    note = ""
    if offset < segments[0][0]:
        note = f"[{segments[0][0] - offset:,} earlier bytes were dropped to bound the log]\n"
        offset = segments[0][0]
    offset = min(offset, end)
    data = b""
    for start, segment in segments:
        at = offset + len(data)
        if len(data) < max_bytes and start <= at:
            data += _read(segment, at - start, max_bytes - len(data))
    data = _whole_characters(data)
    return LogSlice(note + clean_text(data.decode("utf-8", "replace")), offset + len(data))


def last_line(path: Path, max_chars: int = 300) -> str:
    """The last line that says anything, for an explanation of an end."""
    lines = [line.strip() for line in read_log(path, -8192).text.splitlines()]
    said = [line for line in lines if line and not line.startswith("[")]
    return clean_text(said[-1], max_chars) if said else ""


def delete_log(path: Path) -> None:
    for _, segment in _segments(path):
        segment.unlink(missing_ok=True)


def _segments(path: Path) -> list[tuple[int, Path]]:
    """(offset of its first byte, file), oldest first."""
    found = [(0, path)] if path.exists() else []
    for segment in path.parent.glob(f"{path.name}.*"):
        suffix = segment.name[len(path.name) + 1 :]
        if suffix.isdecimal():
            found.append((int(suffix), segment))
    return sorted(found)


def _open_segment(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # dropped while we looked
        return 0


def _read(path: Path, at: int, num_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(at)
            return file.read(num_bytes)
    except FileNotFoundError:
        return b""


def _whole_characters(data: bytes) -> bytes:
    """Leaves the beginning of a UTF-8 character at the end for the next read, unless it is all
    there is."""
    for length in range(1, min(4, len(data)) + 1):
        lead = data[-length]
        if lead & 0xC0 == 0x80:
            continue
        expected = 2 if lead >> 5 == 6 else 3 if lead >> 4 == 14 else 4 if lead >> 3 == 30 else 1
        return data[:-length] if length < expected and length < len(data) else data
    return data
