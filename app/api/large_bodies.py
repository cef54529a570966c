"""What JSON may hold: how many values, which is looked at before it is decoded, of large bodies in
a thread. Decoding takes time by the value, not by the byte, and while it runs nothing else does, in
a thread or not.
"""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from app.api.bodies import decode
from app.api.threads import convert
from app.core.errors import InvalidRequest

LONG_DIGITS = 40  # twice those of any float64 as it is written without an exponent


class Size(NamedTuple):
    """How many objects and lists, keys, commas and slow numbers JSON holds: those with an exponent
    or many digits may take the decoder 6 to 15 microseconds each."""

    num_containers: int = 0
    num_keys: int = 0
    num_commas: int = 0
    num_slow: int = 0

    def plus(self, text: bytes) -> "Size":
        digits = text.translate(_DIGITS)
        return Size(
            self.num_containers + text.count(b"{") + text.count(b"["),
            self.num_keys + text.count(b":"),
            self.num_commas + text.count(b","),
            self.num_slow + digits.count(b"0e") + digits.count(b"0" * LONG_DIGITS),
        )

    def fits(self, limit: "Size") -> bool:
        return all(mine <= most for mine, most in zip(self, limit, strict=True))


TEXTS = Size(num_containers=100_000, num_keys=300_000, num_commas=2_000_000, num_slow=1_000)
NUMBERS = Size(num_containers=500_000, num_keys=100_000, num_commas=8_000_000, num_slow=500_000)
WINDOW_BYTES = 256 * 1024  # looked at together, about a millisecond in which nobody else runs
_DIGITS = bytes.maketrans(b"123456789.E", b"0000000000e")  # so that 1.5E3 is 000e0

R = TypeVar("R")
T = TypeVar("T")


class NumbersDecoder(Generic[T]):
    """Decodes JSON that is numbers above all."""

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.json.Decoder(kind)
        self._patient = msgspec.json.Decoder(kind, float_hook=_read_float)

    def decode(self, body: bytes, what: str = "The body", size: Size | None = None) -> T:
        """`size` is what `check_size` found of this and what comes with it. Raises
        `InvalidRequest`, of `what`."""
        size = size or check_size(body, NUMBERS, what)
        is_slow = size.num_slow > TEXTS.num_slow
        return decode(self._patient if is_slow else self._decoder, body, what)


def _read_float(text: str) -> float:
    """In Python, so that others run between two numbers."""
    return float(text)


async def decode_and(
    decoder: "msgspec.json.Decoder[R]", body: bytes, work: Callable[[R], T]
) -> tuple[R, T]:
    """The request, and what `work` makes of it. Raises `InvalidRequest`."""

    def decoded() -> tuple[R, T]:
        check_size(body, TEXTS)
        request = decode(decoder, body)
        return request, work(request)

    return await convert(len(body), decoded)


def check_size(body: bytes, limit: Size = TEXTS, what: str = "The body") -> Size:
    """At most what `body` holds. Raises `InvalidRequest` for JSON of more values than a request
    has. What is no JSON may pass: it is decoded next."""
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
            raise InvalidRequest(
                f"{what} holds too many values: at most {limit.num_containers:,} objects and "
                f"lists, {limit.num_keys:,} keys, {limit.num_commas:,} values in all, and "
                f"{limit.num_slow:,} numbers with an exponent, such as 1e5, or {LONG_DIGITS} "
                "digits. Send fewer or shorter lists, or arrays as bytes where the API takes them.",
                code="too_many_values",
            )
        is_in_text ^= len(parts) % 2 == 0  # as many quotes as gaps between parts
    return size
