"""Checks the tensors of a request against a program's schema and turns them to and from wire form.

Owns the typed refusals a caller sees for wrong inputs. NaN and infinity are values like others.
"""

import math
from collections.abc import Sequence

import torch

from runtime.protocol import MAX_FRAME_BYTES, Schema, Tensor, TensorSpec, WireError

# What is left of a frame for everything around the tensors' data.
MAX_OUTPUT_BYTES = MAX_FRAME_BYTES - 1024 * 1024
# What the other axes of an input with an axis of 0 may come to: it has no data to bound them.
MAX_EMPTY_SIZE = 1024 * 1024


class PredictFailure(Exception):
    """A request that gets no outputs; `error` goes to its caller."""

    def __init__(
        self, code: str, message: str, *, param: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.error = WireError(type=kind, code=code, message=message, param=param, status=status)


def decode_inputs(tensors: Sequence[Tensor], schema: Schema) -> list[torch.Tensor]:
    """Torch tensors in the schema's order. Raises `PredictFailure` naming the wrong input."""
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
    inputs = [decode(by_name[name]) for name in names]
    if schema.is_batched:
        _check_rows(inputs, names)
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


def decode(tensor: Tensor) -> torch.Tensor:
    """A tensor that owns its memory. The wire form has been checked."""
    dtype = torch_dtype(tensor.dtype)
    if not tensor.data:
        return torch.empty(tensor.shape, dtype=dtype)
    data = bytearray(tensor.data)  # torch wants writable memory
    if dtype is torch.bool:  # any byte but 0 is true; torch itself only bears 0 and 1
        return torch.frombuffer(data, dtype=torch.uint8).reshape(tensor.shape).ne(0)
    return torch.frombuffer(data, dtype=dtype).reshape(tensor.shape)


def encode_outputs(outputs: Sequence[torch.Tensor], schema: Schema) -> list[Tensor]:
    """Wire form of a program's outputs, which are on the CPU in the schema's order and dtypes.
    Raises `PredictFailure` when they would not fit a frame."""
    total_bytes = sum(output.nbytes for output in outputs)
    if total_bytes > MAX_OUTPUT_BYTES:
        raise PredictFailure(
            "output_too_large",
            f"The outputs take {total_bytes:,} bytes; at most {MAX_OUTPUT_BYTES:,} fit an answer. "
            "Send fewer rows per request.",
            status=413,
        )
    return [
        Tensor(
            name=spec.name,
            dtype=spec.dtype,
            shape=list(output.shape),
            data=output.contiguous().numpy().tobytes(),
        )
        for spec, output in zip(schema.outputs, outputs, strict=True)
    ]


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


def _check_rows(inputs: Sequence[torch.Tensor], names: Sequence[str]) -> None:
    rows = inputs[0].shape[0]
    for tensor, name in zip(inputs, names, strict=True):
        if tensor.shape[0] != rows:
            raise _wrong(
                name,
                "wrong_shape",
                f"has {tensor.shape[0]} rows but {names[0]!r} has {rows}; all inputs need as many",
            )


def _wrong(name: str, code: str, what: str) -> PredictFailure:
    return PredictFailure(code, f"Input {name[:80]!r} {what}.", param=f"inputs.{name[:80]}")


def _wrong_shape(tensor: Tensor, spec: TensorSpec, what: str) -> PredictFailure:
    return _wrong(spec.name, "wrong_shape", f"has shape {tensor.shape[:16]}; {what}")
