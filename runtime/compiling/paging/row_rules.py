"""What operators do to the rows of tokens in a value.

Owns the operators that are known to work row by row, and along which axes they may not: anything
else over tokens is refused by its name, whatever it would do to any particular tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from runtime.compiling.paging.normal import op_name
from runtime.compiling.paging.shapes import tensor_of

if TYPE_CHECKING:
    from runtime.compiling.paging.mixing import RowTrace


@dataclass(frozen=True)
class Rows:
    """Where a value's tokens are: an axis of `outer` times tokens times anything elements, in
    this order."""

    axis: int
    outer: int = 1


class Mixes(Exception):
    """An operator works along tokens, or may."""


Rule = Callable[["RowTrace", Node, dict[str, Any]], Rows]


def arguments_of(node: Node) -> dict[str, Any]:
    """Arguments by name in the schema's order, defaults included; empty for what is no operator."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    schema = node.target._schema.arguments
    defaults = {each.name: each.default_value for each in schema}
    given = dict(zip(defaults, node.args, strict=False))
    return {**defaults, **given, **node.kwargs}


def dims_of(value: Any) -> int:
    tensor = tensor_of(value)
    if tensor is None:
        raise Mixes
    return tensor.dim()


def _axes(dim: Any, dims: int) -> list[int]:
    given = [dim] if isinstance(dim, int) else list(dim)
    return [at % dims for at in given]


def _source(arguments: dict[str, Any]) -> Node:
    value = next(iter(arguments.values()), None)
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if not isinstance(value, Node):
        raise Mixes
    return value


# --- rules ------------------------------------------------------------------------------


