"""Recognises an activation that a model spells out, by what it computes."""

import math
from typing import Any

import torch
from torch import Tensor, fx

from runtime.compiling.fusions.constants import constant_nodes
from runtime.compiling.fusions.evaluated import EvaluatedGraph, op_name
from runtime.compiling.fusions.regions import (
    CASTS,
    Region,
    is_widening,
    order_of,
    regions_above,
    run_region,
)

aten = torch.ops.aten
ACTIVATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "silu": (aten.silu.default, {}),
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "relu": (aten.relu.default, {}),
}
# What an activation may be spelled with. Nothing that chooses or limits: where a clamp begins to
# matter is not for a comparison on some numbers to find out.
SMOOTH = {
    *("add", "sub", "rsub", "mul", "div", "neg", "pow", "square", "sqrt", "rsqrt", "reciprocal"),
    *("exp", "tanh", "sigmoid", "erf", "silu", "gelu", "relu", *CASTS),
}
MAX_OPERATIONS = 12
TOLERANCE = 2e-6  # in float64; constants are often cut to 6 digits
TINY, NUM_MAGNITUDES = 1e-30, 400


def name_activations(graph: EvaluatedGraph) -> int:
    """Returns how many were spelled out and are one operation now."""
    order, constants = order_of(graph), constant_nodes(graph)
    small = {each for each in constants if _is_scalar(graph, each)}

    def is_allowed(node: fx.Node) -> bool:
        return op_name(node) in SMOOTH and node not in constants

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
    if not is_widening(graph, region.nodes, before.dtype):
        return False
    numbers = _numbers(before.dtype)
    computed = _compute(graph, region, numbers)
    if computed is None:
        return False
    for function, options in ACTIVATIONS.values():
        if _is_same(numbers, function(numbers, **options), computed):
            new = graph.call(output, function, region.source, **options)
            return graph.replace(output, new)
    return False


def _numbers(dtype: torch.dtype) -> Tensor:
    """Every magnitude of the dtype, the curved middle closely, and what is no finite number."""
    largest = torch.finfo(dtype).max
    exponents = torch.linspace(math.log10(TINY), math.log10(largest), NUM_MAGNITUDES)
    sizes = torch.cat([10 ** exponents.double(), torch.tensor([largest]).double()])
    middle = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    special = torch.tensor([0.0, math.inf, -math.inf, math.nan], dtype=torch.float64)
    return torch.cat([middle, sizes.clamp(max=largest), -sizes.clamp(max=largest), special])


def _is_same(numbers: Tensor, expected: Tensor, found: Tensor) -> bool:
    """Equal but for rounding, as a share of the larger numbers and of the smaller ones too. At
    infinity an activation is what its formula gives there, a number or none."""
    is_finite = numbers.isfinite()
    error = (expected - found).abs()[is_finite]
    limit = TOLERANCE * (2 * expected.abs() + numbers.abs().clamp(max=1))[is_finite]
    is_close = bool((error <= limit).all())
    infinite, nan = numbers.isinf(), numbers.isnan()
    one, other = expected[infinite], found[infinite]
    is_close &= bool(((one == other) | one.isnan() | other.isnan()).all())
    return is_close and bool(found[nan].isnan().all())


def _compute(graph: EvaluatedGraph, region: Region, numbers: Tensor) -> Tensor | None:
    given = {node: values[0] for node, values in graph.values.items()}
    result = run_region(graph, region, numbers, given, keeps_dtype=True)
    return result if result.shape == numbers.shape and result.dtype == numbers.dtype else None
