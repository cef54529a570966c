"""Rotates a query and its key in one call where both are parts of one product."""

from dataclasses import dataclass

from torch import fx

from runtime.compiling.fusions.evaluated import EvaluatedGraph
from runtime.compiling.fusions.views import chain_of, is_view, view_plan
from runtime.execution import ops


@dataclass(frozen=True)
class HeadsPart:
    """`rotated` turns the heads at columns `start` to `start + size` of `product` `[tokens, n]`."""

    rotated: fx.Node
    product: fx.Node
    start: int
    size: int
    num_heads: int
    head_dim: int


def join_rotations(graph: EvaluatedGraph) -> int:
    """Returns how many calls were saved."""
    num_joined = 0
    waiting: dict[tuple[object, ...], HeadsPart] = {}
    for node in list(graph.graph.nodes):
        part = _part(graph, node) if node.target is ops.rotate else None
        if part is None:
            continue
        key = (part.product, part.head_dim, *node.args[1:])
        first = waiting.pop(key, None)
        if first is None:
            waiting[key] = part
        else:
            num_joined += _join(graph, *sorted((first, part), key=lambda each: each.start))
    graph.drop_dead()
    return num_joined


def _part(graph: EvaluatedGraph, node: fx.Node) -> HeadsPart | None:
    heads = node.args[0]
    shape = graph.shape(node)
    if shape is None or not isinstance(heads, fx.Node) or not is_view(graph, heads):
        return None
    chain = chain_of(graph, heads)
    plan, product = view_plan(graph, chain), chain[0].args[0]
    if plan is None or len(plan.axes) != 2 or plan.order != (0, 1) or plan.shape != shape:
        return None
    tokens, columns = plan.axes
    if not isinstance(product, fx.Node) or tokens.full != -1:
        return None
    if graph.shape(product) != (-1, columns.full) or not graph.is_dense(product):
        return None
    return HeadsPart(node, product, columns.start, columns.size, shape[1], shape[2])


def _join(graph: EvaluatedGraph, one: HeadsPart, other: HeadsPart) -> bool:
    if one.start + one.size != other.start:
        return False
    pair = (one.rotated, other.rotated)
    # After the product and the angles, before whatever reads either part.
    first = next(node for node in graph.graph.nodes if node in pair)
    size, num_heads = one.size + other.size, one.num_heads + other.num_heads
    piece = graph.call(first, "narrow", one.product, 1, one.start, size)
    heads = graph.call(first, "reshape", piece, -1, num_heads, one.head_dim)
    both = graph.call(first, ops.rotate, heads, *one.rotated.args[1:])
    parts = (
        graph.call(first, "narrow", both, 1, 0, one.num_heads),
        graph.call(first, "narrow", both, 1, one.num_heads, other.num_heads),
    )
    if not all(graph.is_same(old, new) for old, new in zip(pair, parts, strict=True)):
        return False
    for old, new in zip(pair, parts, strict=True):
        old.replace_all_uses_with(new, propagate_meta=False)
    return True
