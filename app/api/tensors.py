"""JSON lists and npy bodies to tensors of a schema, and back.

Owns the errors that name what is wrong with an input. bfloat16, which numpy lacks, travels as
its 16 bits and is shown as the float it stands for.
"""

import io
import math
from tokenize import TokenError
from typing import Any, cast

import numpy as np

from app.core.errors import InvalidRequest
from runtime.protocol import Schema, Tensor, TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]
MAX_NPY_HEADER_BYTES = 10_000
NUMBERS_ONLY = "must hold numbers only (no text, null or nested objects)"
# What Python's own parser of literals says about a header that is none.
UNREADABLE = (TokenError, SyntaxError, RecursionError, MemoryError)
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
    known = {spec.name for spec in specs}
    for name in named:
        if name not in known:
            raise InvalidRequest(
                f"inputs.{name} is not an input of this model, which takes: {_names(specs)}.",
                param=f"inputs.{name}",
            )
    tensors: list[Tensor] = []
    for spec in specs:
        if spec.name not in named:
            raise _wrong(spec, "is required")
        array = cast_to(_array_of(named[spec.name], spec), spec)
        tensors.append(tensor_of(array, spec, schema))
    return _checked_rows(tensors, schema)


def tensors_of_npy(body: bytes, schema: Schema) -> list[Tensor]:
    """The one input of a model from the bytes of an npy file."""
    if len(schema.inputs) != 1:
        raise InvalidRequest(
            f"An npy body holds one array, but this model takes: {_names(schema.inputs)}. "
            "Send JSON.",
            param="inputs",
        )
    (spec,) = schema.inputs
    return [tensor_of(cast_to(_read_npy(body), spec), spec, schema)]


def tensor_of(array: Array, spec: TensorSpec, schema: Schema) -> Tensor:
    """Checks the shape against the schema's."""
    shape = list(array.shape)
    wanted = "[" + ", ".join("any" if axis is None else str(axis) for axis in spec.shape) + "]"
    if len(shape) != len(spec.shape):
        is_row = schema.is_batched and len(shape) == len(spec.shape) - 1
        hint = "; put one more list around it, for a batch of one" if is_row else ""
        raise _wrong(spec, f"has shape {shape}, but the model takes {wanted}{hint}")
    for axis, (size, fixed) in enumerate(zip(shape, spec.shape, strict=True)):
        if fixed is not None and size != fixed:
            raise _wrong(spec, f"has shape {shape}, but the model takes {wanted}")
        least = spec.min_shape[axis] if spec.min_shape else 1
        most = spec.max_shape[axis] if spec.max_shape else None
        if size < least:
            raise _wrong(spec, f"has {size} at axis {axis}, but the model takes at least {least}")
        if most is not None and size > most:
            raise _wrong(spec, f"has {size} at axis {axis}, but the model takes at most {most}")
    data = np.ascontiguousarray(array).tobytes()
    return Tensor(name=spec.name, dtype=spec.dtype, shape=shape, data=data)


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


def _array_of(value: Any, spec: TensorSpec) -> Array:
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
    return array


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


def _read_npy(body: bytes) -> Array:
    """Like `numpy.load`, but nothing in the header can make it allocate or unpickle."""
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read_header(file, max_header_size=MAX_NPY_HEADER_BYTES)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        if any(type(size) is not int or size < 0 for size in shape):
            raise ValueError(f"its header announces {shape}"[:200])
        data = body[file.tell() :]
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"its header announces {list(shape)} of {dtype}"[:200])
        return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")
    except (*UNREADABLE, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"The body is not an npy file: {error}.", param="inputs") from None


def _checked_rows(tensors: list[Tensor], schema: Schema) -> list[Tensor]:
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


def npy_of(tensor: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, array_of(tensor), allow_pickle=False)
    return file.getvalue()


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
