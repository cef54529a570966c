"""Refuses attentions that do to scores or weights what no look at a few of them would show.

Owns the operators that may stand between queries times keys and the softmax, and between it and
the values: each score by itself, and next to nothing. What scores become is `classify.py`'s.
"""

import math

from torch.fx import Node

from runtime.compiling.paging.evaluation import Evaluator
from runtime.compiling.paging.normal import op_name
from runtime.compiling.paging.refusal import NotPageable
from runtime.compiling.paging.row_rules import arguments_of, is_elementwise
from runtime.compiling.paging.shapes import tensor_of
from runtime.compiling.paging.sites import Site

_CASTS = frozenset({"to", "_to_copy", "type_as", "clone", "contiguous"})
_RESHAPES = frozenset({"reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "expand"})
_ORDERS = frozenset({"transpose", "permute"})
_MAXIMA = frozenset({"amax", "max"})
# Of a row of scores, whether it sees nothing: `_safe_softmax` taken apart.
_BLIND = frozenset({"eq", "isneginf", "all", "any", "logical_not", "bitwise_not"})


def check_paths(site: Site, evaluator: Evaluator) -> None:
    """Raises `NotPageable` where keys meet before the softmax, or weights change after it."""
    if site.scores is None:
        return
    assert site.softmax_input is not None, "written out"
    assert site.softmax is not None, "written out"
    path = _between(site.softmax_input, site.scores.node, evaluator)
    for node in path:
        if not _is_each_score(node, evaluator):
            raise NotPageable(
                f"The scores of an attention meet each other before the softmax ({op_name(node)})."
            )
    seen = {*path, site.scores.node}
    node = site.softmax
    while node is not site.weights:
        (node,) = (user for user in node.users if node in evaluator.sources(user))
        if not _keeps_weights(node, seen, evaluator):
            raise NotPageable(
                f"The weights of an attention are changed after the softmax ({op_name(node)})."
            )


def _between(root: Node, stop: Node, evaluator: Evaluator) -> list[Node]:
    """All that is computed from `stop` on the way to `root`, which is the first."""
    seen: dict[Node, None] = {}
    pending = [root]
    while pending:
        node = pending.pop()
        if node not in seen and node is not stop and not evaluator.is_fixed(node):
            seen[node] = None
            pending.extend(evaluator.sources(node))
    return list(seen)


def _is_each_score(node: Node, evaluator: Evaluator) -> bool:
    name = op_name(node)
    if name in _MAXIMA and not is_elementwise(node):
        return all(_is_shift(user, node) for user in _values_of(node))
    if name == "getitem":  # of a maximum with its place, which nothing may look at
        return node.args[1] in (0,)
    if name in _ORDERS:
        return _keeps_order(node, evaluator)
    if name == "cat":  # sinks
        parts = [part for part in node.all_input_nodes if not evaluator.is_fixed(part)]
        return len(parts) == 1 and arguments_of(node)["tensors"][0] is parts[0]
    return name in _RESHAPES or name in _CASTS or is_elementwise(node)


def _values_of(maximum: Node) -> list[Node]:
    """Who reads a maximum over keys."""
    found: list[Node] = []
    for user in maximum.users:
        found += list(user.users) if op_name(user) == "getitem" else [user]
    return found


def _is_shift(user: Node, maximum: Node) -> bool:
    """`x - max(x)` over the keys, which no softmax sees."""
    dim = arguments_of(maximum).get("dim")
    source = tensor_of(maximum.args[0])
    assert source is not None, "a maximum of a tensor"
    dims = [dim] if isinstance(dim, int) else list(dim or [])
    is_last = [at % source.dim() for at in dims] == [source.dim() - 1]
    return (
        is_last and op_name(user) == "sub" and user.args[0] is maximum.args[0] and not user.kwargs
    )


def _keeps_order(node: Node, evaluator: Evaluator) -> bool:
    """Whether queries still stand before keys."""
    source = node.args[0]
    assert isinstance(source, Node), "an order of a tensor's axes"
    tensor = tensor_of(source)
    assert tensor is not None, "an order of a tensor's axes"
    dims = tensor.dim()
    order = list(range(dims))
    if op_name(node) == "permute":
        order = [int(at) % dims for at in node.args[1]]  # type: ignore[union-attr, arg-type]
    else:
        one, other = (int(at) % dims for at in node.args[1:3])  # type: ignore[arg-type]
        order[one], order[other] = order[other], order[one]
    places = [order.index(axis) for axis in evaluator.lengths.token_axes(source)]
    return places == sorted(places)


def _keeps_weights(node: Node, seen: set[Node], evaluator: Evaluator) -> bool:
    """`seen` are the scores on their way to the softmax."""
    name = op_name(node)
    arguments = arguments_of(node)
    if name == "slice":  # sinks are dropped
        tensor = tensor_of(node)
        assert tensor is not None, "a slice is a tensor"
        is_last = int(arguments["dim"]) % tensor.dim() == tensor.dim() - 1
        return is_last and arguments["start"] in (0, None) and arguments["step"] == 1
    if name in ("where", "masked_fill"):
        condition = arguments["condition" if name == "where" else "mask"]
        return _is_blind(condition, seen, evaluator)
    if name in _ORDERS:
        return _keeps_order(node, evaluator)
    return name in _RESHAPES or name in _CASTS or name == "nan_to_num"


def _is_blind(condition: Node, seen: set[Node], evaluator: Evaluator) -> bool:
    """Whether a condition only asks whether scores are minus infinity."""
    node = condition
    while op_name(node) in _BLIND:
        if op_name(node) == "eq" and node.args[1] != -math.inf:
            return False
        source = node.args[0]
        assert isinstance(source, Node), "an operator of a tensor"
        node = source
    is_row = not evaluator.is_fixed(condition) and len(evaluator.lengths.token_axes(condition)) == 1
    return is_row and node in seen and node is not condition
