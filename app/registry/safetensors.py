"""The header of a safetensors file: read under caps, and believed only if it fits the file.

The format: 8 bytes of length, that much JSON, then the tensors without a gap between them.
"""

from collections.abc import Callable
from math import prod

import msgspec

from app.core.errors import Unprocessable

MAX_HEADER_BYTES = 8 * 1024**2
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 64
LENGTH_BYTES = 8

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


class _Tensor(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def check_safetensors(name: str, size_bytes: int, read: Callable[[int], bytes]) -> int:
    """The number of tensors. `read` gives the file's first bytes in order. Raises `Unprocessable`
    unless every tensor lies where and is as long as its header says."""
    header = _header(name, size_bytes, read)
    tensors = _tensors(name, header)
    end = 0
    for tensor_name, tensor in tensors:
        begin, tensor_end = tensor.data_offsets
        if begin != end or tensor_end < begin:
            raise _refused(
                name, f"the tensor {tensor_name[:80]!r} overlaps another or leaves a gap"
            )
        _check_size(name, tensor_name, tensor)
        end = tensor_end
    if LENGTH_BYTES + len(header) + end != size_bytes:
        raise _refused(name, "it is cut short, or longer than its header says")
    return len(tensors)


def _header(name: str, size_bytes: int, read: Callable[[int], bytes]) -> bytes:
    length = int.from_bytes(read(LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise _refused(name, f"its header of {length:,} bytes is beyond {MAX_HEADER_BYTES:,}")
    if LENGTH_BYTES + length > size_bytes:
        raise _refused(name, "it is cut short")
    return read(length)


def _tensors(name: str, header: bytes) -> list[tuple[str, _Tensor]]:
    """In the order of their bytes."""
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        if len(entries) > MAX_TENSORS:
            raise _refused(name, f"it holds more than {MAX_TENSORS:,} tensors")
        decoder = msgspec.json.Decoder(_Tensor)
        tensors = [(key, decoder.decode(entry)) for key, entry in entries.items()]
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise _refused(name, f"its header is not what safetensors writes: {error}") from error
    return sorted(tensors, key=lambda item: item[1].data_offsets)


def _check_size(name: str, tensor_name: str, tensor: _Tensor) -> None:
    shape = tensor.shape
    is_shape = len(shape) <= MAX_DIMENSIONS and all(0 <= size < 2**63 for size in shape)
    begin, end = tensor.data_offsets
    bits = BITS.get(tensor.dtype)
    if bits is None or not is_shape or prod(shape) * bits != 8 * (end - begin):
        raise _refused(
            name, f"the tensor {tensor_name[:80]!r} does not have the bytes its shape and type need"
        )


def _refused(name: str, why: str) -> Unprocessable:
    return Unprocessable(
        f"{name} is not a sound safetensors file: {why}. Save the model again with "
        "model.save_pretrained(directory) and upload that.",
        code="safetensors_damaged",
    )
