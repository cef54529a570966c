"""How messages are framed: a 4-byte little-endian length and that many bytes of msgpack.

Either side closes the stream on a frame that is too long or does not match its schema: a worker
runs someone else's model, so nothing it sends is trusted to be well formed.
"""

import struct

import msgspec

MAX_FRAME_BYTES = 64 * 1024 * 1024
LENGTH = struct.Struct("<I")


class Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A value inside a message."""


class Message(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag=str.lower,
):
    """One frame. Its `type` is the class name in lower case."""


class WireError(Wire, frozen=True):
    """A failure a caller can be told about. `status` is the HTTP status it becomes."""

    type: str
    message: str
    code: str
    param: str | None = None
    status: int = 400
    retry_after_seconds: float | None = None  # with 429 and 503, when trying again may help


_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: Message) -> bytes:
    """Raises `ValueError` when the message would not fit a frame."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"message of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return LENGTH.pack(len(body)) + body


class FrameError(Exception):
    """The peer sent something that is not a valid frame; the stream is unusable."""


def check_frame_length(prefix: bytes) -> int:
    """The body length that a 4-byte prefix announces. Raises `FrameError` when out of bounds."""
    (length,) = LENGTH.unpack(prefix)
    if not 0 < length <= MAX_FRAME_BYTES:
        raise FrameError(f"frame of {length} bytes; at most {MAX_FRAME_BYTES}")
    return length
