"""What is said between an optimisation and the processes that hold its forms.

Length-prefixed msgpack over a socket pair: one question at a time, one answer to each. Batches
are larger than the frames of the control plane, so this has a limit of its own.
"""

import socket
import struct
from collections.abc import Sequence
from typing import TypeVar

import msgspec
import torch

from runtime.protocol import Manifest, Schema, Tensor

LENGTH = struct.Struct("<Q")
MAX_BYTES = 4 * 1024**3

M = TypeVar("M")


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    pass


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Which form of which program, and where its files are or go."""

    artifact_dir: str
    manifest: Manifest
    form: str
    directory: str
    device: str
    num_threads: int


class Make(_Message, frozen=True):
    """Make the form; answered by `Done`. `calibration` are inputs the program takes."""

    place: Place
    max_rows: int
    calibration: list[list[Tensor]]


class Load(_Message, frozen=True):
    """Load the form as a worker would; answered by `Done`."""

    place: Place


class Answer(_Message, frozen=True):
    """Run once; answered by `Answered`."""

    inputs: list[Tensor]


class Hold(_Message, frozen=True):
    """Keep these inputs for timing, under their number of rows, and run them once; answered by
    `Times` of a second run."""

    rows: int
    inputs: list[Tensor]


class Turn(_Message, frozen=True):
    """Run what is held for as long as `seconds`, once at least; answered by `Times`."""

    rows: int
    seconds: float


Question = Make | Load | Answer | Hold | Turn


class Done(_Message, frozen=True):
    """`peak_bytes` is the most memory that the process has held so far."""

    peak_bytes: int


class Answered(_Message, frozen=True):
    outputs: list[Tensor]
    peak_bytes: int


class Times(_Message, frozen=True):
    """Milliseconds of each timed run."""

    runs_ms: list[float]
    peak_bytes: int


class Refused(_Message, frozen=True):
    """The question could not be answered; the process goes on. `reason` is one plain sentence."""

    reason: str


Reply = Done | Answered | Times | Refused

_questions = msgspec.msgpack.Decoder(Question)
_replies = msgspec.msgpack.Decoder(Reply)
_encoder = msgspec.msgpack.Encoder()


class Garbled(Exception):
    """What came is no message."""


def encode(message: Question | Reply) -> bytes:
    """With its length in front."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


def read_question(connection: socket.socket) -> Question | None:
    """The next question; None at the end of the stream. Raises `Garbled`."""
    prefix = _exactly(connection, LENGTH.size)
    body = None if prefix is None else _exactly(connection, body_bytes(prefix))
    return None if body is None else _decode(_questions, body)


def decode_reply(body: bytes | bytearray) -> Reply:
    """Raises `Garbled`."""
    return _decode(_replies, body)


def body_bytes(prefix: bytes | bytearray) -> int:
    """The length that a prefix announces. Raises `Garbled`."""
    (length,) = LENGTH.unpack(prefix)
    if length > MAX_BYTES:
        raise Garbled(f"a message of {length:,} bytes")
    return length


def to_wire(tensors: Sequence[torch.Tensor]) -> list[Tensor]:
    """Tensors without names; their order is the schema's."""
    return [
        Tensor(
            name="",
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            data=tensor.contiguous().numpy().tobytes(),
        )
        for tensor in tensors
    ]


def from_wire(tensors: Sequence[Tensor]) -> list[torch.Tensor]:
    """Of a peer that is trusted: the judge's inputs, seen from its contender."""
    return [_tensor(each) for each in tensors]


def outputs_from_wire(tensors: Sequence[Tensor], schema: Schema) -> list[torch.Tensor]:
    """Of a peer that is not: raises `Garbled` unless number, dtypes and lengths are right."""
    if [tensor.dtype for tensor in tensors] != [spec.dtype for spec in schema.outputs]:
        raise Garbled("outputs of other dtypes or of another number than the program's")
    for tensor in tensors:
        num_bytes = getattr(torch, tensor.dtype).itemsize
        for size in tensor.shape:
            num_bytes *= size
        if len(tensor.data) != num_bytes or any(size < 0 for size in tensor.shape):
            raise Garbled("an output whose data do not fit its shape")
    return [_tensor(each) for each in tensors]


def _tensor(wire: Tensor) -> torch.Tensor:
    dtype = getattr(torch, wire.dtype)
    if not wire.data:
        return torch.empty(wire.shape, dtype=dtype)
    data = bytearray(wire.data)  # torch wants writable memory
    return torch.frombuffer(data, dtype=dtype).reshape(wire.shape)


def _decode(decoder: msgspec.msgpack.Decoder[M], body: bytes | bytearray) -> M:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Garbled(f"no message: {error}") from error


def _exactly(connection: socket.socket, num_bytes: int) -> bytearray | None:
    data = bytearray(num_bytes)
    view = memoryview(data)
    at = 0
    while at < num_bytes:
        count = connection.recv_into(view[at:])
        if not count:
            return None
        at += count
    return data
