"""Recognises RMSNorm and LayerNorm, named or spelled out, and makes each one operation.

The sum that a norm reads is then fused into it, where the sum is also the next residual.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from runtime.compiling.fusions.constants import constant_nodes
from runtime.compiling.fusions.evaluated import EvaluatedGraph, op_name
from runtime.compiling.fusions.regions import CASTS, is_widening
from runtime.execution import ops


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis of `source`, whose result is `output`."""

    source: fx.Node
    output: fx.Node
    eps: float
    is_centered: bool
    weight: fx.Node | None = None
    bias: fx.Node | None = None


def fuse_norms(graph: EvaluatedGraph) -> int:
    """Returns how many norms became one operation."""
    constants = constant_nodes(graph)
    num_fused = 0
    for node in list(graph.graph.nodes):
        if node not in graph.values or not node.users:
            continue
        candidates = _named(graph, node) or _spelled_out(graph, node, constants)
        num_fused += any(_emit(graph, norm) for norm in candidates)
    graph.drop_dead()
    return num_fused


def fuse_residuals(graph: EvaluatedGraph) -> int:
    """Returns how many sums went into the norm that reads them."""
    num_fused = 0
    for node in list(graph.graph.nodes):
        if node.target in (ops.rms_norm, ops.layer_norm) and node.args[-1] is None:
            num_fused += _fuse_residual(graph, node)
    graph.drop_dead()
    return num_fused


def _named(graph: EvaluatedGraph, node: fx.Node) -> list[Norm]:
    """A norm that is one operator already."""
    name = op_name(node)
    if name not in ("layer_norm", "rms_norm") or node.target in (ops.rms_norm, ops.layer_norm):
        return []
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    names = names if name == "layer_norm" else (*names[:3], "eps")
    values: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    source = values["input"]
    value = graph.tensor(source)
    if value is None or len(values["normalized_shape"]) != 1:
        return []
    eps = values.get("eps")
    wide = torch.promote_types(value.dtype, torch.float32)  # torch's own default is of that dtype
    default = 1e-5 if name == "layer_norm" else torch.finfo(wide).eps
    weight, bias = values.get("weight"), values.get("bias")
    eps = default if eps is None else eps
    return [Norm(source, node, eps, name == "layer_norm", weight, bias)]


def _spelled_out(graph: EvaluatedGraph, node: fx.Node, constants: set[fx.Node]) -> list[Norm]:
    """`c * rsqrt(mean(c * c) + eps)` and what scales it, longest first; c is x or x - mean(x)."""
    scaled = _scaled_by_root(node)
    if scaled is None:
        return []
    centered, inside = scaled
    found = _mean_of_square(graph, inside)
    if found is None or found[0] is not centered:
        return []
    source, is_centered = centered, False
    if op_name(centered) == "sub" and len(centered.args) == 2 and not centered.kwargs:
        whole, mean = centered.args
        if isinstance(whole, fx.Node) and isinstance(mean, fx.Node):
            is_centered = _mean_over_last(graph, mean) is whole
            source = whole if is_centered else source
    norm = Norm(source, node, found[1], is_centered)
    narrow = source.args[0] if op_name(source) in CASTS else None
    found_norms: list[Norm] = []
    for each in reversed(list(_scalings(graph, norm, constants))):
        for start in (narrow, source):
            value = graph.tensor(start) if isinstance(start, fx.Node) else None
            output = graph.tensor(each.output)
            if value is None or output is None or value.dtype != output.dtype:
                continue
            assert isinstance(start, fx.Node)
            if start is narrow and not is_widening(graph, [source], value.dtype):
                continue
            found_norms.append(replace(each, source=start))
    return found_norms


