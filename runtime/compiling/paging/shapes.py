"""Shapes of graph values: which axes follow the number of tokens, and how long they are then."""

from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from runtime.compiling.paging.refusal import NotPageable


def tensor_of(value: Any) -> Tensor | None:
    """The (fake) tensor a node was traced with, if it is one."""
    if isinstance(value, Node):
        value = value.meta.get("val")
    return value if isinstance(value, Tensor) else None


def axes_of(value: Any) -> tuple[sympy.Expr, ...]:
    """The expression of each axis of a node's tensor or of a tensor."""
    tensor = tensor_of(value)
    assert tensor is not None, f"{value} is no tensor"
    return tuple(expression(size) for size in tensor.shape)


def expression(size: Any) -> sympy.Expr:
    """A size as sympy has it; plain numbers become constants."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


class Lengths:
    """Reads shapes in terms of the sequence length, the batch being 1."""

    def __init__(self, tokens: sympy.Symbol, batch: sympy.Symbol | None) -> None:
        self.tokens = tokens
        self._fixed = [(batch, 1)] if batch is not None else []
        self._sizes: dict[tuple[sympy.Expr, int], int] = {}  # substituting is slow

    def at(self, size: Any, num_tokens: int) -> int:
        """A size when the sequence has `num_tokens`."""
        if isinstance(size, int):
            return size
        key = expression(size), num_tokens
        if key not in self._sizes:
            value = key[0].subs([*self._fixed, (self.tokens, num_tokens)])
            if value.free_symbols or not value.is_Integer:
                raise NotPageable("The shape of a value depends on the tokens' contents.")
            self._sizes[key] = int(value)  # type: ignore[arg-type]
        return self._sizes[key]

    def shape(self, node: Node, num_tokens: int) -> tuple[int, ...]:
        """A tensor's shape at a length."""
        tensor = tensor_of(node)
        assert tensor is not None, f"{node} is no tensor"
        return tuple(self.at(size, num_tokens) for size in tensor.shape)

    def token_axes(self, node: Node) -> list[int]:
        """The axes whose length follows the number of tokens."""
        tensor = tensor_of(node)
        if tensor is None:
            return []
        return [axis for axis, size in enumerate(tensor.shape) if self.varies(size)]

    def varies(self, size: Any) -> bool:
        """Whether a size follows the number of tokens, and does not just mention it."""
        if self.tokens not in expression(size).free_symbols:
            return False
        return self.at(size, 5) != self.at(size, 11)

    def is_tokens(self, size: sympy.Expr) -> bool:
        """Whether an axis is exactly as long as the sequence."""
        return bool(size.subs(self._fixed) == self.tokens)
