"""Reads `examples.npz`: the inputs that an owner sends along, one array per input.

A reader of its own instead of `numpy.load`: nothing is unpickled, and no header decides how much
memory is taken. Matching arrays with inputs is here too; what they are used for is not.
"""

import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from numpy.lib import format as npy

from runtime.batching.tensors import show_shape, torch_dtype
from runtime.importing.program import ImportFailure
from runtime.importing.signature import WIRE_DTYPES
from runtime.protocol import Schema, TensorSpec

EXAMPLES_NAME = "examples.npz"
MAX_ARRAYS = 256
MAX_BYTES = 256 * 1024**2  # of all arrays, unpacked
MAX_KEPT_BYTES = 16 * 1024**2  # in the artifact, for what is measured later
MAX_HEADER_BYTES = 16 * 1024
MAX_AXES = 16
SAVE_LINE = "    numpy.savez({name!r}, {inputs})"
_DTYPES = frozenset(WIRE_DTYPES.values())
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, SyntaxError)

Arrays = dict[str, torch.Tensor]


def read_examples(path: Path) -> Arrays:
    """The arrays by name, in the file's order. Raises `ImportFailure`."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MAX_ARRAYS:
                raise _refused(f"holds more than {MAX_ARRAYS} arrays.")
            if sum(member.file_size for member in members) > MAX_BYTES:
                raise _refused(f"holds more than {MAX_BYTES:,} bytes. A few rows are enough.")
            arrays = dict(_read_array(archive, member) for member in members)
    except _DAMAGE as error:
        raise _refused(f"is damaged ({str(error)[:200] or type(error).__name__}).") from error
    if not arrays:
        raise _refused("holds no arrays.")
    return arrays


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[str, torch.Tensor]:
    name = member.filename.removesuffix(".npy")
    if name == member.filename or member.flag_bits & 0x1:
        raise _refused(f"holds {name[:80]!r}, which is no array that numpy.savez writes.")
    with archive.open(member) as file:
        data = file.read(member.file_size + 1)
    stream = io.BytesIO(data)
    version = npy.read_magic(stream)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise _refused(f"holds {name[:80]!r} in an unknown version of numpy's format.")
    shape, is_fortran, dtype = read(stream, max_header_size=MAX_HEADER_BYTES)
    if dtype.hasobject or dtype.name not in _DTYPES:
        what = "Python objects, which are never unpickled" if dtype.hasobject else str(dtype)
        raise _refused(
            f"holds {name[:80]!r} of {what}; save it as numbers, for example with "
            ".astype('float32')."
        )
    if len(shape) > MAX_AXES or any(size < 0 for size in shape):
        raise _refused(f"holds {name[:80]!r} of an impossible shape.")
    rest = data[stream.tell() :]
    if math.prod(shape) * dtype.itemsize != len(rest):
        raise _refused(f"holds {name[:80]!r}, whose shape and data do not agree.")
    array = numpy.frombuffer(rest, dtype).reshape(shape, order="F" if is_fortran else "C")
    # Writable, in this machine's byte order.
    return name, torch.from_numpy(numpy.array(array, dtype.newbyteorder("="), order="C"))


def write_examples(arrays: Arrays, path: Path) -> None:
    """As `read_examples` reads them."""
    with path.open("wb") as file:
        numpy.savez(file, **{name: tensor.numpy() for name, tensor in arrays.items()})  # type: ignore[arg-type]


def keep_examples(tensors: Sequence[torch.Tensor], schema: Schema, artifact_dir: Path) -> None:
    """Writes them, or as many leading rows as `MAX_KEPT_BYTES` allow, into an artifact."""
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    if num_bytes > MAX_KEPT_BYTES:
        num_rows = tensors[0].shape[0] if schema.is_batched else 0
        num_kept = num_rows * MAX_KEPT_BYTES // num_bytes
        if not num_kept:
            return
        tensors = [tensor[:num_kept].contiguous() for tensor in tensors]
    names = [spec.name for spec in schema.inputs]
    write_examples(dict(zip(names, tensors, strict=True)), artifact_dir / EXAMPLES_NAME)


def pick_arrays(arrays: Arrays, names: Sequence[str]) -> list[torch.Tensor]:
    """The arrays of the inputs `names`: by name, or by order where the file gives none, as
    `numpy.savez(file, a, b)` does. Raises `ImportFailure`."""
    if set(arrays) == set(names):
        return [arrays[name] for name in names]
    is_unnamed = list(arrays) == [f"arr_{at}" for at in range(len(arrays))]
    if is_unnamed and len(arrays) == len(names):
        return list(arrays.values())
    shown = ", ".join(names[:8])
    lines = SAVE_LINE.format(
        name=EXAMPLES_NAME, inputs=", ".join(f"**{{{name!r}: ...}}" for name in names[:4])
    )
    raise _refused(
        f"has the arrays {', '.join(arrays)[:200]}; the model's inputs are {shown}. Name each "
        f"array like its input:\n{lines}"
    )


def match_examples(arrays: Arrays, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
    """The arrays in the order of `specs`, whose dtypes and shapes they have. Raises
    `ImportFailure`."""
    tensors = pick_arrays(arrays, [spec.name for spec in specs])
    for tensor, spec in zip(tensors, specs, strict=True):
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype != torch_dtype(spec.dtype):
            raise _refused(
                f"gives {spec.name!r} as {dtype}; the model takes {spec.dtype}. Save it with "
                f".astype('{spec.dtype}')."
            )
        if not _fits(tensor, spec):
            raise _refused(
                f"gives {spec.name!r} the shape {list(tensor.shape)}; the model takes "
                f"{show_shape(spec)}."
            )
    return tensors


def _fits(tensor: torch.Tensor, spec: TensorSpec) -> bool:
    lower = spec.min_shape or [size or 0 for size in spec.shape]
    upper = spec.max_shape or spec.shape
    return tensor.dim() == len(spec.shape) and all(
        least <= size and (most is None or size <= most)
        for size, least, most in zip(tensor.shape, lower, upper, strict=True)
    )


def _refused(reason: str) -> ImportFailure:
    return ImportFailure("examples", f"{EXAMPLES_NAME} {reason}")
