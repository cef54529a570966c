"""Small ONNX files for the tests of importing, proof, build and inspection."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from tests.runtime.importing.programs import BATCH, Digits

Ends = Mapping[str, tuple[int, Sequence[int | str | None] | None]]
WEIGHT = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
FLOAT = TensorProto.FLOAT


def node(operator: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    """`inputs` and `outputs` are names with spaces between them; `_` is one left out."""
    names = [name.replace("_", "") if name == "_" else name for name in inputs.split()]
    return helper.make_node(operator, names, outputs.split(), **attributes)


def graph(
    nodes: Sequence[NodeProto],
    inputs: Ends,
    outputs: Ends,
    weights: Mapping[str, Any] | None = None,
    *,
    opset: int = 18,
    ir_version: int = 10,
    **options: Any,
) -> ModelProto:
    """Ends are types and axes by name; no axes is no shape."""
    ends = [
        [helper.make_tensor_value_info(name, kind, axes) for name, (kind, axes) in side.items()]
        for side in (inputs, outputs)
    ]
    tensors = [
        numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()
    ]
    made = helper.make_graph(list(nodes), "graph", *ends, tensors)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], **options)
    model.ir_version = ir_version
    return model


def linear(batch: int | str | None = "batch", rows: int | str | None = ...) -> ModelProto:  # type: ignore[assignment]
    """`y = x @ w`, `[batch, 4]` to `[batch, 3]`."""
    rows = batch if rows is ... else rows
    ends = ({"x": (FLOAT, [batch, 4])}, {"y": (FLOAT, [rows, 3])})
    return graph([node("MatMul", "x w", "y")], *ends, {"w": WEIGHT})


def save(path: Path, model: ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def with_external(
    model: ModelProto, location: str = "weights.bin", **entries: object
) -> tuple[ModelProto, bytes]:
    """The first weight moved to a file of its own, with what that file must hold."""
    tensor = model.graph.initializer[0]
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": location} | entries).items():
        tensor.external_data.add(key=key, value=str(value))
    return model, data


def export_onnx(path: Path, module: nn.Module, *args: Any, dynamic: Any = ...) -> Path:
    """By torch's own exporter, by default with a dynamic batch for every argument."""
    shapes = tuple(BATCH for _ in args) if dynamic is ... else dynamic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within torch and onnxscript
        program = torch.onnx.export(
            module.eval(), args, dynamo=True, dynamic_shapes=shapes, verbose=False
        )
    assert program is not None, "exports to memory give a program"
    program.save(path)
    return path


def export_digits_onnx(path: Path) -> Path:
    torch.manual_seed(0)
    return export_onnx(path, Digits(), torch.rand(2, 1, 8, 8))


def export_bundle(directory: Path) -> tuple[Path, Path]:
    """The same with its weights in `model.onnx.data` beside `model.onnx`."""
    model = onnx.load(export_digits_onnx(directory / "whole"))
    path = directory / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return path, directory / "model.onnx.data"
