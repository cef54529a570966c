"""A graph beside the values that each of its nodes has on three small packed batches.

Owns evaluation: what a node's shape is, which of its sizes grow with the batch, and whether a
node that is to replace another gives the same values. Passes decide nothing by names alone.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

# (tokens, sampled rows) of each batch: a size that differs among them grows with the batch. The
# three lie on no line, so that neither number can be had from the other.
BATCHES = ((3, 2), (11, 5), (7, 7))
MAX_TOKEN_ID = 32
# How far a replacement may be from what it replaces, as a share of the largest value.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}


def op_name(node: fx.Node) -> str:
    """The operator's bare name, as `add` of `aten.add.Tensor`; empty for what is no operation."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return schema.name.rpartition("::")[2]
    return getattr(node.target, "__name__", "")


def is_attention(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is an attention site of a paged graph."""
    if node.op != "call_module":
        return False
    return hasattr(graph_module.get_submodule(str(node.target)), "layer_index")


def plain_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Full attention among all tokens: stands in for the paged one while graphs are compared."""
    group = query.shape[1] // keys.shape[1]
    keys = keys.repeat_interleave(group, 1).float()
    values = values.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * query.shape[-1] ** -0.5
    attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.float())
    return attended.to(values.dtype).contiguous()


class EvaluatedGraph:
    """A graph module under rewriting; `values[node][i]` is what node gives on batch i."""

    def __init__(self, module: fx.GraphModule, vocab_size: int) -> None:
        self.module = module
        self.graph = module.graph
        self.values: dict[fx.Node, tuple[Any, ...]] = {}
        inputs_of = [_batch(*sizes, vocab_size, _device(module)) for sizes in BATCHES]
        self._num_constants = 0
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        assert len(placeholders) == 3, "a paged graph takes tokens, positions and rows to sample"
        self.token_ids, self.positions, self.sample_indices = placeholders
        for node in reversed(placeholders):  # whatever is inserted may then use them
            next(iter(self.graph.nodes)).prepend(node)
        for at, node in enumerate(placeholders):
            self.values[node] = tuple(inputs[at] for inputs in inputs_of)
        self.refresh()

    def evaluate(self, node: fx.Node) -> None:
        """Fill in the values of a node whose inputs have theirs. Assertions have none."""
        if node in self.values or node.op == "output" or _is_check(node):
            return
        self.values[node] = tuple(self._run(node, at) for at in range(len(BATCHES)))

    def refresh(self) -> None:
        """Evaluate everything anew: values keep their numbers, but not always their strides."""
        self.values = {
            node: self.values[node] for node in self.graph.nodes if node.op == "placeholder"
        }
        for node in self.graph.nodes:
            self.evaluate(node)

    def _run(self, node: fx.Node, at: int) -> Any:
        if node.op == "get_attr":
            return fetch(self.module, str(node.target))
        args: Any = fx.map_arg(node.args, lambda each: self.values[each][at])
        kwargs: Any = fx.map_arg(node.kwargs, lambda each: self.values[each][at])
        with torch.no_grad():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            if node.op == "call_module":
                if is_attention(self.module, node):
                    return plain_attention(*args)
                return self.module.get_submodule(str(node.target))(*args, **kwargs)
            assert callable(node.target), f"{node.op} is no operation"
            return node.target(*args, **kwargs)

    def tensor(self, node: fx.Node, at: int = 0) -> Tensor | None:
        """The node's value on batch `at`, if it is a tensor."""
        value = self.values.get(node, (None,) * len(BATCHES))[at]
        return value if isinstance(value, Tensor) else None

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """Its sizes, -1 for each that grows with the batch; None for what is no tensor."""
        shapes: list[torch.Size] = []
        for at in range(len(BATCHES)):
            tensor = self.tensor(node, at)
            if tensor is None or (shapes and len(shapes[0]) != tensor.dim()):
                return None
            shapes.append(tensor.shape)
        sizes = zip(*shapes, strict=True)
        return tuple(each[0] if len(set(each)) == 1 else -1 for each in sizes)

    def is_dense(self, node: fx.Node) -> bool:
        """Whether neighbours on the last axis are neighbours in memory, in every batch."""
        tensors = [self.tensor(node, at) for at in range(len(BATCHES))]
        return all(each is not None and each.stride(-1) == 1 for each in tensors)

    def call(
        self, before: fx.Node, target: Callable[..., Any] | str, *args: Any, **kwargs: Any
    ) -> fx.Node:
        """Insert a function, or by its name a tensor's method, and evaluate it."""
        with self.graph.inserting_before(before):
            if isinstance(target, str):
                node = self.graph.call_method(target, args, kwargs)
            else:
                node = self.graph.call_function(target, args, kwargs)
        self.evaluate(node)
        return node

    def call_module(self, before: fx.Node, name: str, module: nn.Module, *args: Any) -> fx.Node:
        """Insert a call of a new submodule and evaluate it."""
        self.module.add_submodule(name, module)
        with self.graph.inserting_before(before):
            node = self.graph.call_module(name, args)
        self.evaluate(node)
        return node

    def constant(self, before: fx.Node, tensor: Tensor) -> fx.Node:
        """Insert a new buffer."""
        name = f"constant_{self._num_constants}"
        self._num_constants += 1
        self.module.register_buffer(name, tensor, persistent=False)
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(name)
        self.evaluate(node)
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> bool:
        """Let `new` take the place of `old` if it has the same values; else drop it."""
        if not self.is_same(old, new):
            self.discard(new)
            return False
        old.replace_all_uses_with(new, propagate_meta=False)
        return True

    def is_same(self, old: fx.Node, new: fx.Node) -> bool:
        """Whether two nodes are tensors of one shape and dtype, equal but for rounding."""
        pairs = zip(self.values[old], self.values[new], strict=True)
        return all(_is_close(before, after) for before, after in pairs)

    def discard(self, node: fx.Node) -> None:
        """Erase a node that nothing uses, and inputs of it that nothing else uses."""
        if node.users or node.op in ("placeholder", "output"):
            return
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        self.values.pop(node, None)
        for each in inputs:
            if each.op == "call_function" or each.op == "call_method":
                self.discard(each)

    def drop_dead(self) -> int:
        """Erase all that the output does not need, checks among it; returns how many nodes."""
        output = next(iter(reversed(self.graph.nodes)))
        alive: set[fx.Node] = set()
        waiting = [output]
        while waiting:
            node = waiting.pop()
            if node not in alive:
                alive.add(node)
                waiting += node.all_input_nodes
        dead = [node for node in self.graph.nodes if node not in alive and node.op != "placeholder"]
        for node in reversed(dead):
            self.graph.erase_node(node)
            self.values.pop(node, None)
        return len(dead)


