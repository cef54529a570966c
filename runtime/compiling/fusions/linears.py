"""Packs every linear layer, those that read the same input together.

Weights are packed one group at a time and the originals let go, so that memory does not double.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from runtime.compiling.fusions.activations import activation_of
from runtime.compiling.fusions.constants import constant_nodes
from runtime.compiling.fusions.evaluated import EvaluatedGraph, op_name
from runtime.compiling.fusions.regions import order_of
from runtime.compiling.fusions.tied import share_embeddings
from runtime.execution import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Linear:
    """`output = source @ weight.T + bias`; `weight` is `[out, in]`, a view of the graph's own."""

    output: fx.Node
    source: fx.Node
    weight_node: fx.Node
    weight: Tensor
    bias: Tensor | None

    @property
    def num_outputs(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class Origin:
    """What a packed layer was made of: a strided view of the constant at `path`, and a bias."""

    path: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements
    bias: Tensor | None


def origins_of(module: fx.GraphModule) -> dict[str, list[Origin]]:
    """Of each packed layer, by the name of its submodule."""
    return module.meta.setdefault("origins", {})


def pack_linears(graph: EvaluatedGraph) -> int:
    """Returns how many linear layers were packed."""
    constants = constant_nodes(graph)
    groups: dict[fx.Node, list[Linear]] = {}
    for node in graph.graph.nodes:
        if (linear := _linear(graph, node, constants)) is not None:
            groups.setdefault(linear.source, []).append(linear)
    num_packed = 0
    alone: dict[fx.Node, ops.PackedLinear] = {}
    for name, group in enumerate(groups.values()):
        weights = [each.weight_node for each in group]
        packed = _pack(graph, f"packed_{name}", _ordered(group))
        if packed is not None:
            num_packed += len(group)
            if len(group) == 1 and weights[0].op == "get_attr" and weights[0].users:
                alone[weights[0]] = packed
        del group[:]  # the originals are let go before the next are packed
        _release(graph, [weight for weight in weights if weight not in alone])
    share_embeddings(graph, alone)
    _release(graph, alone)
    return num_packed


def _linear(graph: EvaluatedGraph, node: fx.Node, constants: set[fx.Node]) -> Linear | None:
    name, args = op_name(node), node.args
    bias: Any = None
    is_transposed = True  # the weight stands as [in, out]
    if name == "linear" and node.target is torch.ops.aten.linear.default:
        source, weight, is_transposed = args[0], args[1], False
        bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
    elif name == "addmm" and not node.kwargs:
        bias, source, weight = args[:3]
    elif name in ("mm", "matmul"):
        source, weight = args[:2]
    else:
        return None
    if source in constants or weight not in constants or (bias and bias not in constants):
        return None
    matrix = graph.tensor(weight)
    vector = graph.tensor(bias) if bias else None
    value = graph.tensor(node)
    if matrix is None or matrix.dim() != 2 or value is None or value.dtype not in DTYPES:
        return None
    matrix = matrix.t() if is_transposed else matrix
    if vector is not None and vector.shape != matrix.shape[:1]:
        return None
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    return Linear(node, source, weight, matrix.detach(), vector)


def _ordered(group: list[Linear]) -> list[Linear]:
    """A gate right before what it gates, else as in the graph."""
    by_output = {linear.output: linear for linear in group}
    ordered: list[Linear] = []
    for linear in group:
        if linear in ordered or _gate_of(linear, by_output) is not None:
            continue
        ordered.append(linear)
        ordered += [each for each in group if _gate_of(each, by_output) is linear]
    return ordered if len(ordered) == len(group) else group


def _gate_of(linear: Linear, group: dict[fx.Node, Linear]) -> Linear | None:
    """The layer whose activation this one's output is multiplied by."""
    users = list(linear.output.users)
    if len(users) != 1 or op_name(users[0]) != "mul" or len(users[0].args) != 2:
        return None
    one, other = users[0].args
    activation = other if one is linear.output else one
    if not isinstance(activation, fx.Node) or activation_of(activation) is None:
        return None
    gate: Any = activation.args[0]
    found = group.get(gate)
    is_alike = found is not None and found.num_outputs == linear.num_outputs
    return found if is_alike and len(gate.users) == 1 else None


def _pack(graph: EvaluatedGraph, name: str, group: list[Linear]) -> ops.PackedLinear | None:
    order = order_of(graph)
    before = min((linear.output for linear in group), key=order.__getitem__)
    weights, biases = [each.weight for each in group], [each.bias for each in group]
    packed = ops.PackedLinear.joined(weights, biases)
    product = graph.call_module(before, name, packed, group[0].source)
    parts = list(_parts(graph, before, product, group))
    is_same = all(
        graph.is_same(linear.output, part) for linear, part in zip(group, parts, strict=True)
    )
    if not is_same:
        for part in parts:
            graph.discard(part)
        if not product.users:
            graph.graph.erase_node(product)
            graph.module.delete_submodule(name)
        return None
    for linear, part in zip(group, parts, strict=True):
        linear.output.replace_all_uses_with(part, propagate_meta=False)
        graph.graph.erase_node(linear.output)
        graph.values.pop(linear.output)
    origins_of(graph.module)[name] = [_origin(linear) for linear in group]
    return packed


def _origin(linear: Linear) -> Origin:
    node = linear.weight_node
    while node.op != "get_attr" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    weight = linear.weight
    return Origin(
        path=str(node.target) if node.op == "get_attr" else "",
        size=tuple(weight.shape),
        stride=weight.stride(),
        offset=int(weight.storage_offset()),
        bias=linear.bias,
    )


def _parts(
    graph: EvaluatedGraph, before: fx.Node, product: fx.Node, group: list[Linear]
) -> Iterable[fx.Node]:
    """Each layer's output, as a slice of the product. A gate and what it gates are taken out
    together first, so that one operation can read both."""
    if len(group) == 1:
        return [product]
    by_output = {linear.output: linear for linear in group}
    blocks: list[list[Linear]] = []
    for linear in group:
        gate = _gate_of(linear, by_output)
        if gate is not None and blocks and blocks[-1] == [gate]:
            blocks[-1].append(linear)
        else:
            blocks.append([linear])
    sizes = [sum(linear.num_outputs for linear in block) for block in blocks]
    split = graph.call(before, "split", product, sizes, -1) if len(blocks) > 1 else None
    parts: list[fx.Node] = []
    for at, block in enumerate(blocks):
        whole = product if split is None else graph.call(before, operator.getitem, split, at)
        start = 0
        for linear in block:
            size = linear.num_outputs
            one = whole if len(block) == 1 else graph.call(before, "narrow", whole, -1, start, size)
            parts.append(one)
            start += size
    return parts


def _release(graph: EvaluatedGraph, nodes: Iterable[fx.Node]) -> None:
    """Drop constants that nothing reads any more, with the tensors behind them."""
    for node in nodes:
        if node.users:
            continue
        inputs = node.all_input_nodes
        graph.graph.erase_node(node)
        graph.values.pop(node, None)
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            delattr(graph.module.get_submodule(path), name)
        _release(graph, inputs)


def release_unused(graph: EvaluatedGraph) -> None:
    """Drop all parameters and buffers that the graph does not read, but those of submodules that
    it calls."""
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    for prefix, module in graph.module.named_modules():
        if prefix in called:
            continue
        for tensors in (module._parameters, module._buffers):
            for name in list(tensors):
                if f"{prefix}.{name}".lstrip(".") not in used:
                    del tensors[name]
