"""What JSON may hold: how many values, which is looked at before it is decoded, of large bodies in
a thread. Decoding takes time by the value, not by the byte, and while it runs nothing else does, in
a thread or not.
"""

import sys
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from app.api.bodies import decode
from app.api.threads import convert
from app.core.errors import InvalidRequest

MAX_CONTAINERS = 100_000  # objects and lists
MAX_VALUES = 2_000_000
# Of numbers near the ends of float64, such as 1e308, each takes the decoder 9 microseconds.
MAX_EXPONENTS = 1_000
MAX_PATIENT_EXPONENTS = 1_000_000  # where Python reads them, in a quarter of a microsecond
WINDOW_BYTES = 256 * 1024  # looked at together, about a millisecond in which nobody else runs
_LETTERS = bytes.maketrans(b"123456789.E", b"0000000000e")  # so that 1.5E3 is 0000e0

R = TypeVar("R")
T = TypeVar("T")


class Size(NamedTuple):
    """How many objects and lists, commas, and numbers with an exponent JSON holds."""

    num_containers: int = 0
    num_commas: int = 0
    num_exponents: int = 0

    def plus(self, text: bytes) -> "Size":
        return Size(
            self.num_containers + text.count(b"{") + text.count(b"["),
            self.num_commas + text.count(b","),
            self.num_exponents + text.translate(_LETTERS).count(b"0e"),
        )

    def fits(self, limit: "Size") -> bool:
        return all(mine <= most for mine, most in zip(self, limit, strict=True))


class NumbersDecoder(Generic[T]):
    """Decodes JSON that is numbers above all, and bounded by its bytes: as many as there are."""

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.json.Decoder(kind)
        self._patient = msgspec.json.Decoder(kind, float_hook=float)

    def decode(self, body: bytes, what: str = "The body") -> T:
        """Raises `InvalidRequest`, of `what`."""
        size = check_size(body, Size(MAX_CONTAINERS, sys.maxsize, MAX_PATIENT_EXPONENTS), what)
        is_slow = size.num_exponents > MAX_EXPONENTS
        return decode(self._patient if is_slow else self._decoder, body, what)


async def decode_and(
    decoder: "msgspec.json.Decoder[R]", body: bytes, work: Callable[[R], T]
) -> tuple[R, T]:
    """The request, and what `work` makes of it. Raises `InvalidRequest`."""

    def decoded() -> tuple[R, T]:
        check_size(body)
        request = decode(decoder, body)
        return request, work(request)

    return await convert(len(body), decoded)


def check_size(body: bytes, limit: Size | None = None, what: str = "The body") -> Size:
    """At most what `body` holds. Raises `InvalidRequest` for JSON of more values than a request
    has. What is no JSON may pass: it is decoded next."""
    limit = limit or Size(MAX_CONTAINERS, MAX_VALUES, MAX_EXPONENTS)
    # Nearly always there are not so many even with those that are letters of texts.
    size = Size()
    for start in range(0, len(body), WINDOW_BYTES):
        size = size.plus(body[start : start + WINDOW_BYTES])
        if not size.fits(limit):
            return _check_outside_texts(body, limit, what)
    return size


def _check_outside_texts(body: bytes, limit: Size, what: str) -> Size:
    # Without its escapes, every quote in a text begins or ends one, wherever a window ends.
    body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    size, is_in_text = Size(), False
    for start in range(0, len(body), WINDOW_BYTES):
        parts = body[start : start + WINDOW_BYTES].split(b'"')
        size = size.plus(b'"'.join(parts[is_in_text::2]))
        if not size.fits(limit):
            raise _too_many_values(limit, what)
        is_in_text ^= len(parts) % 2 == 0  # as many quotes as gaps between parts
    return size


def _too_many_values(limit: Size, what: str) -> InvalidRequest:
    values = "" if limit.num_commas == sys.maxsize else f"{limit.num_commas:,} values in all, "
    return InvalidRequest(
        f"{what} holds too many values: at most {limit.num_containers:,} objects and lists, "
        f"{values}and {limit.num_exponents:,} numbers with an exponent such as 1e5. Send fewer or "
        "shorter lists, or arrays as bytes where the API takes them.",
        code="too_many_values",
    )
