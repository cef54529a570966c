"""The weights of an ONNX model as torch tensors, wherever their bytes are."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto

from runtime.importing.onnx.tensors import (
    DTYPES,
    constants_of,
    find_file,
    is_external,
    nodes_of,
    num_bytes,
    num_values,
    place_of,
)

# Types that hold learnt numbers; the others are shapes, axes and ids.
_LEARNT = frozenset(
    {
        *(TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16),
        *(TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4),
    }
)


def named_weights(model: ModelProto) -> list[tuple[str, TensorProto]]:
    """Initializers, and the constants that some exporters keep weights in."""
    filled = {tensor.name for tensor in model.graph.initializer}
    found = constants_of(model)
    return [(name, each) for name, each in found.items() if name in filled or len(each.dims)]


def count_weights(model: ModelProto) -> tuple[int, int]:
    """How many learnt numbers there are, and the bytes of all weights and constants. Those of trees
    and linear models of ai.onnx.ml are attributes."""
    tensors = [tensor for _, tensor in named_weights(model)]
    num_parameters = sum(num_values(each) for each in tensors if each.data_type in _LEARNT)
    num_inside = sum(
        len(attribute.floats)
        for node in nodes_of(model)
        if node.domain == "ai.onnx.ml"
        for attribute in node.attribute
    )
    return num_parameters + num_inside, sum(map(num_bytes, tensors)) + 4 * num_inside


def read_weights(model: ModelProto, directory: Path) -> dict[str, torch.Tensor]:
    """Those of a type that torch has, by name. What lies in other files is mapped, not read."""
    return {
        name: read_weight(tensor, directory)
        for name, tensor in named_weights(model)
        if tensor.data_type in DTYPES
    }


def read_weight(tensor: TensorProto, directory: Path) -> torch.Tensor:
    """One tensor of a type that torch has."""
    dtype = DTYPES[tensor.data_type]
    shape = tuple(tensor.dims)
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    if is_external(tensor):
        place = place_of(tensor)
        # Copy on write: torch wants memory that it might write to.
        data = np.memmap(
            find_file(place, directory), np.uint8, "c", place.offset, (place.num_bytes,)
        )
        return torch.from_numpy(np.asarray(data)).view(dtype).reshape(shape)
    if tensor.HasField("raw_data"):
        return torch.frombuffer(bytearray(tensor.raw_data), dtype=dtype).reshape(shape)
    values = onnx.numpy_helper.to_array(tensor)
    if dtype is torch.bfloat16:
        return torch.from_numpy(values.view(np.uint16).copy()).view(dtype)
    return torch.from_numpy(values.copy())
