"""Copies an exported program's graph, laying open the regions that torch wraps.

A `no_grad` region inside a model becomes a graph of its own in an export; for inference it is
just part of the whole. Owns nothing of what the copied nodes mean.
"""

from typing import Any

import torch
from torch import fx
from torch.fx import Node
from torch.utils import _pytree as pytree

from runtime.compiling.paging.refusal import NotPageable

# Wrapped graph, which argument it is, and where its own arguments start.
WRAPPERS = {"wrap_with_set_grad_enabled": (1, 2)}


def copy_graph(source: fx.Graph, target: fx.Graph, input_at: int) -> tuple[Node, list[Any]]:
    """(the copied token ids, the flat outputs). Raises `NotPageable` if another placeholder than
    `input_at` is used."""
    copies: dict[Node, Any] = {}
    ids: Node | None = None
    for at, node in enumerate(source.find_nodes(op="placeholder")):
        if at == input_at:
            ids = target.placeholder("input_ids")
            ids.meta = dict(node.meta)
            copies[node] = ids
        elif node.users:
            raise NotPageable("An argument beside the token ids takes part in the computation.")
    assert ids is not None, "the signature names the input"
    return ids, _copy_nodes(source, target, copies)


def attribute(module: torch.nn.Module | None, path: str) -> Any:
    """What a `get_attr` node gives."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def is_wrapper(node: Node) -> bool:
    """Whether a node calls a graph that can be laid open."""
    return getattr(node.target, "__name__", "") in WRAPPERS and isinstance(
        node.target, torch._ops.HigherOrderOperator
    )


def _copy_nodes(source: fx.Graph, target: fx.Graph, copies: dict[Node, Any]) -> list[Any]:
    """Copies all but placeholders, which are in `copies` already; returns the flat outputs."""
    outputs: list[Any] = []
    for node in source.nodes:
        if node.op == "output":
            leaves = pytree.tree_leaves(node.args)
            outputs = [copies.get(leaf) if isinstance(leaf, Node) else leaf for leaf in leaves]
        elif node.op == "call_module":
            if node.users:
                raise NotPageable("The graph calls a module that cannot be looked into.")
        elif is_wrapper(node):
            copies[node] = _lay_open(node, target, copies)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            raise NotPageable(
                f"The graph holds control flow or a wrapped region ({node.target.__name__}) that "
                "cannot be looked into."
            )
        elif node in copies or node.op == "placeholder" or _is_graph(node):
            continue
        elif _takes_from(node, copies):
            copies[node] = copies[node.args[0]][node.args[1]]
        else:
            copies[node] = target.node_copy(node, lambda old: copies[old])
            if node.op == "get_attr":
                value = attribute(source.owning_module, str(node.target))
                copies[node].meta["val"] = torch.empty_like(value, device="meta")
    return outputs


def _is_graph(node: Node) -> bool:
    if node.op != "get_attr":
        return False
    value = attribute(node.graph.owning_module, str(node.target))
    return isinstance(value, torch.nn.Module)


def _takes_from(node: Node, copies: dict[Node, Any]) -> bool:
    """Whether a node picks one output of a graph that was laid open."""
    source = node.args[0] if node.args else None
    return (
        getattr(node.target, "__name__", "") == "getitem"
        and isinstance(source, Node)
        and isinstance(copies.get(source), list)
    )


def _lay_open(node: Node, target: fx.Graph, copies: dict[Node, Any]) -> list[Any]:
    graph_at, first = WRAPPERS[node.target.__name__]  # type: ignore[union-attr]
    holder = node.args[graph_at]
    assert isinstance(holder, Node), "a wrapped graph is an attribute"
    inner = attribute(node.graph.owning_module, str(holder.target))
    placeholders = inner.graph.find_nodes(op="placeholder")
    arguments = [copies[value] if isinstance(value, Node) else value for value in node.args[first:]]
    return _copy_nodes(inner.graph, target, dict(zip(placeholders, arguments, strict=True)))
