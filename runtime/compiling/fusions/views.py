"""Rewrites each chain of views, slices and transposes as the shortest equal one.

What a chain does is found by running it on consecutive numbers, not from its operators: the
result shows strides and offset over the chain's source, and these alone decide the new chain.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from runtime.compiling.fusions.cleaning import slice_arguments
from runtime.compiling.fusions.evaluated import BATCHES, EvaluatedGraph, op_name

VIEWS = {
    *("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten"),
    *("transpose", "permute", "t", "contiguous", "clone", "alias", "detach", "movedim"),
    *("swapaxes", "slice", "select", "narrow", "expand"),
}


@dataclass(frozen=True)
class Axis:
    """One axis of a source seen as a row-major block: of `full` entries, `size` from `start`."""

    full: int
    size: int
    start: int


@dataclass(frozen=True)
class Plan:
    """`source.view(full sizes)`, narrowed, permuted and given its shape."""

    axes: tuple[Axis, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]


def fold_views(graph: EvaluatedGraph) -> int:
    """Returns how many chains got shorter."""
    num_folded = 0
    for node in list(graph.graph.nodes):
        if not is_view(graph, node):
            continue
        if node.users and all(is_view(graph, user) for user in node.users):
            continue  # inside a chain
        chain = chain_of(graph, node)
        plan = view_plan(graph, chain)
        if plan is None:
            continue
        source = chain[0].args[0]
        assert isinstance(source, fx.Node), "a view has a source"
        steps = _steps(graph, source, plan)
        if len(steps) < len(chain) or (len(steps) == len(chain) and chain[-1].op != "call_method"):
            num_folded += graph.replace(node, _emit(graph, node, source, steps))
    graph.drop_dead()
    return num_folded


def is_view(graph: EvaluatedGraph, node: fx.Node) -> bool:
    """Whether the node only rearranges or takes a part of its first argument."""
    name = op_name(node)
    if name not in VIEWS or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if graph.shape(node) is None or graph.shape(node.args[0]) is None:
        return False
    before, after = graph.tensor(node.args[0]), graph.tensor(node)
    assert before is not None
    assert after is not None
    if before.dtype != after.dtype or (name == "expand" and before.numel() != after.numel()):
        return False
    return name != "slice" or _takes_constant_part(graph, node)


def _takes_constant_part(graph: EvaluatedGraph, node: fx.Node) -> bool:
    """Of an axis that grows with the batch no part is constant."""
    arguments = slice_arguments(node)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = graph.shape(source)
    return arguments is not None and shape is not None and shape[arguments[0]] != -1


def chain_of(graph: EvaluatedGraph, last: fx.Node) -> list[fx.Node]:
    """The views one upon the other that end in `last`."""
    chain = [last]
    while isinstance(source := chain[0].args[0], fx.Node) and is_view(graph, source):
        chain.insert(0, source)
    return chain


def view_plan(graph: EvaluatedGraph, chain: list[fx.Node]) -> Plan | None:
    """The same plan for all batches but for the sizes that grow with them, or None."""
    plans: list[Plan] = []
    for at in range(len(BATCHES)):
        plan = _plan_of(graph, chain, at)
        if plan is None or (plans and plan.order != plans[0].order):
            return None
        plans.append(plan)
    if len({len(plan.axes) for plan in plans}) != 1:
        return None
    axes: list[Axis] = []
    for same in zip(*(plan.axes for plan in plans), strict=True):
        is_fixed = len(set(same)) == 1
        if not is_fixed and not all(axis.size == axis.full for axis in same):
            return None
        axes.append(same[0] if is_fixed else Axis(-1, -1, 0))
    sizes = zip(*(plan.shape for plan in plans), strict=True)
    shape = tuple(each[0] if len(set(each)) == 1 else -1 for each in sizes)
    if sum(axis.full == -1 for axis in axes) > 1 or shape.count(-1) > 1:
        return None
    return Plan(tuple(axes), plans[0].order, shape)


def _plan_of(graph: EvaluatedGraph, chain: list[fx.Node], at: int) -> Plan | None:
    source = chain[0].args[0]
    assert isinstance(source, fx.Node)
    before, after = graph.tensor(source, at), graph.tensor(chain[-1], at)
    if before is None or after is None or after.numel() == 0:
        return None
    numbers: Any = torch.arange(before.numel()).view(before.shape)
    for node in chain:
        args = fx.map_arg(node.args[1:], lambda each: graph.values[each][at])
        kwargs = fx.map_arg(node.kwargs, lambda each: graph.values[each][at])
        if op_name(node) == "view" or op_name(node) == "_unsafe_view":
            numbers = numbers.reshape(*args)  # may be no view of consecutive numbers
        elif node.op == "call_method":
            numbers = getattr(numbers, str(node.target))(*args, **kwargs)
        else:
            assert callable(node.target)
            numbers = node.target(numbers, *args, **kwargs)
    return _plan_from_numbers(numbers, before.numel())


def _plan_from_numbers(numbers: Tensor, num_elements: int) -> Plan | None:
    offset = int(numbers.flatten()[0])
    dims = [dim for dim, size in enumerate(numbers.shape) if size > 1]
    strides = {dim: int(numbers.select(dim, 1).flatten()[0]) - offset for dim in dims}
    expected = torch.full_like(numbers, offset)
    for dim in dims:
        steps = torch.arange(numbers.shape[dim]) * strides[dim]
        expected += steps.view([-1 if at == dim else 1 for at in range(numbers.dim())])
    if not torch.equal(numbers, expected) or any(stride <= 0 for stride in strides.values()):
        return None
    # Row-major: outer axes have larger strides. An axis of full size f spans f * stride entries.
    nested = sorted(dims, key=lambda dim: -strides[dim])
    axes: list[Axis] = []
    outer, left = num_elements, offset
    inner_strides = [strides[dim] for dim in nested]
    if not inner_strides or inner_strides[-1] != 1:
        return None
    for dim, stride in zip(nested, inner_strides, strict=True):
        if outer % stride:
            return None
        full, start = outer // stride, left // stride
        size = numbers.shape[dim]
        if start + size > full:
            return None
        axes.append(Axis(full, size, start))
        outer, left = stride, left % stride
    order = tuple(nested.index(dim) for dim in dims)
    return _merged(Plan(tuple(axes), order, tuple(numbers.shape)))


def _merged(plan: Plan) -> Plan:
    """Axes that stay whole and next to each other need not be told apart."""
    axes, order = list(plan.axes), list(plan.order)
    at = 0
    while at + 1 < len(order):
        outer, inner = order[at], order[at + 1]
        is_whole = axes[inner].size == axes[inner].full
        if inner != outer + 1 or not is_whole:
            at += 1
            continue
        a, b = axes[outer], axes[inner]
        axes[outer] = Axis(a.full * b.full, a.size * b.full, a.start * b.full)
        del axes[inner], order[at + 1]
        order = [each - (each > inner) for each in order]
    return Plan(tuple(axes), tuple(order), plan.shape)


Step = tuple[str, tuple[Any, ...]]


def _steps(graph: EvaluatedGraph, source: fx.Node, plan: Plan) -> list[Step]:
    """The methods to call on the source, none where the source is already the result."""
    steps: list[Step] = []
    shape = graph.shape(source)
    assert shape is not None
    full = tuple(axis.full for axis in plan.axes)
    is_permuted = plan.order != tuple(sorted(plan.order))
    is_narrowed = any(axis.size != axis.full for axis in plan.axes)
    if is_permuted or is_narrowed:
        if full != shape:
            steps.append(("reshape", full))
            shape = full
        for at, axis in enumerate(plan.axes):
            if axis.size != axis.full:
                steps.append(("narrow", (at, axis.start, axis.size)))
                shape = (*shape[:at], axis.size, *shape[at + 1 :])
        if is_permuted:
            steps.append(("permute", plan.order))
            shape = tuple(shape[at] for at in plan.order)
    if shape != plan.shape:
        steps.append(("reshape", plan.shape))
    return steps


def _emit(graph: EvaluatedGraph, before: fx.Node, source: fx.Node, steps: list[Step]) -> fx.Node:
    node = source
    for name, args in steps:
        node = graph.call(before, name, node, *args)
    return node
