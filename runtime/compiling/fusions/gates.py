"""Makes `activation(gate) * up` one operation where gate and up are halves of one tensor."""

from typing import Any

from torch import fx

from runtime.compiling.fusions.activations import activation_of
from runtime.compiling.fusions.cleaning import slice_arguments
from runtime.compiling.fusions.evaluated import EvaluatedGraph, op_name
from runtime.execution import ops


def fuse_gates(graph: EvaluatedGraph) -> int:
    """Returns how many were fused."""
    num_fused = 0
    for node in list(graph.graph.nodes):
        if op_name(node) == "mul" and len(node.args) == 2 and node.users:
            one, other = node.args
            num_fused += _fuse(graph, node, one, other) or _fuse(graph, node, other, one)
    graph.drop_dead()
    return num_fused


def _fuse(graph: EvaluatedGraph, product: fx.Node, activated: Any, up: Any) -> bool:
    if not isinstance(activated, fx.Node) or not isinstance(up, fx.Node):
        return False
    activation = activation_of(activated)
    gate = activated.args[0] if activation else None
    if not isinstance(gate, fx.Node):
        return False
    first, second = _part(graph, gate), _part(graph, up)
    if first is None or second is None or first[0] is not second[0]:
        return False
    whole, start, size = first
    if start != 0 or second[1:] != (size, size) or graph.shape(whole) != (-1, 2 * size):
        return False
    return graph.replace(product, graph.call(product, ops.gated, whole, activation))


def _part(graph: EvaluatedGraph, node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(whole, start, size) of a part of the last axis."""
    name = op_name(node)
    if name not in ("narrow", "slice") or not isinstance(node.args[0], fx.Node):
        return None
    shape = graph.shape(node)
    if shape is None:
        return None
    if name == "narrow":
        dim, start, _ = node.args[1:4]
    else:
        arguments = slice_arguments(node)
        if arguments is None or arguments[3] != 1:
            return None
        dim, start = arguments[:2]
    if not isinstance(dim, int) or not isinstance(start, int):
        return None
    is_last = dim % len(shape) == len(shape) - 1
    return (node.args[0], start, shape[-1]) if is_last else None
