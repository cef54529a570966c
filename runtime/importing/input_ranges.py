"""Finds the values that an integer input may have, from the tables that a graph looks up with it.

Token ids index an embedding, and one beyond its rows is an error (on a GPU, one that ends the
process). Owns the walk through the graph; what owners say of an input comes before it.
"""

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import Argument

# Operators whose result holds the values of their first argument.
_SAME_VALUES = frozenset(
    {
        *("to.dtype", "to.device", "to.dtype_layout", "_to_copy.default", "type_as.default"),
        *("long.default", "int.default", "clone.default", "contiguous.default"),
        *("alias.default", "detach.default", "detach_.default", "lift_fresh_copy.default"),
        *("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints"),
        *("unflatten.int", "unsqueeze.default", "squeeze.default", "squeeze.dim"),
        *("squeeze.dims", "expand.default", "repeat.default", "slice.Tensor", "select.int"),
        *("narrow.default", "transpose.int", "permute.default", "t.default", "split.Tensor"),
        *("split_with_sizes.default", "unbind.int", "chunk.default"),
    }
)
# Operators that look rows up: where the table is, and where the indices are.
_LOOKUPS = {
    "embedding.default": (0, 1),
    "embedding_bag.padding_idx": (0, 1),
    "embedding_bag.default": (0, 1),
    "_embedding_bag.default": (0, 1),
    "index_select.default": (0, 2),
    "gather.default": (0, 2),
}
_INDEX = "index.Tensor"  # table[ids]: alone in counting from the end too
_ONE_HOT = "one_hot.default"


def find_ranges(program: ExportedProgram) -> dict[str, tuple[int, int]]:
    """Least and greatest value of integer inputs, by the names of their placeholders."""
    user_inputs = set(program.graph_signature.user_inputs)
    found: dict[str, tuple[int, int]] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or node.name not in user_inputs:
            continue
        if isinstance(value, torch.Tensor) and _is_integer(value.dtype):
            ranges = _ranges(node)
            if ranges:
                least, most = zip(*ranges, strict=True)
                found[str(node.name)] = (max(least), min(most))
    return found


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def _is_signed(node: Node) -> bool:
    return bool(node.meta["val"].dtype.is_signed)


def _ranges(start: Node) -> list[tuple[int, int]]:
    """Which rows each table has that these values choose from."""
    ranges: list[tuple[int, int]] = []
    waiting, seen = [start], {start}
    while waiting:
        node = waiting.pop()
        for user in node.users:
            name = str(user.target).removeprefix("aten.")
            if (limit := _limit(user, name, node)) is not None:
                ranges.append((-limit if name == _INDEX and _is_signed(start) else 0, limit - 1))
            elif _passes_on(user, name, node) and user not in seen:
                seen.add(user)
                waiting.append(user)
    return ranges


def _limit(user: Node, name: str, indices: Node) -> int | None:
    """The rows of the table that `user` looks up with `indices`."""
    if name == _ONE_HOT and user.args[0] is indices:
        classes = user.args[1] if len(user.args) > 1 else -1
        return classes if isinstance(classes, int) and classes > 0 else None
    if name == _INDEX:
        return _rows(user.args[0], _indexed_axis(user, indices))
    if name not in _LOOKUPS:
        return None
    table_at, indices_at = _LOOKUPS[name]
    if user.args[indices_at] is not indices:
        return None
    has_axis = name.startswith(("index_select", "gather"))
    return _rows(user.args[table_at], user.args[1] if has_axis else 0)


def _indexed_axis(user: Node, indices: Node) -> int | None:
    """Which axis `indices` choose from in an indexing by several tensors; None where they are a
    mask, as bytes are, or where a mask before them shifts the axes."""
    several = user.args[1]
    if not isinstance(several, list | tuple) or indices not in several:
        return None
    at = several.index(indices)
    values = [each.meta.get("val") for each in several[: at + 1] if isinstance(each, Node)]
    if any(value is None or value.dtype in (torch.bool, torch.uint8) for value in values):
        return None
    return at


def _rows(table: Argument, axis: Argument) -> int | None:
    if not isinstance(table, Node):
        return None
    value = table.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(axis, int):
        return None
    rows = value.shape[axis]
    return rows if isinstance(rows, int) and rows > 0 else None


def _passes_on(user: Node, name: str, values: Node) -> bool:
    if user.op != "call_function":
        return False
    if name == "<built-in function getitem>":
        return True
    return name in _SAME_VALUES and bool(user.args) and user.args[0] is values
