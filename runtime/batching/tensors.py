"""Checks the tensors of a request, in wire form, against a program's schema.

Owns the typed refusals a caller sees for wrong inputs. NaN and infinity are values like others.
"""

import math
from collections.abc import Sequence

import numpy
import torch

from runtime.protocol import MAX_FRAME_BYTES, Schema, Tensor, TensorSpec, WireError

# What is left of a frame for everything around the tensors' data.
MAX_OUTPUT_BYTES = MAX_FRAME_BYTES - 1024 * 1024
# What the other axes of an input with an axis of 0 may come to: it has no data to bound them.
MAX_EMPTY_SIZE = 1024 * 1024


class PredictFailure(Exception):
    """A request that gets no outputs; `error` goes to its caller. `device_ns` is its share of the
    runs that it was part of nevertheless."""

    device_ns = 0

    def __init__(
        self, code: str, message: str, *, param: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.error = WireError(type=kind, code=code, message=message, param=param, status=status)


class InputChecker:
    """Checks requests to one program. Most have the same shapes but for their rows: what these
    are is worked out once."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._names = [spec.name for spec in schema.inputs]
        # Of inputs with no dynamic axis but the batch: dtype, shape and bytes of one row.
        self._plain = [_plain_row(spec) for spec in schema.inputs] if schema.is_batched else []
        self._is_plain = bool(self._plain) and None not in self._plain
        self._limited = [
            (index, spec) for index, spec in enumerate(schema.inputs) if _is_limited(spec)
        ]

    def check(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors in the schema's order. Raises `PredictFailure` naming the wrong input."""
        is_right = self._is_plain and self._are_plain(tensors)
        checked = list(tensors) if is_right else check_inputs(tensors, self._schema)
        for index, spec in self._limited:
            _check_values(checked[index], spec)
        return checked

    def _are_plain(self, tensors: Sequence[Tensor]) -> bool:
        """False: not in the schema's order, or something is wrong."""
        if [tensor.name for tensor in tensors] != self._names:
            return False
        rows = tensors[0].shape[0] if tensors[0].shape else 0
        if rows < 1:
            return False
        for tensor, plain in zip(tensors, self._plain, strict=True):
            assert plain is not None, "all are plain"
            dtype, row_shape, row_bytes = plain
            shape = tensor.shape
            if tensor.dtype != dtype or shape[0:1] != [rows] or shape[1:] != row_shape:
                return False
            if len(tensor.data) != rows * row_bytes:
                return False
        return True


def _plain_row(spec: TensorSpec) -> tuple[str, list[int], int] | None:
    row_shape = [size for size in spec.shape[1:] if size is not None]
    if len(row_shape) != len(spec.shape) - 1 or 0 in row_shape:
        return None
    return spec.dtype, row_shape, math.prod(row_shape) * torch_dtype(spec.dtype).itemsize


def check_inputs(tensors: Sequence[Tensor], schema: Schema) -> list[Tensor]:
    """The tensors in the schema's order. Raises `PredictFailure` naming the wrong input."""
    by_name: dict[str, Tensor] = {}
    for tensor in tensors:
        if tensor.name in by_name:
            raise _wrong(tensor.name, "duplicate_input", "is given twice")
        by_name[tensor.name] = tensor
    names = [spec.name for spec in schema.inputs]
    if unknown := sorted(by_name.keys() - set(names)):
        expected = ", ".join(map(repr, names))
        raise _wrong(
            unknown[0], "unknown_input", f"is not an input of this model; it takes {expected}"
        )
    for spec in schema.inputs:
        if spec.name not in by_name:
            raise _wrong(
                spec.name, "missing_input", f"is missing: {spec.dtype} of shape {show_shape(spec)}"
            )
        check_input(by_name[spec.name], spec, is_batched=schema.is_batched)
    inputs = [by_name[name] for name in names]
    if schema.is_batched:
        _check_rows(inputs, names)
        _check_lengths(inputs, schema)
    return inputs


def check_input(tensor: Tensor, spec: TensorSpec, *, is_batched: bool) -> None:
    """Raises `PredictFailure` unless dtype, shape and length are what `spec` asks for. A batch
    may exceed its axis' greatest size, since it can run in pieces."""
    if tensor.dtype != spec.dtype:
        raise _wrong(
            spec.name, "wrong_dtype", f"has dtype {tensor.dtype[:32]}; it must be {spec.dtype}"
        )
    if len(tensor.shape) != len(spec.shape):
        raise _wrong_shape(tensor, spec, f"it must have {len(spec.shape)} axes: {show_shape(spec)}")
    lower = spec.min_shape or [size or 0 for size in spec.shape]
    upper = spec.max_shape or spec.shape
    for axis, size in enumerate(tensor.shape):
        least, most = lower[axis], upper[axis]
        if axis == 0 and is_batched:
            least, most = 1, None
        if size < least or (most is not None and size > most):
            wanted = f"at least {least}" if most is None else f"{least} to {most}"
            wanted = str(least) if least == most else wanted
            raise _wrong_shape(
                tensor, spec, f"axis {axis} must be {wanted} (the model takes {show_shape(spec)})"
            )
    if 0 in tensor.shape and math.prod(size or 1 for size in tensor.shape) > MAX_EMPTY_SIZE:
        raise _wrong_shape(
            tensor, spec, f"with an axis of 0, the others may come to {MAX_EMPTY_SIZE:,} at most"
        )
    num_bytes = math.prod(tensor.shape) * torch_dtype(spec.dtype).itemsize
    if len(tensor.data) != num_bytes:
        raise _wrong(
            spec.name,
            "wrong_length",
            f"has {len(tensor.data):,} bytes of data; its shape and dtype need {num_bytes:,}",
        )


def check_output_bytes(total_bytes: int) -> None:
    """Raises `PredictFailure` when outputs would not fit a frame."""
    if total_bytes > MAX_OUTPUT_BYTES:
        raise PredictFailure(
            "output_too_large",
            f"The outputs take {total_bytes:,} bytes; at most {MAX_OUTPUT_BYTES:,} fit an answer. "
            "Send fewer rows per request.",
            status=413,
        )


def least_output_bytes(schema: Schema, num_rows: int, length: int) -> int:
    """Of the outputs for so many rows of `length` along the padded axes, as far as the schema
    tells."""
    rows = num_rows if schema.is_batched else None
    return sum(
        math.prod(spec.least_shape(rows, length)) * torch_dtype(spec.dtype).itemsize
        for spec in schema.outputs
    )


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that numpy calls `name`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), "numpy and torch share the names of wire dtypes"
    return dtype


