"""Follows the axis of tokens through a graph, and refuses what could carry one to another.

Owns the walk. What each operator does to rows is `row_rules.py`'s.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from runtime.compiling.paging.evaluation import Evaluator
from runtime.compiling.paging.normal import op_name
from runtime.compiling.paging.refusal import NotPageable
from runtime.compiling.paging.row_rules import Mixes, Rows, arguments_of, dims_of, rule_of
from runtime.compiling.paging.shapes import tensor_of

LENGTHS = (5, 11)  # sizes are compared at both; no factor of any other axis's


def check_mixing(live: list[Node], evaluator: Evaluator, originals: set[Node]) -> None:
    """Raises `NotPageable` for the first node of a graph whose attentions are cut out that lets
    tokens meet. `originals` are the graph's own nodes; others were put in by paging."""
    trace = RowTrace(evaluator)
    for node in live:
        if node not in originals or node.op != "call_function" or evaluator.is_fixed(node):
            continue
        try:
            trace.follow(node)
        except Mixes as error:
            detail = f", {error}" if str(error) else ""
            raise NotPageable(
                f"Tokens reach each other by something else than attention ({op_name(node)}"
                f"{detail}), such as a recurrent state, a count of tokens or a convolution over "
                "time, which cannot be cached."
            ) from error


class RowTrace:
    """The `Rows` of every value, node by node in the graph's order."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._lengths = evaluator.lengths
        self._rows: dict[Node, Rows] = {}

    def follow(self, node: Node) -> None:
        """Raises `Mixes`."""
        if not isinstance(node.meta.get("val"), Tensor | list | tuple):
            raise Mixes("a number read from the tokens")
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise Mixes("at random")
        arguments = arguments_of(node)
        rows = rule_of(node)(self, node, arguments)
        if tensor_of(node) is not None:
            if self._lengths.token_axes(node) != [rows.axis]:
                raise Mixes("whose result has tokens elsewhere")
            if any(size % (rows.outer * n) for n, size in self._sizes(node, rows.axis)):
                raise Mixes("which cuts the tokens apart")
        self._rows[node] = rows

    def rows(self, value: Any) -> Rows | None:
        """None for what has no tokens. Raises `Mixes` for pairs of tokens."""
        if not isinstance(value, Node):
            return None
        if value in self._rows:
            return self._rows[value]
        axes = self._lengths.token_axes(value)
        if not axes:
            # A value that comes from tokens and has no axis of them was refused before, but a
            # number for each of a part of the tokens has a size that no length explains.
            return None
        if len(axes) > 1 or any(size != n for n, size in self._sizes(value, axes[0])):
            raise Mixes("of pairs of tokens")
        return Rows(axes[0])

    def only(self, node: Node, value: Any) -> Rows:
        """The rows of one argument, where no other may have any."""
        rows = self.rows(value)
        others = [source for source in self._evaluator.sources(node) if source is not value]
        if rows is None or any(self.rows(source) is not None for source in others):
            raise Mixes
        return rows

    def shape(self, node: Node, num_tokens: int = LENGTHS[1]) -> tuple[int, ...]:
        return self._lengths.shape(node, num_tokens)

    def token_axes(self, node: Node) -> list[int]:
        return self._lengths.token_axes(node)

    def _sizes(self, node: Node, axis: int) -> list[tuple[int, int]]:
        return [(n, self._lengths.shape(node, n)[axis]) for n in LENGTHS]

    def aligned(self, node: Node, values: list[Any]) -> Rows:
        """The rows of a result whose operands broadcast to it."""
        dims = dims_of(node)
        found: set[Rows] = set()
        for value in values:
            rows = self.rows(value)
            if rows is not None:
                found.add(Rows(rows.axis - dims_of(value) + dims, rows.outer))
        if len(found) != 1:
            raise Mixes
        return found.pop()
