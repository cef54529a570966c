"""Runs an ONNX graph in float64, node by node: what its rounding is measured against.

The reference evaluator of the onnx package, on a copy of the graph in which every float is a
double, with the operators replaced that it has wrong, slow, or in float32 alone. Bounded in time.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TensorProto
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

from runtime.importing.onnx.float64_operators import OPERATORS
from runtime.importing.onnx.reading import read_onnx
from runtime.importing.onnx.tensors import attributes_of, graphs_of, nodes_of
from runtime.importing.onnx.weights import read_weight

logger = logging.getLogger(__name__)

LIMIT_SECONDS = 60.0  # of one evaluation, and of all that are given up
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "softmax_precision")
# Loops in Python over every element: for small inputs alone.
_SLOW = frozenset(
    {"GridSample", "RoiAlign", "MaxRoiPool", "DeformConv", "MaxUnpool", "LpPool", "Col2Im"}
)
MAX_SLOW_VALUES = 20_000

_deadline: ContextVar[float] = ContextVar("deadline")


class _GivenUpError(Exception):
    """The evaluation takes too long."""


class Float64Evaluator:
    """The file at `path` in float64. Its graph is read when it is first run."""

    def __init__(self, path: Path, limit_seconds: float = LIMIT_SECONDS) -> None:
        self._path = path
        self._limit_seconds = limit_seconds
        self._evaluator: _Evaluator | None = None
        self._is_given_up = False

    def run(
        self, outputs: Sequence[str], batches: Sequence[Mapping[str, torch.Tensor]]
    ) -> list[list[torch.Tensor]] | None:
        """`outputs` for each of `batches`, the floats among them in float64; None when the graph
        has no such form, or its evaluation takes too long: then it is not tried again."""
        if self._is_given_up:
            return None
        token = _deadline.set(time.monotonic() + self._limit_seconds)
        try:
            if self._evaluator is None:
                self._evaluator = _Evaluator(widened(self._path))
            with np.errstate(all="ignore"):
                return [self._run(self._evaluator, outputs, inputs) for inputs in batches]
        except Exception:  # operators without such a form fail in many ways
            logger.info("the model does not run in float64", exc_info=True)
            self._is_given_up = True
            return None
        finally:
            _deadline.reset(token)

    @staticmethod
    def _run(
        evaluator: "_Evaluator", outputs: Sequence[str], inputs: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        feeds = {
            name: (tensor.double() if tensor.is_floating_point() else tensor).numpy()
            for name, tensor in inputs.items()
        }
        found = evaluator.run(list(outputs), feeds)
        return [torch.from_numpy(np.array(value)) for value in found]


class _Evaluator(ReferenceEvaluator):
    """The reference evaluator with operators of ours, which looks at the time between nodes and
    lets go of what is not needed any more. Also what runs graphs inside nodes."""

    def __init__(self, proto: Any, opsets: Any = None, functions: Any = None, **options: Any):
        options["new_ops"] = list(OPERATORS)
        super().__init__(proto, opsets, functions, **options)
        self._last_use = {} if self._needs_all() else self._last_uses()

    def _needs_all(self) -> bool:
        return any(node.need_context() for node in self.rt_nodes_)

    def _last_uses(self) -> dict[str, int]:
        return {name: at for at, node in enumerate(self.rt_nodes_) for name in node.input if name}

    def run(
        self,
        output_names: Sequence[str] | None,
        feed_inputs: dict[str, Any],
        attributes: dict[str, Any] | None = None,
        intermediate: bool = False,
    ) -> Any:
        if isinstance(self.proto_, FunctionProto | NodeProto):  # the body of an operator
            return super().run(output_names, feed_inputs, attributes, intermediate)
        names = [str(name) for name in output_names or self.output_names]
        results: dict[str, Any] = {"": None, **self.rt_inits_, **feed_inputs}
        for at, node in enumerate(self.rt_nodes_):
            inputs = [results[name] for name in node.input]
            _check_time(node.op_type, inputs)
            options: dict[str, Any] = {"context": results} if node.need_context() else {}
            if node.has_linked_attribute and attributes:
                options["linked_attributes"] = attributes
            for name, value in zip(node.output, node.run(*inputs, **options), strict=False):
                results[name] = _wide(value)
            for name in node.input:
                if self._last_use.get(name) == at and name not in names:
                    results.pop(name, None)
        return [results[name] for name in names]


def _check_time(operator: str, inputs: list[Any]) -> None:
    if time.monotonic() > _deadline.get():
        raise _GivenUpError("the evaluation takes too long")
    if operator in _SLOW and sum(np.size(value) for value in inputs) > MAX_SLOW_VALUES:
        raise _GivenUpError(f"{operator} takes too long")


def _wide(value: Any) -> Any:
    """Whatever an operator gave in a narrower float."""
    if isinstance(value, np.ndarray) and value.dtype in (np.float32, np.float16):
        return value.astype(np.float64)
    return value


# --- widening ---------------------------------------------------------------------------


def widened(path: Path) -> ModelProto:
    """The model with every float tensor, and every float type that it names, double."""
    model = read_onnx(path)
    opsets = {each.domain: each.version for each in model.opset_import}
    if "" not in opsets and "ai.onnx" in opsets:
        raise _GivenUpError("the graph names its operators' domain in the other way")
    if model.functions:
        model = inline_local_functions(model)
    directory = path.parent
    for graph in graphs_of(model):
        for tensor in graph.initializer:
            _widen_tensor(tensor, directory)
        del graph.value_info[:]
    for node in nodes_of(model):
        if node.op_type == "ConstantOfShape" and not node.attribute:
            value = onnx.helper.make_tensor("value", TensorProto.DOUBLE, [1], [0.0])
            node.attribute.append(onnx.helper.make_attribute("value", value))
        elif node.op_type == "Constant":
            _widen_constant(node)
    for attribute in attributes_of(model):
        if attribute.type == AttributeProto.TENSOR:
            _widen_tensor(attribute.t, directory)
        elif attribute.name in _DTYPE_ATTRIBUTES and attribute.i in _FLOATS:
            attribute.i = TensorProto.DOUBLE
    return model


def _widen_tensor(tensor: TensorProto, directory: Path) -> None:
    if tensor.data_type not in _FLOATS and not tensor.external_data:
        return
    name, values = tensor.name, read_weight(tensor, directory)
    values = values.double() if values.is_floating_point() else values
    tensor.CopyFrom(onnx.numpy_helper.from_array(values.numpy(), name))


def _widen_constant(node: NodeProto) -> None:
    """A constant given as a number or as numbers, which the evaluator would make float32."""
    for attribute in list(node.attribute):
        if attribute.name in ("value_float", "value_floats"):
            value = np.array(
                attribute.f if attribute.name == "value_float" else list(attribute.floats),
                np.float64,
            )
            node.attribute.remove(attribute)
            tensor = onnx.numpy_helper.from_array(value)
            node.attribute.append(onnx.helper.make_attribute("value", tensor))
