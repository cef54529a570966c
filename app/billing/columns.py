"""Columns of an archive file: numbers of varying length, ids with a time in them, and tables of
what repeats.

Owns their bytes, before compression.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from app.core.ids import id_parts

RANDOM_BYTES = 10  # of an id, after its milliseconds


class Numbers:
    """Integers, seven bits to a byte, the last byte of each below 128; signed ones zigzag."""

    def __init__(self) -> None:
        self.data = bytearray()

    def add(self, number: int) -> None:
        """`number` is not negative."""
        while number > 127:
            self.data.append(number & 127 | 128)
            number >>= 7
        self.data.append(number)

    def add_signed(self, number: int) -> None:
        self.add(number << 1 if number >= 0 else (-number << 1) - 1)


def numbers_in(data: bytes) -> Iterator[int]:
    """The numbers that were added."""
    number = shift = 0
    for byte in data:
        if byte > 127:
            number |= (byte & 127) << shift
            shift += 7
        else:
            yield number | byte << shift
            number = shift = 0


def signed_numbers_in(data: bytes) -> Iterator[int]:
    return (number >> 1 if not number & 1 else -(number + 1 >> 1) for number in numbers_in(data))


class IdColumn:
    """Ids of requests: milliseconds as the difference to the one before, and random bytes. Others
    than `new_id` makes are kept as text."""

    def __init__(self) -> None:
        self.steps = Numbers()
        self.random = bytearray()
        self.odd: dict[int, str] = {}  # by position
        self.from_ms = self.until_ms = 0
        self._count = 0
        self._last_ms = 0

    def add(self, request_id: str) -> int:
        """Returns when it was made, in milliseconds since 1970; 0 where it does not tell."""
        parts = id_parts(request_id, "req")
        if parts is None:
            self.odd[self._count] = request_id
        made_ms, random = parts or (0, bytes(RANDOM_BYTES))
        self._count += 1
        if parts is None:
            self.steps.add_signed(0)
        else:
            self.steps.add_signed(made_ms - self._last_ms)
            self._last_ms = made_ms
            self.from_ms = min(self.from_ms or made_ms, made_ms)
            self.until_ms = max(self.until_ms, made_ms)
        self.random += random
        return made_ms


class Table:
    """Values that many rows share, each told by its place."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[bytes, int] = {}

    def index(self, value: Any) -> int:
        key = msgspec.msgpack.encode(value)
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = len(self.values)
            self.values.append(value)
        return place
