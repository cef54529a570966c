"""Brings an attention's operands from a graph's own layout to packed rows, and its output back.

Owns axes and head counts. Packed is `[tokens, heads, head_dim]`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from runtime.compiling.paging.normal import op_name
from runtime.compiling.paging.refusal import NotPageable
from runtime.compiling.paging.shapes import Lengths, tensor_of
from runtime.compiling.paging.sites import Operand, Site

aten = torch.ops.aten


@dataclass(frozen=True)
class Heads:
    """Head counts of one site before copies of key and value heads are told apart. `full` are
    the sizes of the head axes of the scores, whose product is the number of query heads."""

    num_heads: int
    num_kv_heads: int
    full: tuple[int, ...]
    key_width: int
    value_width: int
    is_broadcast: bool  # key and value heads broadcast by axis, and do not serve runs


def read_heads(site: Site, lengths: Lengths) -> Heads:
    """Raises `NotPageable` for shapes that no attention over heads has."""
    query = head_sizes(site.query, site.heads, lengths)
    key = head_sizes(site.key, site.heads, lengths)
    value = head_sizes(site.value, site.value_heads, lengths)
    if site.fused is not None:
        full = query  # key and value may have fewer heads, each for a run of query heads
        counts = math.prod(full), math.prod(key), math.prod(value)
        is_grouped = counts[0] % counts[1] == 0 and counts[1] == counts[2]
        num_kv_heads = counts[1]
    else:
        full = tuple(max(pair) for pair in zip(query, key, strict=True))
        num_kv_heads = max(kept_heads(key, full), kept_heads(value, _full_value(value, full)))
        is_grouped = True
    if not is_grouped:
        raise NotPageable("An attention's heads do not divide into groups.")
    return Heads(
        num_heads=math.prod(full),
        num_kv_heads=num_kv_heads,
        full=full,
        key_width=width(site.key, lengths),
        value_width=width(site.value, lengths),
        is_broadcast=site.fused is None,
    )


def head_sizes(operand: Operand, heads: str, lengths: Lengths) -> tuple[int, ...]:
    """The sizes of an operand's head axes in the order of `heads`; 1 where it broadcasts."""
    shape = dict(zip(operand.axes, lengths.shape(operand.node, 1), strict=True))
    longer = dict(zip(operand.axes, lengths.shape(operand.node, 2), strict=True))
    if any(shape[axis] != longer[axis] for axis in heads if axis in shape):
        raise NotPageable("The number of an attention's heads depends on the number of tokens.")
    return tuple(shape.get(axis, 1) for axis in heads)


def width(operand: Operand, lengths: Lengths) -> int:
    """The size of an operand's feature axis."""
    return lengths.shape(operand.node, 1)[operand.axes.index(operand.feature)]


def kept_heads(own: tuple[int, ...], full: tuple[int, ...]) -> int:
    """How many heads an operand has of its own, if each serves a run of neighbours; else all."""
    for at in range(len(full) + 1):
        if own[:at] == full[:at] and all(size == 1 for size in own[at:]):
            return math.prod(own)
    return math.prod(full)


def _full_value(own: tuple[int, ...], full: tuple[int, ...]) -> tuple[int, ...]:
    return full if len(own) == len(full) else own