def _unknown(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    raise Mixes


def _elementwise(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    sources = [source for source in node.all_input_nodes if tensor_of(source) is not None]
    return trace.aligned(node, sources)


def _getitem(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    return trace.only(node, node.args[0])


def _along(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    """Works along axes that must not be the tokens', and keeps them."""
    source = _source(arguments)
    rows = trace.only(node, source)
    dim = next((arguments[name] for name in ("dim", "dims") if name in arguments), None)
    if dim in (None, [], ()) or rows.axis in _axes(dim, dims_of(source)):
        raise Mixes
    return rows


def _reduce(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    rows = _along(trace, node, arguments)
    if arguments.get("keepdim"):
        return rows
    gone = {at for at in _axes(arguments["dim"], dims_of(_source(arguments))) if at < rows.axis}
    return Rows(rows.axis - len(gone), rows.outer)


def _take(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    """`select` and `unbind`: one axis goes."""
    rows = _along(trace, node, arguments)
    (gone,) = _axes(arguments["dim"], dims_of(_source(arguments)))
    return Rows(rows.axis - (gone < rows.axis), rows.outer)


def _join(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    parts = list(arguments["tensors"])
    found = {trace.rows(part) for part in parts}
    rows = found.pop()
    if found or rows is None:
        raise Mixes
    dims = dims_of(parts[0])
    if op_name(node) == "stack":
        (new,) = _axes(arguments["dim"], dims + 1)
        return Rows(rows.axis + (new <= rows.axis), rows.outer)
    if rows.axis in _axes(arguments["dim"], dims):
        raise Mixes
    return rows


def _reshape(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    """Tokens stay tokens if as many elements stand before them."""
    source = _source(arguments)
    rows = trace.only(node, source)
    axes = trace.token_axes(node)
    if len(axes) != 1:
        raise Mixes
    before = prod(trace.shape(source)[: rows.axis]) * rows.outer
    lead = prod(trace.shape(node)[: axes[0]])
    if before % lead:
        raise Mixes
    return Rows(axes[0], before // lead)


def _permute(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    source = _source(arguments)
    rows, dims = trace.only(node, source), dims_of(source)
    order = list(range(dims))
    name = op_name(node)
    if name == "permute":
        order = _axes(arguments["dims"], dims)
    else:
        pair = (arguments["dim0"], arguments["dim1"]) if name == "transpose" else (-2, -1)
        if dims > 1:
            first, second = _axes(pair, dims)
            order[first], order[second] = order[second], order[first]
    return Rows(order.index(rows.axis), rows.outer)


def _unsqueeze(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    rows = trace.only(node, _source(arguments))
    (new,) = _axes(arguments["dim"], dims_of(node))
    return Rows(rows.axis + (new <= rows.axis), rows.outer)


def _repeat(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    source = _source(arguments)
    rows = trace.only(node, source)
    axis = rows.axis + dims_of(node) - dims_of(source)
    times = trace.shape(node)[axis] // trace.shape(source)[rows.axis]
    return Rows(axis, rows.outer * times)


def _repeat_interleave(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    rows = trace.only(node, _source(arguments))
    if arguments["dim"] is None or not isinstance(arguments["repeats"], int):
        raise Mixes
    return rows


def _pad(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    source = _source(arguments)
    rows = trace.only(node, source)
    at = 2 * (dims_of(source) - 1 - rows.axis)
    if any(arguments["pad"][at : at + 2]):
        raise Mixes
    return rows


def _look_up(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    """Rows of a table by what is known of each token."""
    names = ("weight", "indices") if op_name(node) == "embedding" else ("self", "index")
    table, index = (arguments[name] for name in names)
    if names[0] == "self" and trace.rows(table) is not None:
        return _along(trace, node, arguments)
    rows = trace.only(node, index)
    return Rows(rows.axis + (arguments.get("dim") or 0) % dims_of(table), rows.outer)


def _index(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    """`x[i, :, j]`: of a table by tokens, or of tokens by something else."""
    source, indices = arguments["self"], arguments["indices"]
    rows = trace.rows(source)
    given = [each for each in indices if each is not None]
    axes = trace.token_axes(node)
    if len(axes) != 1:
        raise Mixes
    if rows is None:
        found = [row for each in given if (row := trace.rows(each)) is not None]
        if not found or any(row.outer != 1 for row in found):
            raise Mixes
        return Rows(axes[0])
    is_row = rows.axis < len(indices) and indices[rows.axis] is not None
    if is_row or any(trace.rows(each) is not None for each in given):
        raise Mixes
    return Rows(axes[0], rows.outer)


def _scatter(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    """`gather`, `scatter` and the like along another axis: every row by its own index."""
    (dim,) = _axes(arguments["dim"], dims_of(node))
    tensors = [value for value in arguments.values() if tensor_of(value) is not None]
    found = {trace.rows(value) for value in tensors}
    rows = found.pop()
    if found or rows is None or rows.axis == dim:
        raise Mixes
    return rows


def _normalise(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    source = _source(arguments)
    rows = trace.only(node, source)
    if rows.axis >= dims_of(source) - len(arguments["normalized_shape"]):
        raise Mixes
    return rows


def _group_norm(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    rows = trace.only(node, _source(arguments))
    if rows.axis:
        raise Mixes
    return rows


def _keep(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    return trace.only(node, _source(arguments))


def _linear(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    source = _source(arguments)
    rows = trace.only(node, source)
    if rows.axis == dims_of(source) - 1:
        raise Mixes
    return rows


def _matmul(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    if op_name(node) == "addmm":
        bias, left, right = list(arguments.values())[:3]
        if trace.rows(bias) is not None:
            raise Mixes
    else:
        left, right = list(arguments.values())[:2]
    sides = trace.rows(left), trace.rows(right)
    dims = dims_of(left), dims_of(right)
    summed = dims[0] - 1, max(dims[1] - 2, 0)
    for rows, axis in zip(sides, summed, strict=True):
        if rows is not None and rows.axis == axis:
            raise Mixes("summed over tokens")
    # Axes from the right; a vector's own axis is gone from the result.
    found: set[Rows] = set()
    for at, rows in enumerate(sides):
        if rows is None:
            continue
        from_right = dims[at] - rows.axis
        if dims[1 - at] == 1:
            from_right -= 1
        found.add(Rows(dims_of(node) - from_right, rows.outer))
    if len(found) != 1:
        raise Mixes
    return found.pop()


def _einsum(trace: "RowTrace", node: Node, arguments: dict[str, Any]) -> Rows:
    inputs, arrow, output = arguments["equation"].replace(" ", "").partition("->")
    sides, operands = inputs.split(","), list(arguments["tensors"])
    if not arrow:
        raise Mixes
    found: set[tuple[str, int]] = set()
    width = 0
    for side, operand in zip(sides, operands, strict=True):
        letters = side
        if "..." in side:
            width = dims_of(operand) - len(side) + 3
            letters = side.replace("...", "0123456789"[-width:] if width else "")
        rows = trace.rows(operand)
        if rows is not None:
            found.add((letters[rows.axis], rows.outer))
    output = output.replace("...", "0123456789"[-width:] if width else "")
    if len(found) != 1:
        raise Mixes
    letter, outer = found.pop()
    if letter not in output:
        raise Mixes("summed over tokens")
    return Rows(output.index(letter), outer)


_RULES: list[tuple[Rule, str]] = [
    (_elementwise, "to _to_copy type_as clone contiguous copy fill zero masked_fill where greater"),
    (_elementwise, "greater_equal less less_equal not_equal __and__ __or__ __xor__ floor_divide"),
    (_elementwise, "multiply subtract divide negative hardswish log_sigmoid expand broadcast_to"),
    (_elementwise, "expand_as polar complex"),
    (_getitem, "getitem"),
    (
        _along,
        "softmax _softmax _safe_softmax log_softmax _log_softmax cumsum cumprod cummax cummin",
    ),
    (_along, "logcumsumexp sort argsort topk flip roll glu split split_with_sizes chunk"),
    (_along, "tensor_split slice narrow"),
    (_reduce, "sum mean amax amin max min any all var std var_mean prod argmax argmin logsumexp"),
    (_reduce, "norm linalg_vector_norm median count_nonzero"),
    (_take, "select unbind"),
    (_join, "cat stack concat concatenate"),
    (_reshape, "reshape view _unsafe_view flatten unflatten squeeze view_as reshape_as"),
    (_permute, "permute transpose t mT adjoint"),
    (_unsqueeze, "unsqueeze"),
    (_repeat, "repeat tile"),
    (_repeat_interleave, "repeat_interleave"),
    (_pad, "constant_pad_nd pad"),
    (_look_up, "embedding index_select"),
    (_index, "index"),
    (_scatter, "gather scatter scatter_add scatter_reduce slice_scatter"),
    (_normalise, "layer_norm native_layer_norm rms_norm _fused_rms_norm"),
    (_group_norm, "group_norm native_group_norm"),
    (_keep, "one_hot view_as_real view_as_complex isin prelu"),
    (_linear, "linear"),
    (_matmul, "matmul mm bmm addmm mv"),
    (_einsum, "einsum"),
]
RULES: dict[str, Rule] = {name: rule for rule, names in _RULES for name in names.split()}


def is_elementwise(node: Node) -> bool:
    """Whether torch says that each element of a result comes from one of each operand."""
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return True
    return op_name(node) in ("max", "min") and "other" in arguments_of(node)


def rule_of(node: Node) -> Rule:
    return _elementwise if is_elementwise(node) else RULES.get(op_name(node), _unknown)
