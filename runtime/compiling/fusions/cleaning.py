"""Takes out of a graph what does nothing: no-ops, repeated work, casts there and back, dead code.

Also writes multi-output splits as slices, so that later passes know one way to take a part.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from runtime.compiling.fusions.evaluated import BATCHES, EvaluatedGraph, op_name

NO_OPS = {
    *("to", "_to_copy", "type_as", "contiguous", "clone", "detach", "detach_", "alias"),
    *("lift_fresh_copy", "dropout", "expand", "expand_as", "broadcast_to", "identity"),
    *("view", "reshape", "_unsafe_view", "squeeze", "permute"),
}
NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}  # the scalar that changes nothing
SPLITS = {"split", "split_with_sizes", "chunk", "unbind", "tensor_split"}
VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
LAST = 2**62  # slice ends beyond it mean "to the end"
RANDOM = {"rand", "randn", "randint", "bernoulli", "multinomial", "rand_like", "randn_like"}


def clean(graph: EvaluatedGraph) -> int:
    """Returns how many nodes went."""
    before = len(graph.graph.nodes)
    graph.drop_dead()
    _settle_sizes(graph)
    for node in list(graph.graph.nodes):
        if node.target in VIEWS:
            node.target = torch.ops.aten.reshape.default  # whatever its source's strides become
        elif op_name(node) in SPLITS:
            _split_to_slices(graph, node)
    for node in list(graph.graph.nodes):
        source = _unchanged(graph, node)
        if source is not None:
            node.replace_all_uses_with(source, propagate_meta=False)
    _drop_repeated(graph)
    graph.drop_dead()
    return before - len(graph.graph.nodes)


def _settle_sizes(graph: EvaluatedGraph) -> None:
    """Sizes of the inputs become numbers where they are constant, else one node for all that are
    equal. Sizes that are computed stay, since what holds for few tokens may not for many."""
    known: dict[tuple[int, ...], fx.Node] = {}
    start = next(node for node in graph.graph.nodes if node.op != "placeholder")
    sources = (graph.token_ids, graph.sample_indices)
    for source, sizes in zip(sources, zip(*BATCHES, strict=True), strict=True):
        known[sizes] = graph.call(start, torch.ops.aten.sym_size.int, source, 0)
    for node in list(graph.graph.nodes):
        values = graph.values.get(node, ())
        if not _is_size_of_input(graph, node):
            continue
        if len(set(values)) == 1:
            _put_number(node, values[0])
        elif values in known and known[values] is not node:
            node.replace_all_uses_with(known[values], propagate_meta=False)


def _is_size_of_input(graph: EvaluatedGraph, node: fx.Node) -> bool:
    if not op_name(node).startswith("sym_size"):
        return False
    source = node.args[0]
    while op_name(source) in ("unsqueeze", "squeeze", "alias"):  # pyright: ignore[reportArgumentType]
        source = source.args[0]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    return source in (graph.token_ids, graph.positions, graph.sample_indices)


def _put_number(node: fx.Node, number: int) -> None:
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda each: number if each is node else each)


def _unchanged(graph: EvaluatedGraph, node: fx.Node) -> fx.Node | None:
    """The node this one merely repeats."""
    name = op_name(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or graph.shape(node) is None:
        return None
    if name in ("to", "_to_copy") and op_name(source) in ("to", "_to_copy"):
        first = source.args[0]
        if isinstance(first, fx.Node) and _is_widened_and_back(graph, first, source, node):
            return first
    is_neutral = name in NEUTRAL and len(node.args) == 2 and node.args[1] == NEUTRAL[name]
    if not (name in NO_OPS or is_neutral or (name == "slice" and _is_whole(graph, node))):
        return None
    return source if _is_identical(graph, source, node) else None


def _is_identical(graph: EvaluatedGraph, one: fx.Node, other: fx.Node) -> bool:
    for a, b in zip(graph.values[one], graph.values[other], strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return False
        if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
            return False
        if not torch.equal(a, b):
            return False
    return True


def _is_widened_and_back(
    graph: EvaluatedGraph, first: fx.Node, wide: fx.Node, back: fx.Node
) -> bool:
    values = [graph.tensor(each) for each in (first, wide, back)]
    a, b, c = values
    if a is None or b is None or c is None or a.dtype != c.dtype or a.shape != c.shape:
        return False
    is_wider = torch.promote_types(a.dtype, b.dtype) == b.dtype
    is_alike = a.is_floating_point() == b.is_floating_point()  # a float rounds large integers
    return is_wider and is_alike and _is_identical(graph, first, back)


def _is_whole(graph: EvaluatedGraph, node: fx.Node) -> bool:
    """Whether a slice keeps everything for every number of tokens, not just for few."""
    arguments = slice_arguments(node)
    source = node.args[0]
    if arguments is None or not isinstance(source, fx.Node):
        return False
    dim, start, end, step = arguments
    shape = graph.shape(source)
    if shape is None or start != 0 or step != 1:
        return False
    return end >= LAST or shape[dim] != -1


def slice_arguments(node: fx.Node) -> tuple[int, int, int, int] | None:
    """(dim, start, end, step) of an `aten.slice`, or None if any is computed."""
    values = dict(enumerate([0, None, None, 1]))
    for at, value in enumerate(node.args[1:]):
        values[at] = value  # pyright: ignore[reportArgumentType]
    for at, name in enumerate(("dim", "start", "end", "step")):
        if name in node.kwargs:
            values[at] = node.kwargs[name]  # pyright: ignore[reportArgumentType]
    dim, start, end, step = values.values()
    start = 0 if start is None else start
    end = LAST if end is None else end
    if not all(isinstance(each, int) for each in (dim, start, end, step)):
        return None
    return dim, start, end, step  # pyright: ignore[reportReturnType]


def _split_to_slices(graph: EvaluatedGraph, node: fx.Node) -> None:
    """`split(x)[i]` becomes a slice (or a select, of `unbind`), where the sizes are constant."""
    source, name = node.args[0], op_name(node)
    if not isinstance(source, fx.Node):
        return
    shape = graph.shape(source)
    dim: Any = node.kwargs.get("dim", 0)
    at = 1 if name == "unbind" else 2
    dim = node.args[at] if len(node.args) > at else dim
    if shape is None or not isinstance(dim, int) or shape[dim] == -1:
        return
    parts: Any = graph.values[node][0]
    for user in list(node.users):
        if user.target is not operator.getitem or not isinstance(user.args[1], int):
            return
        index = user.args[1] % len(parts)
        if name == "unbind":
            new = graph.call(user, torch.ops.aten.select.int, source, dim, index)
        else:
            start = sum(part.shape[dim] for part in parts[:index])
            end = start + parts[index].shape[dim]
            new = graph.call(user, torch.ops.aten.slice.Tensor, source, dim, start, end)
        graph.replace(user, new)


def _drop_repeated(graph: EvaluatedGraph) -> None:
    """Of operations with the same inputs, all but the first."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op not in ("call_function", "call_method", "get_attr"):
            continue
        if op_name(node) in RANDOM or not _is_plain(graph, node):
            continue
        key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first, propagate_meta=False)


def _is_plain(graph: EvaluatedGraph, node: fx.Node) -> bool:
    values = graph.values.get(node, ())
    return bool(values) and all(isinstance(each, (Tensor, int)) for each in values)


def _frozen(value: Any) -> Any:
    """Hashable, and with types kept apart: 1, 1.0 and True are different arguments."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(each) for each in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(each)) for key, each in value.items())
    return (type(value), value if isinstance(value, fx.Node) else repr(value))
