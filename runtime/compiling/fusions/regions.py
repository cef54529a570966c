"""Finds the one value that a node is computed from, and runs what lies between on other values."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from runtime.compiling.fusions.evaluated import EvaluatedGraph, fetch, op_name

CASTS = ("to", "_to_copy", "type_as", "float")


@dataclass(frozen=True)
class Region:
    """The nodes, in graph order, that compute the last of them from `source` alone, beside what
    the search was told to take as given."""

    source: fx.Node
    nodes: tuple[fx.Node, ...]


def regions_above(
    output: fx.Node,
    order: Mapping[fx.Node, int],
    given: set[fx.Node],
    is_allowed: Callable[[fx.Node], bool],
    max_nodes: int = 48,
) -> list[Region]:
    """Every region that ends in `output`, smallest first, whose nodes are all allowed."""
    found: list[Region] = []
    nodes: list[fx.Node] = []
    frontier = {output}
    while len(nodes) < max_nodes:
        last = max(frontier, key=order.__getitem__)
        if not is_allowed(last):
            break
        frontier.discard(last)
        nodes.append(last)
        frontier.update(each for each in last.all_input_nodes if each not in given)
        if not frontier:
            break
        if len(frontier) == 1:
            found.append(Region(next(iter(frontier)), tuple(reversed(nodes))))
    return found


def run_region(
    graph: EvaluatedGraph,
    region: Region,
    source: Tensor,
    given: Mapping[fx.Node, Any],
    keeps_dtype: bool = False,
) -> Tensor:
    """What the region gives for another source. `keeps_dtype` skips its casts, so that angles and
    scales come out unrounded."""
    env: dict[fx.Node, Any] = {region.source: source}
    for node in region.nodes:
        if keeps_dtype and op_name(node) in CASTS:
            env[node] = _look_up(node.args[0], env, given)
            continue
        env[node] = run_node(graph, node, lambda each: _look_up(each, env, given))
    return env[region.nodes[-1]]


def is_widening(graph: EvaluatedGraph, nodes: Iterable[fx.Node], dtype: torch.dtype) -> bool:
    """Whether every cast among the nodes keeps all numbers of `dtype` as they are."""
    values = (graph.tensor(node) for node in nodes if op_name(node) in CASTS)
    return all(
        value is not None
        and (value.is_floating_point() or value.is_complex())
        and torch.promote_types(value.dtype, dtype) == value.dtype
        for value in values
    )


def _look_up(node: Any, env: Mapping[fx.Node, Any], given: Mapping[fx.Node, Any]) -> Any:
    return env[node] if node in env else given[node]


def run_node(graph: EvaluatedGraph, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """One function, method or constant."""
    if node.op == "get_attr":
        return fetch(graph.module, str(node.target))
    args = fx.map_arg(node.args, value_of)
    kwargs = fx.map_arg(node.kwargs, value_of)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert node.op == "call_function"
    assert callable(node.target)
    return node.target(*args, **kwargs)


def ancestors(nodes: Iterable[fx.Node], order: Mapping[fx.Node, int]) -> list[fx.Node]:
    """The nodes and all that they are computed from, in graph order."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return sorted(found, key=order.__getitem__)


def order_of(graph: EvaluatedGraph) -> dict[fx.Node, int]:
    """Where each node stands."""
    return {node: at for at, node in enumerate(graph.graph.nodes)}
