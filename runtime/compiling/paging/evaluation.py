"""Evaluates parts of a graph, so that what they compute is seen instead of guessed.

Owns the question which values depend on nothing but the sequence's length, and running any
part of a graph with chosen values put in. A wide run is in float64 wherever the model's own
floating dtype stands, so that a constant is seen as it was meant and not as it was rounded.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg

from runtime.compiling.paging.copying import attribute
from runtime.compiling.paging.normal import DecoderGraph, op_name, slice_arguments
from runtime.compiling.paging.refusal import NotPageable
from runtime.compiling.paging.shapes import Lengths, tensor_of

# Operators that read only the shape of their first argument.
_SHAPE_READERS = frozenset(
    {
        "sym_size",
        "sym_numel",
        "ones_like",
        "zeros_like",
        "full_like",
        "empty_like",
        "new_ones",
        "new_zeros",
        "new_full",
        "new_empty",
    }
)
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)


class Evaluator:
    """Runs nodes of one normalised graph (or of a rewritten copy of it)."""

    def __init__(self, decoder: DecoderGraph) -> None:
        self.lengths = Lengths(decoder.tokens, decoder.batch)
        self.dtype = decoder.dtype
        self._root = decoder.module
        self._is_fixed: dict[Node, bool] = {}
        self._wide: dict[str, Tensor] = {}

    def is_fixed(self, node: Node) -> bool:
        """Whether a value depends on nothing but the number of tokens."""
        pending = [node]
        while pending:
            current = pending[-1]
            if current in self._is_fixed:
                pending.pop()
                continue
            sources = self.sources(current)
            unknown = [source for source in sources if source not in self._is_fixed]
            if unknown:
                pending.extend(unknown)
                continue
            self._is_fixed[current] = self._decide(current, sources)
            pending.pop()
        return self._is_fixed[node]

    def _decide(self, node: Node, sources: list[Node]) -> bool:
        if node.op == "get_attr":
            return True
        if node.op != "call_function" or _is_random(node):
            return False
        if op_name(node) == "embedding" and self._is_position_lookup(node):
            return False  # stays in the graph: its indices become the positional table
        return all(self._is_fixed[source] for source in sources)

    def _is_position_lookup(self, node: Node) -> bool:
        index = node.args[1]
        return isinstance(index, Node) and len(self.lengths.token_axes(index)) == 1

    def sources(self, node: Node) -> list[Node]:
        """The nodes whose values (not just shapes) a node reads."""
        if op_name(node) in _SHAPE_READERS:
            return [source for source in node.all_input_nodes if source is not node.args[0]]
        return node.all_input_nodes

    def run(
        self,
        wanted: list[Node],
        num_tokens: int,
        given: Mapping[Node, Any] | None = None,
        *,
        is_wide: bool = False,
        positions: Tensor | None = None,
    ) -> list[Any]:
        """The values of `wanted` for a sequence of `num_tokens`, with `given` put in. With
        `positions`, the tokens are those of a longer sequence, as far as operators that count
        tokens themselves can tell (see `_at_positions`).

        Raises `NotPageable` if they depend on the token ids; whatever an operator raises.
        """
        values: dict[Node, Any] = dict(given or {})
        order = self._needed(wanted, values)
        uses = Counter(source for node in order for source in self._reads(node))
        kept = {*wanted, *values}
        with torch.inference_mode():
            for node in order:
                value = None
                if positions is not None:
                    value = self._at_positions(node, values, num_tokens, positions)
                if value is None:
                    value = self._compute(node, values, num_tokens, is_wide)
                values[node] = value
                for source in self._reads(node):
                    uses[source] -= 1
                    if not uses[source] and source not in kept:
                        del values[source]
        return [values[node] for node in wanted]

    def _needed(self, wanted: list[Node], given: Mapping[Node, Any]) -> list[Node]:
        """Everything to compute, in order."""
        order: list[Node] = []
        done: set[Node] = set(given)
        pending: list[tuple[Node, bool]] = [(node, False) for node in reversed(wanted)]
        while pending:
            node, is_ready = pending.pop()
            if is_ready:
                order.append(node)
                continue
            if node in done:
                continue
            done.add(node)
            if node.op == "placeholder":
                raise NotPageable("A mask or bias of the attention depends on the token ids.")
            pending.append((node, True))
            pending.extend((source, False) for source in reversed(self._reads(node)))
        return order

    def _reads(self, node: Node) -> list[Node]:
        """What must be computed before a node; a size is read off the shapes instead."""
        return [] if self._is_size(node) else self.sources(node)

    def _is_size(self, node: Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, _SYMBOLIC)

    def _compute(self, node: Node, values: dict[Node, Any], num_tokens: int, is_wide: bool) -> Any:
        if self._is_size(node):
            return self._size(node, num_tokens)
        if node.op == "get_attr":
            return self._attribute(str(node.target), is_wide)

        def load(source: Node) -> Any:
            if source in values:
                return values[source]
            return self._shape_only(source, num_tokens, is_wide)

        arguments = map_arg((node.args, node.kwargs), load)
        if is_wide:
            arguments = map_aggregate(arguments, self._widen)
        args, kwargs = arguments
        assert callable(node.target), f"{node} is called"
        return node.target(*args, **kwargs)

    def _at_positions(
        self, node: Node, values: dict[Node, Any], num_tokens: int, positions: Tensor
    ) -> Any:
        """`tril`, `triu` and slices of a constant down to the sequence's length, of which a
        sequence's chosen positions have other elements than its first ones."""
        name = op_name(node)
        source = node.args[0] if node.args else None
        if name not in ("tril", "triu", "slice") or not isinstance(source, Node):
            return None
        value = values.get(source)
        if not isinstance(value, Tensor):
            return None
        axes = self.lengths.token_axes(node)
        if name == "slice":
            cut = [axis for axis in axes if axis not in self.lengths.token_axes(source)]
            _, _, start, _, step = slice_arguments(node)
            first = self._size(start, num_tokens) if isinstance(start, Node) else start
            if len(cut) != 1 or first or step != 1 or int(positions.max()) >= value.shape[cut[0]]:
                return None
            return value.index_select(cut[0], positions.to(value.device))
        last = [value.dim() - 2, value.dim() - 1]
        diagonal = node.args[1] if len(node.args) > 1 else 0
        if axes[-2:] != last or not isinstance(diagonal, int):
            return None
        offset = (positions[None] - positions[:, None] - diagonal).to(value.device)
        kept = offset <= 0 if name == "tril" else offset >= 0
        return torch.where(kept, value, torch.zeros_like(value))

    def _size(self, node: Node, num_tokens: int) -> Any:
        value = node.meta["val"]
        if isinstance(value, torch.SymInt):
            return self.lengths.at(value, num_tokens)
        if isinstance(value, torch.SymFloat | torch.SymBool):
            number = value.node.expr.subs([(self.lengths.tokens, num_tokens)])
            return bool(number) if isinstance(value, torch.SymBool) else float(number)
        return value

    def _shape_only(self, node: Node, num_tokens: int, is_wide: bool) -> Tensor:
        fake = tensor_of(node)
        assert fake is not None, "only tensors are read for their shape"
        dtype = self._widen(fake.dtype) if is_wide else fake.dtype
        return torch.empty(self.lengths.shape(node, num_tokens), dtype=dtype, device=fake.device)

    def _attribute(self, path: str, is_wide: bool) -> Any:
        value = attribute(self._root, path)
        if not is_wide or not isinstance(value, Tensor) or value.dtype != self.dtype:
            return value
        if path not in self._wide:
            self._wide[path] = value.detach().double()
        return self._wide[path]

    def _widen(self, argument: Any) -> Any:
        return torch.float64 if argument is self.dtype else argument


def _is_random(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags
