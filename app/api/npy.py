"""Files of arrays as numpy writes them: npy holds one, npz several.

Owns reading them so that nothing in a stranger's file can unpickle, or allocate more than was
sent or allowed. Which arrays a model takes is `tensors.py`'s.
"""

import io
import math
import re
import zipfile
import zlib
from collections.abc import Sequence
from tokenize import TokenError
from urllib.parse import quote

import numpy as np

from app.api.tensors import Array, array_of
from app.core.errors import InvalidRequest, TooLarge
from runtime.protocol import MAX_FRAME_BYTES, Tensor

NPY = "application/x-npy"
NPZ = "application/x-npz"
MAX_HEADER_BYTES = 10_000
MAX_MEMBERS = 256
MAX_UNPACKED_BYTES = MAX_FRAME_BYTES
# What Python's own parser of literals says about a header that is none.
_UNREADABLE = (TokenError, SyntaxError, RecursionError, MemoryError)
_UPWARDS = re.compile(r"(^|[/\\])\.\.?([/\\]|$)|^[/\\]|^[A-Za-z]:")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_npy(body: bytes, what: str = "The body") -> Array:
    """Like `numpy.load`. Raises `InvalidRequest`."""
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read_header(file, max_header_size=MAX_HEADER_BYTES)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        if any(type(size) is not int or size < 0 for size in shape):
            raise ValueError(f"its header announces {shape}"[:200])
        data = memoryview(body)[file.tell() :]
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"its header announces {list(shape)} of {dtype}"[:200])
        return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")
    except (*_UNREADABLE, ValueError, LookupError, TypeError, OverflowError) as error:
        raise InvalidRequest(f"{what} is not an npy file: {error}.", param="inputs") from None


def read_npz(body: bytes) -> dict[str, Array]:
    """The arrays by name. Raises `InvalidRequest`, or `TooLarge` before anything is unpacked."""
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            members = archive.infolist()
            _check_members(members)
            return {
                member.filename.removesuffix(".npy"): read_npy(
                    _unpacked(archive, member), f"Its member {member.filename[:80]!r}"
                )
                for member in members
            }
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _not_npz(str(error)[:200]) from None
    except (ValueError, OverflowError, OSError, UnicodeDecodeError):
        raise _not_npz("its directory is damaged") from None


def _check_members(members: list[zipfile.ZipInfo]) -> None:
    if len(members) > MAX_MEMBERS:
        raise _not_npz(f"it has {len(members)} members")
    if len({member.filename for member in members}) != len(members):
        raise _not_npz("it has two arrays of one name")
    for member in members:
        if member.flag_bits & 1 or member.compress_type not in _METHODS or member.file_size < 0:
            raise _not_npz(f"its member {member.filename[:80]!r} is encrypted or packed oddly")
    total = sum(member.file_size for member in members)
    if total > MAX_UNPACKED_BYTES:
        raise TooLarge(
            f"The arrays take {total:,} bytes unpacked; {MAX_UNPACKED_BYTES:,} are the most."
        )


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """No more of it than its entry announces, however well it is packed."""
    with archive.open(member) as file:
        data = file.read(member.file_size)
    if len(data) != member.file_size:
        raise _not_npz(f"its member {member.filename[:80]!r} is cut short")
    return data


def npy_of(tensor: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, array_of(tensor), allow_pickle=False)
    return file.getvalue()


def npz_of(tensors: Sequence[Tensor]) -> bytes:
    """Not compressed: floats hardly shrink."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for tensor in tensors:
            archive.writestr(f"{member_name(tensor.name)}.npy", npy_of(tensor))
    return file.getvalue()


def member_name(name: str) -> str:
    """The tensor's name, percent-encoded where it could be a path that leads out of the directory
    in which somebody unpacks the file, or is no text to show."""
    is_plain = name.isprintable() and "%" not in name and not _UPWARDS.search(name)
    return name if is_plain else quote(name, safe="").replace(".", "%2E")


def _not_npz(problem: str) -> InvalidRequest:
    return InvalidRequest(f"The body is not an npz file: {problem}.", param="inputs")
