"""Identifiers: a prefix that tells the kind, then 26 characters that sort by time of creation."""

import os
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32, lower case


_VALUES = {digit: value for value, digit in enumerate(_ALPHABET)}
_DIGITS = set(_VALUES)
_NUM_DIGITS = 26


def new_id(prefix: str) -> str:
    """`prefix_` and 128 bits (48 of milliseconds, 80 random), as in the ULID specification."""
    return id_with(prefix, time.time_ns() // 1_000_000, os.urandom(10))


def id_with(prefix: str, made_ms: int, random: bytes) -> str:
    """The id of this time and these ten bytes."""
    number = made_ms << 80 | int.from_bytes(random)
    digits = [_ALPHABET[(number >> shift) & 31] for shift in range(125, -1, -5)]
    return f"{prefix}_{''.join(digits)}"


def id_parts(text: str, prefix: str) -> tuple[int, bytes] | None:
    """The milliseconds and the ten bytes of an id with this prefix; None for any other text."""
    start = f"{prefix}_"
    digits = text.removeprefix(start)
    if not text.startswith(start) or len(digits) != _NUM_DIGITS or not set(digits) <= _DIGITS:
        return None
    number = 0
    for digit in digits:
        number = number << 5 | _VALUES[digit]
    if number >> 128:
        return None
    return number >> 80, (number & (1 << 80) - 1).to_bytes(10)
