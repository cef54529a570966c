"""Lists and arrays to tensors of a schema, and back.

Owns the errors that name what is wrong with an input. bfloat16, which numpy lacks, travels as
its 16 bits and is shown as the float it stands for. Files of arrays are `npy.py`'s.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import numpy as np

from app.core.errors import InvalidRequest
from runtime.protocol import Schema, Tensor, TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]
NUMBERS_ONLY = "must hold numbers only (no text, null or nested objects)"
MAX_SHOWN_CHARS = 200  # of a shape that somebody sent
_NUMBERS = frozenset({bool, int, float})


def tensors_of(inputs: Any, schema: Schema) -> list[Tensor]:
    """`inputs` is an object with a nested list per input, or just the list where there is one
    input. Raises `InvalidRequest` naming the input."""
    specs = schema.inputs
    if not isinstance(inputs, dict):
        if len(specs) != 1:
            raise InvalidRequest(f"inputs must be an object with: {_names(specs)}.", param="inputs")
        inputs = {specs[0].name: inputs}
    named = cast("dict[str, Any]", inputs)
    return _tensors(named, schema, array_of_lists)


def tensors_of_arrays(arrays: Mapping[str, Array], schema: Schema) -> list[Tensor]:
    """As `tensors_of`, of arrays by the inputs' names."""
    return _tensors(arrays, schema, lambda array, _: array)


def tensors_of_values(values: Mapping[str, Any], schema: Schema) -> list[Tensor]:
    """As `tensors_of`, of arrays and lists by the inputs' names."""

    def read(value: Any, spec: TensorSpec) -> Array:
        return cast(Array, value) if isinstance(value, np.ndarray) else array_of_lists(value, spec)

    return _tensors(values, schema, read)


def tensors_of_array(array: Array, schema: Schema) -> list[Tensor]:
    """The one input of a model."""
    spec = only_input(schema, "one array")
    return [tensor_of(cast_to(array, spec), spec, schema)]


def tensors_of_bytes(body: bytes, schema: Schema) -> list[Tensor]:
    """The one input of a model from its values' bytes, little-endian in C order. Their number
    tells the size of one dynamic axis."""
    spec = only_input(schema, "the bytes of one array")
    dynamic = [axis for axis, size in enumerate(spec.shape) if size is None]
    if len(dynamic) > 1:
        raise _wrong(spec, "has several dynamic axes, whose sizes bytes do not tell; send an npy")
    item_bytes = wire_dtype(spec).itemsize * math.prod(size or 1 for size in spec.shape)
    num_items, rest = divmod(len(body), item_bytes) if item_bytes else (0, len(body))
    if rest or (not dynamic and num_items != 1):
        multiple = "a multiple of " if dynamic else ""
        raise _wrong(spec, f"takes {multiple}{item_bytes:,} bytes, but {len(body):,} were sent")
    shape = [num_items if size is None else size for size in spec.shape]
    check_shape(shape, spec, schema)
    return [Tensor(name=spec.name, dtype=spec.dtype, shape=shape, data=body)]


def only_input(schema: Schema, what: str) -> TensorSpec:
    """Raises `InvalidRequest` for a model of several inputs."""
    if len(schema.inputs) != 1:
        raise InvalidRequest(
            f"The body holds {what}, but this model takes: {_names(schema.inputs)}. "
            "Send JSON, or an npz file with an array for each.",
            param="inputs",
        )
    return schema.inputs[0]


def _tensors(
    named: Mapping[str, Any], schema: Schema, read: Callable[[Any, TensorSpec], Array]
) -> list[Tensor]:
    check_names(named, schema)
    tensors: list[Tensor] = []
    for spec in schema.inputs:
        if spec.name not in named:
            raise _wrong(spec, "is required")
        array = cast_to(read(named[spec.name], spec), spec)
        tensors.append(tensor_of(array, spec, schema))
    return check_rows(tensors, schema)


def check_names(named: Iterable[str], schema: Schema) -> None:
    """Raises `InvalidRequest` for what is no input of the model."""
    specs = schema.inputs
    known = {spec.name for spec in specs}
    for name in named:
        if name not in known:
            raise InvalidRequest(
                f"inputs.{name[:80]} is not an input of this model, which takes: {_names(specs)}.",
                param=f"inputs.{name[:80]}",
            )


def wire_dtype(spec: TensorSpec) -> np.dtype[Any]:
    """Of an input's bytes; bfloat16 is 16 bits."""
    if spec.dtype == "bfloat16":
        return np.dtype("<u2")
    return np.dtype(spec.dtype).newbyteorder("<")


def tensor_of(array: Array, spec: TensorSpec, schema: Schema) -> Tensor:
    """Checks the shape against the schema's."""
    shape = list(array.shape)
    check_shape(shape, spec, schema)
    return Tensor(name=spec.name, dtype=spec.dtype, shape=shape, data=array.tobytes())


def check_shape(shape: list[int], spec: TensorSpec, schema: Schema) -> None:
    """Raises `InvalidRequest` unless the input takes this shape."""
    shown = shown_shape(shape)
    wanted = "[" + ", ".join("any" if axis is None else str(axis) for axis in spec.shape) + "]"
    if len(shape) != len(spec.shape):
        is_row = schema.is_batched and len(shape) == len(spec.shape) - 1
        hint = "; put one more list around it, for a batch of one" if is_row else ""
        raise _wrong(spec, f"has shape {shown}, but the model takes {wanted}{hint}")
    for axis, (size, fixed) in enumerate(zip(shape, spec.shape, strict=True)):
        if fixed is not None and size != fixed:
            raise _wrong(spec, f"has shape {shown}, but the model takes {wanted}")
        least = spec.min_shape[axis] if spec.min_shape else 1
        most = spec.max_shape[axis] if spec.max_shape else None
        if size < least:
            raise _wrong(spec, f"has {size} at axis {axis}, but the model takes at least {least}")
        if most is not None and size > most:
            raise _wrong(spec, f"has {size} at axis {axis}, but the model takes at most {most}")


