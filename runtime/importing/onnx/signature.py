"""Reads a tensor program's signature off an ONNX graph: names, dtypes, dynamic axes, the batch.

A named dynamic axis is a symbol, the same wherever the name is; an unnamed one has its own.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

import sympy
from onnx import ModelProto, TensorShapeProto, ValueInfoProto
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from runtime.importing.onnx.reading import real_inputs
from runtime.importing.onnx.tensors import DTYPES
from runtime.importing.program import ImportFailure
from runtime.importing.signature import WIRE_DTYPES, Leaf, Signature, axis_bounds, find_batch
from runtime.protocol import Schema, TensorSpec

MAX_NAME_CHARS = 200
MAX_AXES = 64

# Operators whose result holds the values of their first input.
_SAME_VALUES = frozenset(
    {"Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand"}
)
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: FloorDiv,
}


class Symbols:
    """The symbols of one graph, and the sizes that each may stand for."""

    def __init__(self) -> None:
        self.ranges: dict[Any, Any] = {}
        self._named: dict[str, sympy.Symbol] = {}

    def axis(self, dimension: TensorShapeProto.Dimension, where: str) -> sympy.Expr:
        """The size of an axis: a number, a symbol, or what its name says to compute."""
        if dimension.HasField("dim_value"):
            return sympy.Integer(dimension.dim_value)
        name = dimension.dim_param.strip()
        if not name:
            return self._register(sympy.Dummy(where, integer=True, positive=True))
        return self._parse(name) if len(name) <= MAX_NAME_CHARS else self._symbol(name)

    def _symbol(self, name: str) -> sympy.Symbol:
        if name not in self._named:
            symbol = sympy.Symbol(name, integer=True, positive=True)
            self._named[name] = self._register(symbol)
        return self._named[name]

    def _register(self, symbol: sympy.Symbol) -> sympy.Symbol:
        self.ranges[symbol] = ValueRanges(1, int_oo)
        return symbol

    def _parse(self, name: str) -> sympy.Expr:
        """Exporters write arithmetic of other axes' names as an axis' name."""
        if name.isidentifier():
            return self._symbol(name)
        try:
            return self._expression(ast.parse(name, mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return self._symbol(name)

    def _expression(self, node: ast.expr) -> sympy.Expr:
        match node:
            case ast.Name():
                return self._symbol(node.id)
            case ast.Constant(value=int()) if not isinstance(node.value, bool):
                return sympy.Integer(node.value)
            case ast.BinOp() if type(node.op) in _OPERATORS:
                left, right = self._expression(node.left), self._expression(node.right)
                return _OPERATORS[type(node.op)](left, right)
        raise ValueError("no arithmetic of axes")


def read_onnx_signature(model: ModelProto) -> Signature:
    """Raises `ImportFailure` for an input or output without a shape."""
    symbols = Symbols()
    ranges = find_ranges(model)
    inputs = [
        _leaf(value, symbols, "input", ranges.get(value.name)) for value in real_inputs(model)
    ]
    outputs = [_leaf(value, symbols, "output") for value in model.graph.output]
    lines = (
        '    torch.onnx.export(model, example, "model.onnx", dynamo=True,\n'
        f"                      dynamic_shapes={{{_dynamic_axes(inputs)}}})"
        '  # batch = torch.export.Dim("batch")'
    )
    batch, note = find_batch(inputs, outputs, symbols.ranges, lines)
    return Signature(
        schema=Schema(
            inputs=[leaf.spec for leaf in inputs if leaf.spec],
            outputs=[leaf.spec for leaf in outputs if leaf.spec],
            is_batched=bool(batch),
        ),
        inputs=inputs,
        outputs=outputs,
        ranges=symbols.ranges,
        batch=frozenset(batch),
        batch_note=note,
    )


def _leaf(
    value: ValueInfoProto, symbols: Symbols, what: str, ids: tuple[int, int] | None = None
) -> Leaf:
    kind = value.type.tensor_type
    if not kind.HasField("shape") or len(kind.shape.dim) > MAX_AXES:
        raise ImportFailure(
            "no_shape",
            f"The file does not say the shape of the {what} {value.name[:80]!r}. Say it, or write "
            "it into the file:\n"
            '    onnx.save(onnx.shape_inference.infer_shapes(onnx.load("model.onnx")), '
            '"model.onnx")',
            param="inputs" if what == "input" else None,
        )
    dtype = DTYPES[kind.elem_type]
    axes = tuple(
        symbols.axis(dimension, f"{value.name}_{index}")
        for index, dimension in enumerate(kind.shape.dim)
    )
    is_dynamic = any(not axis.is_Integer for axis in axes)
    bounds = [axis_bounds(axis, symbols.ranges) for axis in axes]
    spec = TensorSpec(
        name=value.name,
        dtype=WIRE_DTYPES[dtype],
        shape=[int(axis) if axis.is_Integer else None for axis in axes],  # type: ignore[arg-type]
        min_shape=[least for least, _ in bounds] if is_dynamic else None,
        max_shape=[most for _, most in bounds] if is_dynamic else None,
        minimum=ids[0] if ids else None,
        maximum=ids[1] if ids else None,
    )
    return Leaf(spec=spec, dtype=dtype, axes=axes)


def find_ranges(model: ModelProto) -> dict[str, tuple[int, int]]:
    """Least and greatest value of inputs that look rows of a weight up, by name."""
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    origins = {value.name: value.name for value in real_inputs(model)}
    found: dict[str, tuple[int, int]] = {}
    for node in model.graph.node:
        if not node.input:
            continue
        if node.op_type in _SAME_VALUES and node.input[0] in origins:
            origins[node.output[0]] = origins[node.input[0]]
        is_along_rows = not any(each.name == "axis" and each.i for each in node.attribute)
        if node.op_type != "Gather" or not is_along_rows or node.input[0] not in rows:
            continue
        if (name := origins.get(node.input[1])) is not None:
            most = rows[node.input[0]] - 1
            found[name] = (0, min(most, found[name][1]) if name in found else most)
    return found


def _dynamic_axes(inputs: list[Leaf]) -> str:
    return ", ".join(
        f'"{leaf.spec.name}": {{0: batch}}' if leaf.axes else f'"{leaf.spec.name}": None'
        for leaf in inputs
        if leaf.spec
    )
