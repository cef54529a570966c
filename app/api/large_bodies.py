"""Large JSON for the APIs of texts: how many values it may hold, which is looked at in a thread
before it is decoded there. Decoding takes time by the value, not by the byte, and while it runs
nothing else does, in a thread or not.
"""

from collections.abc import Callable
from typing import TypeVar

import msgspec

from app.api.bodies import decode
from app.api.threads import LARGE_BODY_BYTES, convert
from app.core.errors import InvalidRequest

MAX_CONTAINERS = 100_000  # objects and lists
MAX_VALUES = 2_000_000
WINDOW_BYTES = 256 * 1024  # looked at together, about a millisecond in which nobody else runs

R = TypeVar("R")
T = TypeVar("T")


async def decode_and(
    decoder: "msgspec.json.Decoder[R]", body: bytes, work: Callable[[R], T]
) -> tuple[R, T]:
    """The request, and what `work` makes of it. Raises `InvalidRequest`."""

    def decoded() -> tuple[R, T]:
        if len(body) > LARGE_BODY_BYTES:
            check_size(body)
        request = decode(decoder, body)
        return request, work(request)

    return await convert(len(body), decoded)


def check_size(body: bytes) -> None:
    """Raises `InvalidRequest` for JSON of more values than a request has. What is no JSON may pass:
    it is decoded next."""
    # Nearly always there are not so many even with those that are letters of texts.
    if _is_small(_num_containers(body), body.count(b",")):
        return
    # Without its escapes, every quote in a text begins or ends one, wherever a window ends.
    body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    num_containers, num_commas, is_in_text = 0, 0, False
    for start in range(0, len(body), WINDOW_BYTES):
        parts = body[start : start + WINDOW_BYTES].split(b'"')
        outside = b"".join(parts[is_in_text::2])
        num_containers += _num_containers(outside)
        num_commas += outside.count(b",")
        if not _is_small(num_containers, num_commas):
            raise InvalidRequest(
                f"The body holds too many values: at most {MAX_CONTAINERS:,} objects and lists, "
                f"and {MAX_VALUES:,} values in all. Send fewer or shorter lists.",
                code="too_many_values",
            )
        is_in_text ^= len(parts) % 2 == 0  # as many quotes as gaps between parts


def _is_small(num_containers: int, num_commas: int) -> bool:
    return num_containers <= MAX_CONTAINERS and num_commas <= MAX_VALUES


def _num_containers(text: bytes) -> int:
    return text.count(b"{") + text.count(b"[")
