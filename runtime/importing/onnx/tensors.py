"""Finds every tensor of an ONNX model, and where those lie that are kept in files of their own.

External data is a way to name files, and so to read what is none of the model's: a location must
be a plain relative path to a regular file, with one name, in the directory it is looked for in.
"""

import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import torch
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from runtime.importing.program import ImportFailure

MAX_DEPTH = 16  # of graphs inside attributes of nodes
MEMORY_MARKER = "_ORT_MEM_ADDR_"  # in a location, an address in the runtime's own memory

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
    TensorProto.BOOL: torch.bool,
}
# Bits of a value of the types that torch does not have, or that ONNX packs.
_OTHER_BITS: dict[int, int] = {
    **dict.fromkeys((TensorProto.UINT4, TensorProto.INT4, TensorProto.FLOAT4E2M1), 4),
    **dict.fromkeys((TensorProto.UINT2, TensorProto.INT2), 2),
    **dict.fromkeys((TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ), 8),
    **dict.fromkeys((TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ), 8),
    **{TensorProto.FLOAT8E8M0: 8, TensorProto.COMPLEX64: 64, TensorProto.COMPLEX128: 128},
}


class Place(msgspec.Struct, frozen=True):
    """Where an external tensor's bytes are."""

    location: str
    offset: int
    num_bytes: int


def nodes_of(model: ModelProto) -> Iterator[NodeProto]:
    """Every node, those of functions and of graphs inside attributes included."""
    yield from _nodes(model.graph.node, 0)
    for function in model.functions:
        yield from _nodes(function.node, 0)


def _nodes(nodes: Iterable[NodeProto], depth: int) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for graph in _graphs(node):
            yield from _nodes(graph.node, _deeper(depth))


def graphs_of(model: ModelProto) -> Iterator[GraphProto]:
    """Every graph, the model's own first."""
    yield model.graph
    for node in nodes_of(model):
        yield from _graphs(node)


def _graphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _deeper(depth: int) -> int:
    if depth >= MAX_DEPTH:
        raise ImportFailure("onnx_damaged", "The ONNX file's graphs are nested too deeply.")
    return depth + 1


def tensors_of(model: ModelProto) -> Iterator[TensorProto]:
    """Every dense tensor, of whatever graph, function or attribute."""
    for graph in graphs_of(model):
        yield from graph.initializer
    for attribute in attributes_of(model):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def constants_of(model: ModelProto) -> dict[str, TensorProto]:
    """The graph's initializers, and what nodes give as constants, by name."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in nodes_of(model):
        if node.op_type == "Constant" and node.output:
            for attribute in node.attribute:
                if attribute.name == "value":
                    found[node.output[0]] = attribute.t
    return found


def attributes_of(model: ModelProto) -> Iterator[AttributeProto]:
    for node in nodes_of(model):
        yield from node.attribute
    for function in model.functions:
        yield from function.attribute_proto


def is_external(tensor: TensorProto) -> bool:
    """Whether its bytes are to be found elsewhere. Entries alone count too."""
    return tensor.data_location == TensorProto.EXTERNAL or len(tensor.external_data) > 0


def num_values(tensor: TensorProto) -> int:
    return math.prod(tensor.dims)


def num_bytes(tensor: TensorProto) -> int:
    """What its shape and type need; strings count nothing."""
    dtype = DTYPES.get(tensor.data_type)
    bits = dtype.itemsize * 8 if dtype else _OTHER_BITS.get(tensor.data_type, 0)
    return -(-num_values(tensor) * bits // 8)


def place_of(tensor: TensorProto) -> Place:
    """Where an external tensor says it is. Raises `ImportFailure` for one that makes no sense."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    needed = num_bytes(tensor)
    offset, length = entries.get("offset", "0"), entries.get("length", str(needed))
    are_numbers = all(
        number.isascii() and number.isdecimal() and len(number) < 19 for number in (offset, length)
    )
    if not are_numbers or int(length) != needed or any(size < 0 for size in tensor.dims):
        raise ImportFailure(
            "onnx_damaged",
            f"The tensor {tensor.name[:80]!r} does not lie where its headers say, or has not the "
            "bytes that its shape needs. Export and upload the model again.",
        )
    return Place(entries.get("location", ""), int(offset), needed)


def find_file(place: Place, directory: Path) -> Path:
    """The file that an external tensor lies in. Raises `ImportFailure` unless it is a regular file
    inside `directory`, under one name alone, and long enough."""
    location = place.location
    parts = [part for part in location.split("/") if part not in ("", ".")]
    is_plain = location.isprintable() and not set(location) & set("\\:*")
    is_inside = not location.startswith("/") and ".." not in parts and bool(parts)
    if not (is_plain and is_inside) or MEMORY_MARKER in location:
        raise _outside(location)
    path = directory.joinpath(*parts)
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError as error:
        raise ImportFailure(
            "external_data_missing",
            f"The model's weights lie in {location[:120]!r}, which is not in the upload. Pack the "
            f"files together:\n    tar -cf model.tar model.onnx {location[:120]}",
        ) from error
    is_real = path.resolve() == directory.resolve().joinpath(*parts)
    if not is_real or not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise _outside(location)
    if place.offset + place.num_bytes > status.st_size:
        raise ImportFailure(
            "external_data_short",
            f"A tensor of the model ends beyond the end of {location[:120]!r}: the file is cut "
            "short, or of another model. Pack both files again.",
        )
    return path


def _outside(location: str) -> ImportFailure:
    return ImportFailure(
        "external_data_path",
        f"The model's weights lie at {location[:120]!r}, outside the upload. They may lie in files "
        "beside the model alone. Save it again:\n"
        '    onnx.save(model, "model.onnx", save_as_external_data=True, '
        'location="model.onnx.data")',
    )
