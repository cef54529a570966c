"""Replaces what a graph computes from its length alone by tables indexed with positions.

Owns the search for such values, the check that a row does not depend on the length, and the
longest context for which all that holds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

from runtime.compiling.paging.evaluation import Evaluator
from runtime.compiling.paging.normal import op_name
from runtime.compiling.paging.refusal import NotPageable
from runtime.compiling.paging.scores import TooLong, evaluate
from runtime.compiling.paging.shapes import tensor_of

aten = torch.ops.aten

MAX_TABLE_BYTES = 256 * 1024**2
PROBES = (3, 7)  # lengths at which a row must be the same
USEFUL_TOKENS = 64  # a context shorter than this is no context but a refusal
# Operators that may take the number of tokens as a number: it shapes their result, no more.
_SHAPED = frozenset(
    {
        "view",
        "_unsafe_view",
        "reshape",
        "expand",
        "slice",
        "unflatten",
        "broadcast_to",
        "repeat",
        "split_with_sizes",
        "as_strided",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
    }
)


@dataclass
class Frontier:
    """Values that depend on the length alone and that the rest of the graph reads."""

    tables: list[Node] = field(default_factory=list)  # with one token axis
    constants: list[Node] = field(default_factory=list)  # with none
    # Tables that are indices, and how many rows they index into.
    num_rows: dict[Node, int] = field(default_factory=dict)


def find_frontier(live: list[Node], evaluator: Evaluator) -> Frontier:
    """Raises `NotPageable` for a value that depends on the length in any other way."""
    frontier = Frontier()
    is_live = set(live)
    for node in live:
        if node.op == "get_attr" or not evaluator.is_fixed(node):
            continue
        readers = [user for user in node.users if user in is_live and not evaluator.is_fixed(user)]
        readers = [user for user in readers if node in evaluator.sources(user)]
        if not readers:
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            _check_readers(node, readers, value)
            continue
        axes = evaluator.lengths.token_axes(node)
        if len(axes) > 1:
            raise NotPageable(
                "A table over pairs of tokens is used outside of attention, so tokens are mixed in "
                "a way that is not understood."
            )
        (frontier.tables if axes else frontier.constants).append(node)
        for reader in readers:
            if op_name(reader) == "embedding" and reader.args[1] is node:
                rows = evaluator.lengths.shape(reader.args[0], 1)[0]  # type: ignore[arg-type]
                frontier.num_rows[node] = min(rows, frontier.num_rows.get(node, rows))
    return frontier


def _check_readers(node: Node, readers: list[Node], value: Any) -> None:
    is_number = not isinstance(value, torch.SymInt) or not value.node.expr.free_symbols
    for reader in readers:
        if op_name(reader) not in _SHAPED and not is_number:
            raise NotPageable(
                f"The number of tokens enters the computation itself ({op_name(reader)}), so "
                "results would depend on what else is in a step."
            )


def find_context(
    frontier: Frontier,
    evaluator: Evaluator,
    limit: int,
    check_length: Callable[[int], None],
) -> int:
    """The longest context up to `limit` for which every table has rows that do not depend on the
    length. Raises `NotPageable` if that is no useful length."""
    nodes = [*frontier.tables, *frontier.constants]
    try:
        rows = [evaluate(evaluator, nodes, length, False) for length in PROBES]
    except TooLong as error:
        raise NotPageable(
            f"The graph's tables cannot be evaluated at {PROBES[-1]} tokens: {error}."
        ) from error
    if not _agree(nodes, rows[0], rows[1], evaluator):
        raise _length_dependent()

    def holds(length: int) -> bool:
        try:
            check_length(length)
            tables = evaluate(evaluator, nodes, length, False)
        except TooLong:
            return False
        indices = dict(zip(nodes, tables, strict=True))
        is_inside = all(
            int(indices[node].max()) < num_rows for node, num_rows in frontier.num_rows.items()
        )
        return (
            is_inside
            and _agree(nodes, rows[1], tables, evaluator)
            and _agree_far(nodes, length, evaluator)
        )

    limit = min(limit, _affordable(frontier, evaluator))
    if holds(limit):
        return limit
    low, high = PROBES[-1], limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    if low < min(USEFUL_TOKENS, limit):
        raise _length_dependent()
    return low


def _length_dependent() -> NotPageable:
    return NotPageable(
        "The encoding of a position depends on the length of the sequence, so keys cached earlier "
        "would be wrong later."
    )


def _affordable(frontier: Frontier, evaluator: Evaluator) -> int:
    row_bytes = 0
    for node in frontier.tables:
        tensor = tensor_of(node)
        assert tensor is not None, "tables are tensors"
        numel = 1
        for size in evaluator.lengths.shape(node, 1):
            numel *= size
        row_bytes += numel * tensor.dtype.itemsize
    return MAX_TABLE_BYTES // max(row_bytes, 1)


def _agree(nodes: list[Node], short: list[Any], long: list[Any], evaluator: Evaluator) -> bool:
    """Whether the rows that both lengths have are the same but for the last bit or two."""
    for node, before, after in zip(nodes, short, long, strict=True):
        axes = evaluator.lengths.token_axes(node)
        if axes:
            after = after.narrow(axes[0], 0, before.shape[axes[0]])
        if before.is_floating_point():
            # What is seen wide may still hold constants that are float32.
            eps = max(torch.finfo(before.dtype).eps, torch.finfo(torch.float32).eps)
            allowed = 4 * eps * before.double().abs().clamp(min=1.0)
            if not ((before.double() - after.double()).abs() <= allowed).all():
                return False
        elif not torch.equal(before, after):
            return False
    return True


def _agree_far(nodes: list[Node], length: int, evaluator: Evaluator) -> bool:
    """Whether all rows at a length are those of shorter sequences, seen wide: what a half dtype
    rounds away in the first rows, later ones have."""
    lengths = sorted({max(length // 2, 1), max(length - 1, 1)})
    try:
        longest = evaluate(evaluator, nodes, length, True)
        return all(
            _agree(nodes, evaluate(evaluator, nodes, shorter, True), longest, evaluator)
            for shorter in lengths
        )
    except TooLong:
        return False


class TableWriter:
    """Puts tables of one context length into a graph."""

    def __init__(
        self, module: GraphModule, evaluator: Evaluator, positions: Node, context: int
    ) -> None:
        self._module = module
        self._evaluator = evaluator
        self._positions = positions
        self._context = context
        self._rows: list[tuple[Tensor, Node]] = []  # tables already in the graph
        self._restored: dict[tuple[Node, tuple[int, ...]], Node] = {}

    def replace(self, frontier: Frontier) -> None:
        """Every table becomes a look-up of the step's positions."""
        nodes = [*frontier.tables, *frontier.constants]
        values = evaluate(self._evaluator, nodes, self._context, False)
        graph: fx.Graph = self._module.graph
        for node, value in zip(nodes, values, strict=True):
            axes = self._evaluator.lengths.token_axes(node)
            if not axes:
                with graph.inserting_before(node):
                    constant = self._constant(value)
                node.replace_all_uses_with(constant)
                continue
            rows = self._look_up(value.movedim(axes[0], 0))
            node.replace_all_uses_with(self._restore(graph, rows, value, axes[0]))

    def _restore(self, graph: fx.Graph, rows: Node, value: Tensor, axis: int) -> Node:
        """Looked-up rows `[tokens, ...]` in the layout of the value they replace."""
        shape = list(value.shape)
        shape[axis] = -1
        key = rows, tuple(shape)
        if key not in self._restored:
            with graph.inserting_after(rows):
                if all(size == 1 for size in shape[:axis]):
                    back = graph.call_function(aten.reshape.default, (rows, shape))
                else:
                    order = [*range(1, axis + 1), 0, *range(axis + 1, value.dim())]
                    back = graph.call_function(aten.permute.default, (rows, order))
            self._restored[key] = back
        return self._restored[key]

    def _look_up(self, table: Tensor) -> Node:
        """A node with the rows of `table` `[context, ...]`, flat but for their last axis."""
        if table.dim() > 1 and table[0].numel() == table.shape[-1]:
            table = table.reshape(table.shape[0], table.shape[-1])
        for known, node in self._rows:
            if known.dtype == table.dtype and torch.equal(known, table):
                return node
        graph = self._module.graph
        table = table.contiguous().clone()
        with graph.inserting_after(self._positions):
            source = self._constant(table)
        with graph.inserting_after(source):
            node = graph.call_function(aten.index_select.default, (source, 0, self._positions))
        self._rows.append((table, node))
        return node

    def _constant(self, value: Tensor) -> Node:
        at = sum(1 for name, _ in self._module.named_buffers() if name.startswith("table_"))
        name = f"table_{at}"
        self._module.register_buffer(name, value, persistent=False)
        return self._module.graph.get_attr(name)
