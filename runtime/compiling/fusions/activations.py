"""Recognises an activation that a model spells out, by what it computes."""

from typing import Any

import torch
from torch import Tensor, fx

from runtime.compiling.fusions.constants import constant_nodes
from runtime.compiling.fusions.evaluated import EvaluatedGraph, op_name
from runtime.compiling.fusions.flattening import POINTWISE
from runtime.compiling.fusions.regions import Region, order_of, regions_above, run_region

aten = torch.ops.aten
ACTIVATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "silu": (aten.silu.default, {}),
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "relu": (aten.relu.default, {}),
}
MAX_OPERATIONS = 12
TOLERANCE = 2e-6  # over numbers up to 12 in float64; constants are often cut to 6 digits


def name_activations(graph: EvaluatedGraph) -> int:
    """Returns how many were spelled out and are one operation now."""
    order, constants = order_of(graph), constant_nodes(graph)
    small = {each for each in constants if _is_scalar(graph, each)}

    def is_allowed(node: fx.Node) -> bool:
        return op_name(node) in POINTWISE and node not in constants

    num_named = 0
    for node in reversed(list(graph.graph.nodes)):
        if node in order and is_allowed(node) and node.users:
            regions = regions_above(node, order, small, is_allowed, MAX_OPERATIONS)
            num_named += any(_name(graph, region) for region in reversed(regions))
    graph.drop_dead()
    return num_named


def activation_of(node: fx.Node) -> str | None:
    """The name in `ACTIVATIONS` of a node that is one."""
    name = op_name(node)
    if name == "gelu":
        approximate = node.kwargs.get("approximate", (*node.args[1:], "none")[0])
        return "gelu_tanh" if approximate == "tanh" else "gelu"
    return name if name in ACTIVATIONS else None


def _is_scalar(graph: EvaluatedGraph, node: fx.Node) -> bool:
    value = graph.tensor(node)
    return value is not None and value.numel() == 1


def _name(graph: EvaluatedGraph, region: Region) -> bool:
    output = region.nodes[-1]
    if len(region.nodes) < 2 or graph.shape(region.source) != graph.shape(output):
        return False
    before, after = graph.tensor(region.source), graph.tensor(output)
    if before is None or after is None or before.dtype != after.dtype:
        return False
    if not before.is_floating_point():
        return False
    numbers = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    computed = _compute(graph, region, numbers)
    if computed is None:
        return False
    for function, options in ACTIVATIONS.values():
        if (function(numbers, **options) - computed).abs().max() <= TOLERANCE:
            new = graph.call(output, function, region.source, **options)
            return graph.replace(output, new)
    return False


def _compute(graph: EvaluatedGraph, region: Region, numbers: Tensor) -> Tensor | None:
    given = {node: values[0] for node, values in graph.values.items()}
    result = run_region(graph, region, numbers, given, keeps_dtype=True)
    return result if result.shape == numbers.shape and result.dtype == numbers.dtype else None