def _is_close(before: Any, after: Any) -> bool:
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if before.shape != after.shape or before.dtype != after.dtype:
        return False
    if not before.dtype.is_floating_point:
        return torch.equal(before, after)
    wide, new = before.double(), after.double()
    scale = wide.abs().max().item() if wide.numel() else 0.0
    limit = TOLERANCES.get(before.dtype, 0.0) * scale
    return bool((wide - new).abs().le(limit).all())  # NaN is close to nothing


def _is_check(node: fx.Node) -> bool:
    """Guards and assertions, which say nothing of a paged graph's values."""
    name = op_name(node)
    return name.startswith(("_assert", "sym_constrain")) or str(node.target) == "_guards_fn"


def fetch(module: nn.Module, path: str) -> Any:
    """What a `get_attr` node names."""
    return operator.attrgetter(path)(module)


def constants_of(module: nn.Module) -> Iterable[Tensor]:
    """Parameters and buffers."""
    yield from module.parameters()
    yield from module.buffers()


def _device(module: nn.Module) -> torch.device:
    return next((each.device for each in constants_of(module)), torch.device("cpu"))


def _batch(
    num_tokens: int, num_sampled: int, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    # Small ids: an output layer may have rows that no token has.
    token_ids = torch.randint(0, min(vocab_size, MAX_TOKEN_ID), (num_tokens,), generator=generator)
    positions = torch.arange(num_tokens) % 3  # the larger batches hold several sequences
    rows = torch.randperm(num_tokens, generator=generator)[:num_sampled]
    return token_ids.to(device), positions.to(device), rows.to(device)
