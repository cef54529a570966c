"""Walks a protobuf message in a file field by field, forwards, in constant memory.

Knows the wire format and no message's meaning. Payloads are stepped over unless asked for.
"""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

MAX_HEADER_BYTES = 8 * 1024**2  # taken in, of everything that shares a budget
MAX_FIELDS = 1_000_000
BUFFER_BYTES = 4096

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class Budget:
    """What may still be walked. Shared by all files of one upload."""

    def __init__(self) -> None:
        self.fields = MAX_FIELDS
        self.header_bytes = MAX_HEADER_BYTES

    def take_field(self) -> None:
        self.fields -= 1
        if self.fields < 0:
            raise ValueError(f"more than {MAX_FIELDS:,} fields")

    def take_bytes(self, num_bytes: int) -> None:
        self.header_bytes -= num_bytes
        if self.header_bytes < 0:
            raise ValueError(f"more than {MAX_HEADER_BYTES:,} bytes of headers")


class Field(NamedTuple):
    """`value` is a varint's, or of a field of bytes where it ends; 0 for fixed numbers."""

    number: int
    wire: int
    value: int


class Reader:
    """The message of `size_bytes` at `start` of a file. Raises `ValueError` for bytes that are no
    protobuf, and beyond the budget."""

    def __init__(self, file: BinaryIO, start: int, size_bytes: int, budget: Budget) -> None:
        self._file = file
        self._budget = budget
        self._buffer = b""
        self._buffer_at = start
        self.at = start
        self.end = start + size_bytes

    def fields(self, end: int) -> Iterator[Field]:
        """The fields up to `end`, each left behind when the next is asked for, however much of
        it was looked into."""
        while self.at < end:
            self._budget.take_field()
            tag = self._varint(end)
            number, wire = tag >> 3, tag & 7
            if not 0 < number < 2**29:
                raise ValueError("a field without a number")
            if wire == VARINT:
                yield Field(number, wire, self._varint(end))
                continue
            if wire not in (BYTES, FIXED32, FIXED64):
                raise ValueError("a field of an unknown kind")
            length = self._varint(end) if wire == BYTES else 8 if wire == FIXED64 else 4
            stop = self.at + length
            if stop > end:
                raise ValueError("it is cut short")
            yield Field(number, wire, stop if wire == BYTES else 0)
            self.at = stop

    def text(self, end: int, max_bytes: int) -> str:
        """The field up to `end`. Another reader would see another name in what is not UTF-8, so
        it is refused."""
        try:
            return self.data(end, max_bytes).decode()
        except UnicodeDecodeError:
            raise ValueError("a text that is not UTF-8") from None

    def data(self, end: int, max_bytes: int) -> bytes:
        """The field up to `end`, refused beyond `max_bytes`."""
        length = end - self.at
        if length > max_bytes:
            raise ValueError(f"a text of {length:,} bytes")
        self._budget.take_bytes(length)
        self._file.seek(self.at)
        data = self._file.read(length)
        if len(data) < length:
            raise ValueError("it is cut short")
        self.at = end
        return data

    def varints(self, field: Field) -> Iterator[int]:
        """The numbers of one occurrence of a repeated field, packed or not."""
        if field.wire == VARINT:
            yield field.value
        elif field.wire == BYTES:
            while self.at < field.value:
                self._budget.take_field()
                yield self._varint(field.value)

    def _varint(self, end: int) -> int:
        value = shift = 0
        while True:
            if self.at >= end:
                raise ValueError("it is cut short")
            index = self.at - self._buffer_at
            if not 0 <= index < len(self._buffer):
                self._fill()
                index = 0
            byte = self._buffer[index]
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & (2**64 - 1)
            shift += 7
            if shift > 63:
                raise ValueError("a number without an end")

    def _fill(self) -> None:
        self._file.seek(self.at)
        self._buffer = self._file.read(BUFFER_BYTES)
        self._buffer_at = self.at
        if not self._buffer:
            raise ValueError("it is cut short")