class Packer:
    """Inserts packed forms of operands into a graph."""

    def __init__(self, graph: fx.Graph, lengths: Lengths) -> None:
        self._graph = graph
        self._lengths = lengths

    def pack(self, operand: Operand, heads: str, full: tuple[int, ...], num_heads: int) -> Node:
        """A node `[tokens, n, width]` where n is `num_heads` or a divisor of it."""
        present = [axis for axis in heads if axis in operand.axes]
        own = head_sizes(operand, heads, self._lengths)
        node = operand.node
        axes = operand.axes
        if len(own) == len(full) and kept_heads(own, full) != math.prod(own):
            node, axes, present = self._expand(node, axes, operand, heads, full)
            own = full
        order = [axes.index(axis) for axis in [operand.token, *present, operand.feature]]
        node, order = peel(node, order)
        count = math.prod(own)
        size = width(operand, self._lengths)
        if order != list(range(len(order))):
            node = self.call(aten.permute.default, node, order)
        node = self.call(aten.reshape.default, node, [-1, count, size])
        assert num_heads % count == 0, "heads divide"
        return node

    def pack_copies(self, operand: Operand, heads: str, counts: "Heads", num_heads: int) -> Node:
        """As `pack`, with heads repeated until there are `num_heads`."""
        own = head_sizes(operand, heads, self._lengths)
        full = counts.full if counts.is_broadcast and len(own) == len(counts.full) else own
        node = self.pack(operand, heads, full, counts.num_heads)
        shape = node.args[1]
        assert isinstance(shape, list | tuple), "a packed operand is a reshape"
        count = shape[1]
        if count == num_heads:
            return node
        return self.call(aten.repeat_interleave.self_int, node, num_heads // count, 1)  # type: ignore[operator]

    def pad(self, node: Node, missing: int) -> Node:
        """Zeros behind the last axis, so that keys and values have one width."""
        if not missing:
            return node
        return self.call(aten.constant_pad_nd.default, node, [0, missing])

    def convert(self, node: Node, source: Node, dtype: torch.dtype) -> Node:
        """In the dtype that keys and values are stored in, which is the model's."""
        tensor = tensor_of(source)
        if tensor is None or tensor.dtype == dtype:
            return node
        return self.call(aten.to.dtype, node, dtype)

    def restore(self, node: Node, output: Node, dtype: torch.dtype) -> Node:
        """From the model's dtype to that of the output that is replaced."""
        tensor = tensor_of(output)
        if tensor is None or tensor.dtype == dtype:
            return node
        return self.call(aten.to.dtype, node, tensor.dtype)

    def _expand(
        self, node: Node, axes: str, operand: Operand, heads: str, full: tuple[int, ...]
    ) -> tuple[Node, str, list[str]]:
        """Copies heads where an axis broadcasts that is not the last one."""
        missing = "".join(axis for axis in heads if axis not in axes)
        for _ in missing:
            node = self.call(aten.unsqueeze.default, node, 0)
        axes = missing[::-1] + axes
        sizes = dict(zip(heads, full, strict=True))
        node = self.call(aten.expand.default, node, [sizes.get(axis, -1) for axis in axes])
        return node, axes, list(heads)

    def unpack(self, node: Node, site: Site, heads: Heads) -> Node:
        """`[tokens, heads, value_width]` in the layout of the site's own output."""
        shape = self._lengths.shape(site.output, 1)
        sizes = dict(zip(site.output_axes, shape, strict=True))
        order = "q" + site.value_heads + "d"
        head_axes = [sizes.get(axis, 1) for axis in site.value_heads]
        if math.prod(head_axes) != heads.num_heads:
            raise NotPageable("An attention's output has another number of heads than its scores.")
        node = self.call(aten.reshape.default, node, [-1, *head_axes, heads.value_width])
        back = [order.index(axis) for axis in site.output_axes]
        if back != list(range(len(back))):
            node = self.call(aten.permute.default, node, back)
        return node

    def call(self, target: Any, *args: Any) -> Node:
        return self._graph.call_function(target, args)


def peel(node: Node, order: list[int]) -> tuple[Node, list[int]]:
    """Looks through transpositions and copies: `node` permuted by `order` is the node that is
    returned permuted by the order that is returned."""
    while True:
        source = node.args[0] if node.args else None
        if not isinstance(source, Node) or node.op != "call_function":
            return node, order
        name = op_name(node)
        if name in ("clone", "contiguous"):
            node = source
            continue
        tensor = tensor_of(source)
        if tensor is None:
            return node, order
        dims = list(range(tensor.dim()))
        if name == "transpose":
            first, second = (int(dim) % len(dims) for dim in node.args[1:3])  # type: ignore[arg-type]
            dims[first], dims[second] = dims[second], dims[first]
        elif name == "permute":
            dims = [int(dim) % len(dims) for dim in node.args[1]]  # type: ignore[union-attr, arg-type]
        else:
            return node, order
        node, order = source, [dims[at] for at in order]
