"""Tells key and value heads that are copies of each other, and finds what they are copies of.

Owns grouped-query attention in graphs that repeat heads before they attend: only distinct heads
are cached. Copies are found by comparing values, not by recognising how they are made.
"""

import math

import torch
from torch import Tensor, fx
from torch.fx import Node

from runtime.compiling.paging.evaluation import Evaluator
from runtime.compiling.paging.layout import peel
from runtime.compiling.paging.normal import op_name
from runtime.compiling.paging.shapes import tensor_of

aten = torch.ops.aten

MAX_CHAIN = 16
_LAYOUT = frozenset(
    {
        "clone",
        "contiguous",
        "view",
        "_unsafe_view",
        "reshape",
        "expand",
        "broadcast_to",
        "unsqueeze",
        "squeeze",
        "transpose",
        "permute",
        "slice",
        "repeat",
        "repeat_interleave",
        "flatten",
        "unflatten",
        "index",
    }
)


def find_group(keys: Tensor, values: Tensor) -> int:
    """How many neighbouring heads of `[tokens, heads, width]` are copies of one, in both."""
    num_heads = keys.shape[1]
    for group in range(num_heads, 1, -1):
        if num_heads % group == 0 and all(
            torch.equal(operand, operand[:, ::group].repeat_interleave(group, 1))
            for operand in (keys, values)
        ):
            return group
    return 1


def trace_sources(packed: Node) -> list[Node]:
    """What a packed operand was rearranged from, nearest first."""
    chain: list[Node] = []
    node = packed
    for _ in range(MAX_CHAIN):
        source = node.args[0] if node.args else None
        if op_name(node) not in _LAYOUT or not isinstance(source, Node):
            break
        if tensor_of(source) is not None:
            chain.append(source)
        node = source
    return chain


def bypass(
    graph: fx.Graph,
    evaluator: Evaluator,
    packed: Node,
    group: int,
    chain: list[Node],
    values: dict[Node, Tensor],
) -> Node:
    """A node with every `group`-th head of `packed`, taken from before the heads were repeated
    where that can be found, else by slicing."""
    if group == 1:
        return packed
    wanted = values[packed][:, ::group]
    _, num_heads, width = wanted.shape
    for source in reversed(chain):
        order = _find_order(source, wanted, values[source], evaluator)
        if order is not None:
            with graph.inserting_before(packed):
                node, order = peel(source, order)
                if order != list(range(len(order))):
                    node = graph.call_function(aten.permute.default, (node, order))
                return graph.call_function(aten.reshape.default, (node, [-1, num_heads, width]))
    with graph.inserting_after(packed):
        return graph.call_function(aten.slice.Tensor, (packed, 1, 0, 2**62, group))


def _find_order(
    source: Node, wanted: Tensor, value: Tensor, evaluator: Evaluator
) -> list[int] | None:
    """The order of axes in which a value is the wanted `[tokens, heads, width]`."""
    num_tokens, num_heads, width = wanted.shape
    token_axes = evaluator.lengths.token_axes(source)
    if value.numel() != wanted.numel() or len(token_axes) != 1:
        return None
    token = token_axes[0]
    if value.shape[token] != num_tokens:
        return None
    others = [axis for axis in range(value.dim()) if axis != token]
    for feature in others:
        heads = [axis for axis in others if axis != feature]
        if value.shape[feature] != width or math.prod(value.shape[h] for h in heads) != num_heads:
            continue
        order = [token, *heads, feature]
        if torch.equal(value.permute(order).reshape(wanted.shape), wanted):
            return order
    return None