def _scaled_by_root(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(c, v) of `c * rsqrt(v)` or `c / sqrt(v)`."""
    if op_name(node) not in ("mul", "div") or len(node.args) != 2 or node.kwargs:
        return None
    one, other = node.args
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        return None
    if op_name(node) == "div":
        return (one, other.args[0]) if _is_root(other, 0.5) else None  # pyright: ignore[reportReturnType]
    for value, root in ((one, other), (other, one)):
        if _is_root(root, -0.5):
            return value, root.args[0]  # pyright: ignore[reportReturnType]
    return None


def _is_root(node: fx.Node, exponent: float) -> bool:
    name = op_name(node)
    if name == "pow" and len(node.args) == 2 and node.args[1] == exponent:
        return True
    return name == ("sqrt" if exponent > 0 else "rsqrt")


def _mean_of_square(graph: EvaluatedGraph, node: fx.Node) -> tuple[fx.Node, float] | None:
    """(c, eps) of `mean(c * c, -1) + eps`."""
    if op_name(node) != "add" or len(node.args) != 2 or node.kwargs:
        return None
    mean, eps = node.args if isinstance(node.args[0], fx.Node) else reversed(node.args)
    if not isinstance(mean, fx.Node):
        return None
    if isinstance(eps, fx.Node):
        value = graph.tensor(eps)
        if value is None or value.numel() != 1 or eps.op != "get_attr":
            return None
        eps = value.item()
    square = _mean_over_last(graph, mean)
    if square is None or not isinstance(eps, (int, float)):
        return None
    is_square = op_name(square) == "square" or (
        op_name(square) == "pow" and square.args[1] in (2, 2.0)
    )
    is_square = is_square or (op_name(square) == "mul" and square.args[0] is square.args[1])
    centered = square.args[0]
    return (centered, float(eps)) if is_square and isinstance(centered, fx.Node) else None


def _mean_over_last(graph: EvaluatedGraph, node: fx.Node) -> fx.Node | None:
    """x of `mean(x, -1, keepdim=True)`."""
    if op_name(node) != "mean" or not isinstance(node.args[0], fx.Node):
        return None
    before, after = graph.shape(node.args[0]), graph.shape(node)
    dims: Any = (*node.args[1:], node.kwargs.get("dim"))[0]
    if before is None or after is None or dims is None:
        return None
    dims = [dims] if isinstance(dims, int) else list(dims)
    is_last = [dim % len(before) for dim in dims] == [len(before) - 1]
    return node.args[0] if is_last and after == (*before[:-1], 1) else None


def _scalings(graph: EvaluatedGraph, norm: Norm, constants: set[fx.Node]) -> Iterator[Norm]:
    """The norm, and the same with each further cast, weight and bias taken in."""
    yield norm
    shape = graph.shape(norm.output)
    while len(norm.output.users) == 1 and shape is not None:
        user = next(iter(norm.output.users))
        name = op_name(user)
        if name in CASTS:
            norm = replace(norm, output=user)
        elif name in ("mul", "add") and len(user.args) == 2 and not user.kwargs:
            other: Any = user.args[1] if user.args[0] is norm.output else user.args[0]
            is_vector = isinstance(other, fx.Node) and graph.shape(other) == shape[-1:]
            if not is_vector or other not in constants:
                return
            if name == "mul" and norm.weight is None and norm.bias is None:
                norm = replace(norm, output=user, weight=other)
            elif name == "add" and norm.is_centered and norm.bias is None:
                norm = replace(norm, output=user, bias=other)
            else:
                return
        else:
            return
        if graph.shape(norm.output) != shape:
            return
        yield norm


def _emit(graph: EvaluatedGraph, norm: Norm) -> bool:
    output, source = norm.output, norm.source
    shape = graph.shape(source)
    if shape is None or len(shape) < 2 or not graph.is_dense(source):
        return False
    is_wide = len(shape) > 3
    rows = graph.call(output, "reshape", source, -1, shape[-1]) if is_wide else source
    if norm.is_centered:
        args = (rows, norm.weight, norm.bias, norm.eps, None)
        both = graph.call(output, ops.layer_norm, *args)
    else:
        both = graph.call(output, ops.rms_norm, rows, norm.weight, norm.eps, 0.0, None)
    new = graph.call(output, operator.getitem, both, 0)
    if is_wide:
        if shape.count(-1) > 1:
            return False
        new = graph.call(output, "reshape", new, shape)
    return graph.replace(output, new)


def _fuse_residual(graph: EvaluatedGraph, node: fx.Node) -> bool:
    total = node.args[0]
    if not isinstance(total, fx.Node) or op_name(total) != "add" or total.kwargs:
        return False
    if len(total.args) != 2 or not all(isinstance(each, fx.Node) for each in total.args):
        return False
    shape = graph.shape(total)
    values = [graph.tensor(each) for each in (total, *total.all_input_nodes)]
    dtypes = {value.dtype for value in values if value is not None}
    if any(graph.shape(each) != shape for each in total.all_input_nodes) or len(dtypes) != 1:
        return False
    if shape is None or len(shape) != 2:
        return False
    one, other = total.args
    for weight in node.all_input_nodes[1:]:
        if weight.op != "get_attr":
            return False
        total.prepend(weight)
    assert callable(node.target)
    both = graph.call(total, node.target, one, *node.args[1:-1], other)
    normed = graph.call(total, operator.getitem, both, 0)
    summed = graph.call(total, operator.getitem, both, 1)
    outputs = [user for user in node.users if user.target is operator.getitem]
    is_same = graph.is_same(total, summed) and all(
        user.args[1] == 0 and graph.is_same(user, normed) for user in outputs
    )
    if not is_same:
        return False
    for user in outputs:
        user.replace_all_uses_with(normed, propagate_meta=False)
    total.replace_all_uses_with(summed, propagate_meta=False)
    return True
