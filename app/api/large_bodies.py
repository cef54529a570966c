"""Large JSON for the APIs of texts: how many values it may hold, which is looked at in a thread
before it is decoded there. Decoding takes time by the value, not by the byte, and while it runs
nothing else does, in a thread or not.
"""

import re
from collections.abc import Callable
from typing import TypeVar

import msgspec

from app.api.bodies import decode
from app.api.threads import LARGE_BODY_BYTES, convert
from app.core.errors import InvalidRequest

MAX_CONTAINERS = 100_000  # objects and lists
MAX_VALUES = 2_000_000
# A piece of a text in JSON: so many letters at a time hold up nobody.
_TEXT = re.compile(rb'(?:[^"\\]++|\\.){0,10000}+', re.DOTALL)

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
    if _is_small(_num_containers(body, 0, len(body)), body.count(b",")):
        return
    num_containers = num_commas = at = 0
    while at < len(body):
        quote = body.find(b'"', at)
        end = len(body) if quote < 0 else quote
        num_containers += _num_containers(body, at, end)
        num_commas += body.count(b",", at, end)
        if not _is_small(num_containers, num_commas):
            raise InvalidRequest(
                f"The body holds too many values: at most {MAX_CONTAINERS:,} objects and lists, "
                f"and {MAX_VALUES:,} values in all. Send fewer or shorter lists.",
                code="too_many_values",
            )
        at = _end_of_text(body, end + 1)


def _is_small(num_containers: int, num_commas: int) -> bool:
    return num_containers <= MAX_CONTAINERS and num_commas <= MAX_VALUES


def _num_containers(body: bytes, start: int, end: int) -> int:
    return body.count(b"{", start, end) + body.count(b"[", start, end)


def _end_of_text(body: bytes, at: int) -> int:
    """Behind the quote that ends the text which `at` is in."""
    while found := _TEXT.match(body, at):
        if found.end() == at:
            break
        at = found.end()
    return at + 1