def show_shape(spec: TensorSpec) -> str:
    """`[n, 1, 8, 8]`, with letters for dynamic axes."""
    letters = iter("nmkpqrstuvwxyz")
    sizes = [str(size) if size is not None else next(letters, "?") for size in spec.shape]
    return f"[{', '.join(sizes)}]"


def _check_rows(inputs: Sequence[Tensor], names: Sequence[str]) -> None:
    rows = inputs[0].shape[0]
    for tensor, name in zip(inputs, names, strict=True):
        if tensor.shape[0] != rows:
            raise _wrong(
                name,
                "wrong_shape",
                f"has {tensor.shape[0]} rows but {names[0]!r} has {rows}; all inputs need as many",
            )


def _is_limited(spec: TensorSpec) -> bool:
    """Whether values beyond the known range are errors: integers choose rows of a table, and one
    that is not there may end a GPU's process."""
    has_range = spec.minimum is not None and spec.maximum is not None
    return has_range and "int" in spec.dtype


def _check_values(tensor: Tensor, spec: TensorSpec) -> None:
    assert spec.minimum is not None, "only inputs with a range are looked at"
    assert spec.maximum is not None, "only inputs with a range are looked at"
    values = numpy.frombuffer(tensor.data, spec.dtype)
    if not values.size:
        return
    least, most = int(values.min()), int(values.max())
    if least < spec.minimum or most > spec.maximum:
        raise _wrong(
            spec.name,
            "out_of_range",
            f"has the value {least if least < spec.minimum else most:,}; the model takes "
            f"{int(spec.minimum):,} to {int(spec.maximum):,}",
        )


def _check_lengths(inputs: Sequence[Tensor], schema: Schema) -> None:
    """Inputs that are padded together have one length."""
    padded = [
        (tensor, spec, spec.padded_axis)
        for tensor, spec in zip(inputs, schema.inputs, strict=True)
        if spec.padded_axis is not None
    ]
    for tensor, spec, axis in padded[1:]:
        first, first_spec, first_axis = padded[0]
        if tensor.shape[axis] != first.shape[first_axis]:
            raise _wrong_shape(
                tensor,
                spec,
                f"axis {axis} must be {first.shape[first_axis]}, as it is of {first_spec.name!r}",
            )


def _wrong(name: str, code: str, what: str) -> PredictFailure:
    return PredictFailure(code, f"Input {name[:80]!r} {what}.", param=f"inputs.{name[:80]}")


def _wrong_shape(tensor: Tensor, spec: TensorSpec, what: str) -> PredictFailure:
    return _wrong(spec.name, "wrong_shape", f"has shape {tensor.shape[:16]}; {what}")
