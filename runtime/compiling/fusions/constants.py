"""Computes once what depends on weights alone, as `1 + weight` of a norm.

Only small results are kept: a transposed copy of a large weight would double it.
"""

from torch import fx

from runtime.compiling.fusions.cleaning import RANDOM
from runtime.compiling.fusions.evaluated import EvaluatedGraph, op_name

MAX_ELEMENTS = 1 << 16


def constant_nodes(graph: EvaluatedGraph) -> set[fx.Node]:
    """All nodes whose values depend on no input."""
    constant: set[fx.Node] = set()
    for node in graph.graph.nodes:
        is_source = node.op == "get_attr"
        is_pure = node.op in ("call_function", "call_method") and op_name(node) not in RANDOM
        if is_source or (is_pure and all(each in constant for each in node.all_input_nodes)):
            constant.add(node)
    return constant


def fold_constants(graph: EvaluatedGraph) -> int:
    """Returns how many values became buffers."""
    constant = constant_nodes(graph)
    num_folded = 0
    for node in list(graph.graph.nodes):
        if node not in constant or node.op == "get_attr":
            continue
        if all(user in constant for user in node.users):
            continue
        value = graph.tensor(node)
        if value is None or graph.shape(node) != tuple(value.shape):
            continue
        if value.numel() > MAX_ELEMENTS:
            continue
        new = graph.constant(node, value.detach().clone())
        num_folded += graph.replace(node, new)
    graph.drop_dead()
    return num_folded