def shown_shape(shape: list[int]) -> str:
    """As a refusal repeats it."""
    text = str(shape)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"


def cast_to(array: Array, spec: TensorSpec) -> Array:
    """The array in the input's type, refusing what would change a value's meaning."""
    kind = array.dtype.kind
    if kind not in "biuf":
        raise _wrong(spec, NUMBERS_ONLY)
    if spec.dtype == "bfloat16":
        return _to_bfloat16(_to_float(array, np.dtype("<f4"), spec), spec)
    try:
        dtype = np.dtype(spec.dtype).newbyteorder("<")
    except TypeError:
        raise _wrong(spec, f"is of type {spec.dtype}, which JSON cannot carry") from None
    if dtype.kind == "f":
        return _to_float(array, dtype, spec)
    if dtype.kind == "b":
        if kind != "b" and not np.isin(array, (0, 1)).all():
            raise _wrong(spec, "must hold true and false (or 1 and 0)")
        return array.astype(dtype)
    if dtype.kind not in "iu":
        raise _wrong(spec, f"is of type {spec.dtype}, which JSON cannot carry")
    if kind == "f" and not (np.isfinite(array).all() and (array == np.floor(array)).all()):
        raise _wrong(spec, f"must hold whole numbers ({spec.dtype})")
    limits = np.iinfo(dtype)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        raise _wrong(spec, f"must hold numbers from {limits.min} to {limits.max} ({spec.dtype})")
    return array.astype(dtype)


def array_of_lists(value: Any, spec: TensorSpec) -> Array:
    """Numbers in lists of lists. Raises `InvalidRequest` naming the input."""
    # numpy would give every element the room of the longest text.
    if not _is_numeric(value):
        raise _wrong(spec, NUMBERS_ONLY)
    try:
        array = np.array(value)
    except ValueError:
        raise _wrong(spec, "is ragged: lists at the same depth must have equal lengths") from None
    except OverflowError:
        raise _wrong(spec, "holds a number that is too large") from None
    if array.size == 0 and array.dtype.kind == "f":
        return array.astype("<f4")
    if spec.dtype == "uint64" and array.dtype.kind == "f":
        return _exact(value, array)
    return array


def _exact(value: Any, array: Array) -> Array:
    """Integers beyond int64 beside small ones, which numpy makes floats of."""
    numbers = np.array(value, dtype=object)
    if any(type(number) is not int or not 0 <= number < 2**64 for number in numbers.flat):
        return array
    return numbers.astype(np.uint64)


def _is_numeric(value: Any) -> bool:
    """Whether nothing but numbers lies in lists of lists, however deep."""
    todo: list[Any] = [value]
    while todo:
        value = todo.pop()
        if not isinstance(value, list):
            if type(value) not in _NUMBERS:
                return False
            continue
        members = cast("list[Any]", value)
        if not set(map(type, members)) <= _NUMBERS:
            todo += members
    return True


def check_rows(tensors: list[Tensor], schema: Schema) -> list[Tensor]:
    """The same tensors, if those of a batch have as many rows. Raises `InvalidRequest`."""
    if schema.is_batched and len({tensor.shape[0] for tensor in tensors}) > 1:
        sizes = ", ".join(f"{tensor.name}: {tensor.shape[0]}" for tensor in tensors)
        raise InvalidRequest(
            f"The inputs are of one batch, but have different lengths ({sizes}).", param="inputs"
        )
    return tensors


def array_of(tensor: Tensor) -> Array:
    """An output as an array; bfloat16 becomes float32."""
    if tensor.dtype == "bfloat16":
        bits = np.frombuffer(tensor.data, "<u2").astype("<u4") << np.uint32(16)
        return bits.view("<f4").reshape(tensor.shape)
    dtype = np.dtype(tensor.dtype).newbyteorder("<")
    return np.frombuffer(tensor.data, dtype).reshape(tensor.shape)


def _to_float(array: Array, dtype: np.dtype[Any], spec: TensorSpec) -> Array:
    with np.errstate(over="ignore"):  # looked at below, input by input
        floats = array.astype(dtype)
    _check_overflow(array, floats, spec)
    return floats


def _to_bfloat16(array: Array, spec: TensorSpec) -> Array:
    """Rounds to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(array, "<f4").view("<u4")
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    rounded = np.where(np.isnan(array), np.uint32(0x7FC0), rounded)
    _check_overflow(array, (rounded << np.uint32(16)).view("<f4"), spec)
    return rounded.astype("<u2")


def _check_overflow(given: Array, floats: Array, spec: TensorSpec) -> None:
    """Infinity is a value like any other, but only where it was given."""
    if not np.isfinite(floats).all() and (np.isinf(floats) & np.isfinite(given)).any():
        raise _wrong(spec, f"holds a number that is too large for {spec.dtype}")


def _wrong(spec: TensorSpec, problem: str) -> InvalidRequest:
    return InvalidRequest(f"inputs.{spec.name} {problem}.", param=f"inputs.{spec.name}")


def _names(specs: list[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} ({spec.dtype})" for spec in specs)
