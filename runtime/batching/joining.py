"""Joins rows of several requests into one run's tensors, and parts its outputs again.

Rows stay in wire form until then, so that a request costs no tensor operation of its own. Where
the proof found padding harmless, shorter rows are padded and their outputs cut back.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from runtime.batching.tensors import check_output_bytes, torch_dtype
from runtime.protocol import Schema, Tensor, TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]


class Rows(msgspec.Struct, frozen=True):
    """Rows `start` to `stop` of a request's inputs, in the schema's order; `length` is theirs
    along the padded axes."""

    inputs: Sequence[Tensor]
    start: int
    stop: int
    length: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


def run_group(inputs: Sequence[Tensor], schema: Schema) -> tuple[Hashable, int]:
    """What is equal between checked inputs that may share a run, and their length along the
    padded axes, in which they may differ. Unbatched programs have a run for each request."""
    if not schema.is_batched:
        return object(), 0
    shapes = []
    length = 0
    longest = math.inf
    for tensor, spec in zip(inputs, schema.inputs, strict=True):
        shape = tensor.shape[1:]
        if spec.padded_axis is not None:
            length = shape[spec.padded_axis - 1]
            shape[spec.padded_axis - 1] = 0
            longest = min(longest, math.inf if spec.longest_padded is None else spec.longest_padded)
        shapes.append(tuple(shape))
    if length > longest or (
        length and any(_has_empty_row(*pair) for pair in zip(inputs, schema.inputs, strict=True))
    ):
        # Longer than padding was proved at; or a row whose mask hides all of it: what a model
        # answers then may depend on its length.
        shapes.append((length,))
    return tuple(shapes), length


def _has_empty_row(tensor: Tensor, spec: TensorSpec) -> bool:
    """Whether a row of a padded input holds zeros alone."""
    if spec.padded_axis is None:
        return False
    values = np.frombuffer(tensor.data, spec.dtype).reshape(tensor.shape[0], -1)
    return not values.any(axis=1).all()


def row_size(inputs: Sequence[Tensor], schema: Schema) -> int:
    """The values of a row, at least one."""
    if not schema.is_batched:
        return 1
    return max(1, sum(math.prod(tensor.shape[1:]) for tensor in inputs))


def join(parts: Sequence[Rows], schema: Schema) -> list[torch.Tensor]:
    """The inputs of a run, which own their memory."""
    longest = max(part.length for part in parts)
    return [
        _join_input([part.inputs[at] for part in parts], parts, spec, longest, schema.is_batched)
        for at, spec in enumerate(schema.inputs)
    ]


def _join_input(
    tensors: list[Tensor], parts: Sequence[Rows], spec: TensorSpec, longest: int, is_batched: bool
) -> torch.Tensor:
    if not is_batched:
        return _tensor(bytearray(tensors[0].data), tensors[0].shape, spec.dtype)
    if spec.padded_axis is not None and any(part.length != longest for part in parts):
        return _pad_input(tensors, parts, spec, longest)
    row_shape = tensors[0].shape[1:]
    pieces = [_rows_of(tensor, part) for tensor, part in zip(tensors, parts, strict=True)]
    num_rows = sum(part.num_rows for part in parts)
    return _tensor(bytearray().join(pieces), [num_rows, *row_shape], spec.dtype)


def _rows_of(tensor: Tensor, part: Rows) -> bytes | memoryview:
    if part.num_rows == tensor.shape[0]:
        return tensor.data
    row_bytes = len(tensor.data) // tensor.shape[0]
    return memoryview(tensor.data)[part.start * row_bytes : part.stop * row_bytes]


def _pad_input(
    tensors: list[Tensor], parts: Sequence[Rows], spec: TensorSpec, longest: int
) -> torch.Tensor:
    axis = spec.padded_axis
    assert axis is not None, "the input is padded"
    shape = [sum(part.num_rows for part in parts), *tensors[0].shape[1:]]
    shape[axis] = longest
    joined = np.full(shape, spec.pad_value, spec.dtype)
    at = 0
    for tensor, part in zip(tensors, parts, strict=True):
        rows = np.frombuffer(_rows_of(tensor, part), spec.dtype)
        rows = rows.reshape(part.num_rows, *tensor.shape[1:])
        _cut(joined[at : at + part.num_rows], axis, part.length)[...] = rows
        at += part.num_rows
    if spec.dtype == "bool":
        return torch.from_numpy(joined.view(np.uint8)).ne(0)
    return torch.from_numpy(joined)


def _tensor(data: bytearray, shape: Sequence[int], name: str) -> torch.Tensor:
    dtype = torch_dtype(name)
    if not data:
        return torch.empty(list(shape), dtype=dtype)
    if dtype is torch.bool:  # any byte but 0 is true; torch itself only bears 0 and 1
        return torch.frombuffer(data, dtype=torch.uint8).reshape(list(shape)).ne(0)
    return torch.frombuffer(data, dtype=dtype).reshape(list(shape))


# --- outputs ----------------------------------------------------------------------------


def check_outputs(outputs: Sequence[torch.Tensor], num_rows: int, schema: Schema) -> list[Array]:
    """A run's outputs as arrays. Raises `RuntimeError` unless each has a row per row."""
    if len(outputs) != len(schema.outputs):
        raise RuntimeError(f"the program returned {len(outputs)} outputs")
    if schema.is_batched and any(not each.dim() or each.shape[0] != num_rows for each in outputs):
        raise RuntimeError(f"the program returned other than {num_rows} rows for {num_rows}")
    return [output.numpy(force=True) for output in outputs]


def part_outputs(outputs: Sequence[Array], start: int, part: Rows, schema: Schema) -> list[Array]:
    """Those of `part`, whose rows begin at `start` of the run, without their padding."""
    if not schema.is_batched:
        return list(outputs)
    return [
        _cut(output[start : start + part.num_rows], spec.padded_axis, part.length)
        for output, spec in zip(outputs, schema.outputs, strict=True)
    ]


def _cut(rows: Array, axis: int | None, length: int) -> Array:
    if axis is None or rows.shape[axis] == length:
        return rows
    return rows[(slice(None),) * axis + (slice(0, length),)]


def encode(parts: Sequence[Sequence[Array]], schema: Schema) -> list[Tensor]:
    """A request's outputs in wire form, from those of each run that it had rows in, in order.
    Raises `PredictFailure` where they would not fit a frame, and `RuntimeError` where runs
    disagree on a shape."""
    check_output_bytes(sum(rows.nbytes for part in parts for rows in part))
    tensors = []
    for at, spec in enumerate(schema.outputs):
        pieces = [part[at] for part in parts]
        shape = list(pieces[0].shape)
        data = pieces[0].tobytes()
        if len(pieces) > 1:
            if any(piece.shape[1:] != pieces[0].shape[1:] for piece in pieces):
                raise RuntimeError("the shape of an output depends on more than its row")
            shape[0] = sum(piece.shape[0] for piece in pieces)
            data = b"".join([piece.tobytes() for piece in pieces])
        tensors.append(Tensor(name=spec.name, dtype=spec.dtype, shape=shape, data=data))
    return tensors
