"""Runs what a graph does to attention scores between the product and the softmax.

Owns putting chosen scores in and reading logits out: for all tokens of a short sequence, or for
chosen positions of a long one. What the logits mean is `classify.py`'s.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from runtime.compiling.paging.evaluation import Evaluator
from runtime.compiling.paging.layout import Heads
from runtime.compiling.paging.refusal import NotPageable
from runtime.compiling.paging.shapes import tensor_of
from runtime.compiling.paging.sites import Site


class TooLong(Exception):
    """The graph's constants do not reach this far."""


class PositionTables:
    """Values with one token axis, computed once per length for all sites."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._values: dict[tuple[Node, int, bool], Any] = {}
        self._numbers: dict[Any, int] = {}

    def number(self, expression: Any) -> int:
        """A small number that stands for an expression."""
        return self._numbers.setdefault(expression, len(self._numbers))

    def at(self, nodes: list[Node], length: int, is_wide: bool) -> list[Any]:
        """Raises `TooLong` where an axis stays shorter than the sequence."""
        missing = [node for node in nodes if (node, length, is_wide) not in self._values]
        if missing:
            values = evaluate(self._evaluator, missing, length, is_wide)
            for node, value in zip(missing, values, strict=True):
                self._values[node, length, is_wide] = value
        return [self._values[node, length, is_wide] for node in nodes]


def evaluate(evaluator: Evaluator, nodes: list[Node], length: int, is_wide: bool) -> list[Any]:
    """Values at a length, each checked to be as long as its shape says."""
    try:
        values = evaluator.run(nodes, length, is_wide=is_wide)
    except (RuntimeError, IndexError, ValueError) as error:
        raise TooLong(str(error)) from error
    for node, value in zip(nodes, values, strict=True):
        if not isinstance(value, Tensor):
            continue
        is_full = tuple(value.shape) == evaluator.lengths.shape(node, length)
        axes = evaluator.lengths.token_axes(node)
        if not is_full or any(value.shape[axis] != length for axis in axes):
            raise TooLong(f"a table is shorter than {length} tokens")
    return values


@dataclass(frozen=True)
class Selection:
    """Values of chosen positions of a long sequence, by node."""

    values: dict[Node, Any]
    positions: Tensor


class ScoreFunction:
    """One site's scores to logits. Heads are flattened: `[heads, queries, keys]`."""

    def __init__(
        self, site: Site, heads: Heads, evaluator: Evaluator, tables: PositionTables
    ) -> None:
        self.site = site
        self.heads = heads
        self._evaluator = evaluator
        self._tables = tables
        self.dtype = evaluator.dtype
        self.root = site.softmax_input if site.fused is None else site.fused["mask"]
        self._frontier = self._find_frontier()

    def logits(
        self, scores: Tensor, selection: Selection | None = None, *, is_wide: bool = True
    ) -> Tensor:
        """float64 `[heads, n, n]`, or `[heads, n, n + 1]` with a sink, for scores
        `[heads, n, n]` of a sequence of n tokens, or of n selected tokens of a longer one."""
        if self.site.fused is not None:
            return self._fused_logits(scores, selection, is_wide)
        num_tokens = scores.shape[-1]
        assert self.site.scores is not None, "written out"
        node = self.site.scores.node
        fake = tensor_of(node)
        assert fake is not None, "scores are a tensor"
        dtype = torch.float64 if is_wide and fake.dtype == self._evaluator.dtype else fake.dtype
        raw = scores.to(dtype).reshape(self._evaluator.lengths.shape(node, num_tokens))
        logits = self._run_root({node: raw.to(fake.device)}, num_tokens, selection, is_wide)
        if logits.shape[-2] != num_tokens or logits.numel() % (self.heads.num_heads * num_tokens):
            raise NotPageable("An attention's scores change their shape before the softmax.")
        return logits.double().cpu().reshape(self.heads.num_heads, num_tokens, -1)

    def _run_root(
        self, given: dict[Node, Any], num_tokens: int, selection: Selection | None, is_wide: bool
    ) -> Tensor:
        assert self.root is not None, "a mask or a softmax's input"
        positions = None
        if selection is not None:
            given, positions = {**selection.values, **given}, selection.positions
        return self._evaluator.run(
            [self.root], num_tokens, given, is_wide=is_wide, positions=positions
        )[0]

    def _fused_logits(self, scores: Tensor, selection: Selection | None, is_wide: bool) -> Tensor:
        fused = self.site.fused
        assert fused is not None, "a fused attention"
        num_tokens = scores.shape[-1]
        scale = fused["scale"]
        scale = self.heads.key_width**-0.5 if scale is None else float(scale)
        logits = scores.double() * scale
        if isinstance(self.root, Node):
            mask = self._run_root({}, num_tokens, selection, is_wide).cpu()
            shape = (*self.heads.full, num_tokens, num_tokens)
            mask = mask.broadcast_to(shape).reshape(logits.shape)
            if mask.dtype == torch.bool:
                logits = logits.masked_fill(~mask, -torch.inf)
            else:
                logits = logits + mask.double()
        if fused["is_causal"]:
            hidden = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
            logits = logits.masked_fill(hidden, -torch.inf)
        return logits

    @property
    def can_select(self) -> bool:
        """Whether chosen positions of a long sequence can be looked at by themselves."""
        return self._frontier is not None

    def select(self, positions: Tensor, length: int, *, is_wide: bool = True) -> Selection:
        """What to put in for `positions` of a sequence of `length`. Raises `TooLong`."""
        assert self._frontier is not None, "only where positions can be chosen"
        values = self._tables.at(self._frontier, length, is_wide)
        given: dict[Node, Any] = {}
        for node, value in zip(self._frontier, values, strict=True):
            axes = self._evaluator.lengths.token_axes(node)
            if axes:
                value = value.index_select(axes[0], positions.to(value.device))
            given[node] = value
        return Selection(given, positions)

    def check_length(self, length: int) -> None:
        """Raises `TooLong` if the mask's or bias's constants end before `length`."""
        if self._frontier is not None:
            self._tables.at(self._frontier, length, is_wide=True)

    def weights(self, scores: Tensor, probabilities: Tensor) -> Tensor:
        """What the softmax's result has become when it meets the values: `[heads, n, n]`. What
        becomes of it may look at the scores (for rows that see nothing, say)."""
        site = self.site
        assert site.softmax is not None, "written out"
        assert site.weights is not None, "written out"
        assert site.scores is not None, "written out"
        num_tokens = probabilities.shape[1]
        given: dict[Node, Any] = {}
        for node, value in ((site.scores.node, scores), (site.softmax, probabilities)):
            fake = tensor_of(node)
            assert fake is not None, "scores and weights are tensors"
            shape = self._evaluator.lengths.shape(node, num_tokens)
            given[node] = value.reshape(shape).to(fake.device)
        weights = self._evaluator.run([site.weights], num_tokens, given, is_wide=True)[0]
        return weights.reshape(self.heads.num_heads, num_tokens, num_tokens).double().cpu()

    def structure(self) -> tuple[Any, ...]:
        """Equal for two sites whose scores go the same way through the same constants."""
        names: dict[Node, Any] = {}
        site = self.site
        if site.fused is not None:
            fused = (self._spell(site.fused["mask"], names), *self._fused_numbers())
            return ("fused", fused, self.heads)
        assert site.scores is not None, "written out"
        assert site.softmax is not None, "written out"
        names[site.scores.node] = "scores", self._evaluator.lengths.shape(site.scores.node, 5)
        logits = self._spell(self.root, names)
        names[site.softmax] = "softmax"
        return (logits, self._spell(site.weights, names), self.heads)

    def _fused_numbers(self) -> tuple[Any, ...]:
        assert self.site.fused is not None, "a fused attention"
        return self.site.fused["is_causal"], self.site.fused["scale"]

    def _spell(self, value: Any, names: dict[Node, Any]) -> Any:
        """A number for each distinct expression, which is written in those of its parts."""
        if not isinstance(value, Node):
            return repr(value)
        if value not in names:
            parts = [self._spell(source, names) for source in value.all_input_nodes]
            arguments = map_arg((value.args, value.kwargs), lambda _: None)
            target = value.name if value.op == "placeholder" else str(value.target)
            spelled = (value.op, target, tuple(parts), repr(arguments))
            names[value] = self._tables.number(spelled)
        return names[value]

    def literals(self) -> set[int]:
        """Every whole number that the mask's or bias's part of the graph mentions."""
        found: set[int] = set()
        for node in self._ancestors():
            for argument in pytree.tree_leaves((node.args, node.kwargs)):
                if isinstance(argument, int | float) and math.isfinite(argument):
                    found.add(abs(int(argument)))
        return found

    def is_limited(self, length: int, context: int) -> bool:
        """Whether what was seen at `length` may end before `context`, because the mask's or
        bias's part of the graph names a number or holds a table that goes further."""
        sizes = {
            size
            for node in self._ancestors()
            if node.op == "get_attr" and (tensor := tensor_of(node)) is not None
            for size in tensor.shape
        }
        return any(length // 2 < number < context for number in self.literals()) or any(
            isinstance(size, int) and size > length for size in sizes
        )

    def _ancestors(self) -> list[Node]:
        if not isinstance(self.root, Node):
            return []
        stop = self.site.scores.node if self.site.scores else None
        seen: dict[Node, None] = {}
        pending = [self.root]
        while pending:
            node = pending.pop()
            if node in seen or node is stop:
                continue
            seen[node] = None
            pending.extend(self._evaluator.sources(node))
        return list(seen)

    def _find_frontier(self) -> list[Node] | None:
        """The last values on the way to the logits with at most one token axis; None if one of
        them comes from values with two."""
        frontier: dict[Node, None] = {}
        token_axes = self._evaluator.lengths.token_axes
        stop = self.site.scores.node if self.site.scores else None
        seen: set[Node] = set()
        pending = [self.root] if isinstance(self.root, Node) else []
        while pending:
            node = pending.pop()
            if node in seen or node is stop or tensor_of(node) is None:
                continue
            seen.add(node)
            is_table = self._evaluator.is_fixed(node) and len(token_axes(node)) <= 1
            if not is_table:
                pending.extend(self._evaluator.sources(node))
            elif node.op != "get_attr":
                frontier[node] = None
        below = set(frontier)
        pending = list(frontier)
        while pending:
            for source in self._evaluator.sources(pending.pop()):
                if len(token_axes(source)) > 1:
                    return None
                if source not in below:
                    below.add(source)
                    pending.append(source)
        return list(frontier)
