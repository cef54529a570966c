"""Reads matrix products as sums over named axes, whatever operator spells them.

`matmul`, `bmm` and two-operand `einsum` become one form: a letter for every axis, as in
`bhqd,bhkd->bhqk`.
"""

import string
from dataclasses import dataclass

import torch
from torch.fx import Node

from runtime.compiling.paging.normal import op_name
from runtime.compiling.paging.refusal import NotPageable
from runtime.compiling.paging.shapes import axes_of

aten = torch.ops.aten

PRODUCTS = frozenset({"matmul", "bmm", "einsum", "mm", "linear", "addmm"})


@dataclass(frozen=True)
class Contraction:
    """A product of two nodes; an axis of size 1 that broadcasts keeps its letter."""

    node: Node
    left: Node
    right: Node
    left_axes: str
    right_axes: str
    out_axes: str

    def side(self, node: Node) -> tuple[str, Node, str]:
        """(axes of `node`, the other operand, the other's axes)."""
        if self.left is node:
            return self.left_axes, self.right, self.right_axes
        return self.right_axes, self.left, self.left_axes


def is_product(node: Node) -> bool:
    """Whether a node is a matrix product of any kind."""
    return node.op == "call_function" and op_name(node) in PRODUCTS


def read_contraction(node: Node) -> Contraction:
    """Raises `NotPageable` for products that attention is not written with."""
    name = op_name(node)
    if name == "einsum":
        return _read_einsum(node)
    if name not in ("matmul", "bmm", "mm"):
        raise NotPageable(f"Attention is computed with {name}, which is not understood.")
    left, right = node.args[:2]
    assert isinstance(left, Node), "a product of tensors"
    assert isinstance(right, Node), "a product of tensors"
    left_dims, right_dims = len(axes_of(left)), len(axes_of(right))
    if left_dims < 2 or right_dims < 2:
        raise NotPageable("Attention is computed with vectors, which is not understood.")
    batch = string.ascii_lowercase[: max(left_dims, right_dims) - 2]
    return Contraction(
        node=node,
        left=left,
        right=right,
        left_axes=batch[len(batch) - (left_dims - 2) :] + "XY",
        right_axes=batch[len(batch) - (right_dims - 2) :] + "YZ",
        out_axes=batch + "XZ",
    )


def _read_einsum(node: Node) -> Contraction:
    equation, operands = node.args[:2]
    assert isinstance(equation, str), "einsum's schema"
    assert isinstance(operands, list | tuple), "einsum's schema"
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    sides = inputs.split(",")
    if len(sides) != 2 or not arrow or "." in equation:
        raise NotPageable(f"The einsum {equation!r} in the attention is not understood.")
    left, right = operands
    assert isinstance(left, Node), "a product of tensors"
    assert isinstance(right, Node), "a product of tensors"
    return Contraction(node, left, right, sides[0], sides[1], output)
