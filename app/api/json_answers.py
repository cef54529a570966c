"""Arrays in answers as JSON: how many numbers one may hold, and writing them.

JSON takes many times the room of the numbers themselves while it is made. Owns the bound, which
is looked at before a model runs where its schema tells enough, and the threads that write.
"""

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np

from app.api.predict_bodies import Given
from app.api.threads import LARGE_BODY_BYTES
from app.core.errors import TooLarge
from runtime.protocol import Schema

MAX_JSON_VALUES = 4_000_000  # some 80 MB of JSON
CHUNK_VALUES = 32_768  # turned into JSON at once, some milliseconds in which nobody else runs
NUM_WRITERS = 2  # large answers that are made at once; others wait

Array = np.ndarray[Any, np.dtype[Any]]

_encoder = msgspec.json.Encoder()
_writers = ThreadPoolExecutor(NUM_WRITERS, thread_name_prefix="answers")


async def written(size_bytes: int, write: Callable[[], bytes]) -> bytes:
    """What `write` makes; large answers in a thread, few of them at once."""
    if size_bytes <= LARGE_BODY_BYTES:
        return write()
    return await asyncio.get_running_loop().run_in_executor(_writers, write)


def json_of(array: Array) -> msgspec.Raw:
    """Nested lists, for an encoder to take over as they are."""
    return msgspec.Raw(_nested(array))


def _nested(array: Array) -> bytes:
    if array.ndim == 0 or num_values(array.shape) <= CHUNK_VALUES:
        return _encoder.encode(array.tolist())
    row_values = num_values(array.shape[1:])
    if row_values > CHUNK_VALUES:
        parts = [_nested(row) for row in array]
    else:
        step = CHUNK_VALUES // row_values
        starts = range(0, len(array), step)
        parts = [_encoder.encode(array[at : at + step].tolist())[1:-1] for at in starts]
    return b"[%b]" % b",".join(parts)


def num_values(shape: Sequence[int]) -> int:
    """Numbers in nested lists of a shape; empty lists count as one each."""
    return math.prod(max(1, size) for size in shape)


def check_json_values(num_values: int) -> None:
    """Raises `TooLarge`."""
    if num_values > MAX_JSON_VALUES:
        raise TooLarge(
            f"The answer has {num_values:,} numbers, and JSON holds {MAX_JSON_VALUES:,} at most "
            "here. Ask for arrays (Accept: application/x-npz or application/x-npy; binary outputs "
            "in the Open Inference Protocol), or send fewer rows.",
            code="answer_too_large",
        )


def least_shapes(schema: Schema, given: Given) -> list[list[int]]:
    """The outputs' shapes as far as they are known before the run; each axis that is not has its
    least size."""
    num_rows, length = 1, 0
    if given.texts is not None:
        num_rows = len(given.texts)
    elif given.inputs:
        num_rows = given.inputs[0].shape[0] if schema.is_batched else 1
        lengths = [
            tensor.shape[spec.padded_axis]
            for tensor, spec in zip(given.inputs, schema.inputs, strict=True)
            if spec.padded_axis is not None
        ]
        length = max(lengths, default=0)
    rows = num_rows if schema.is_batched else None
    return [spec.least_shape(rows, length) for spec in schema.outputs]


def check_json_shapes(shapes: Iterable[Sequence[int]]) -> None:
    """Raises `TooLarge` where arrays of these shapes are too many numbers together."""
    check_json_values(sum(map(num_values, shapes)))
