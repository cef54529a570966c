"""A program's graph in the precision of a form.

Weights, constants and the dtypes that the graph names change; integers, masks and what requests
and answers look like do not. Sums inside norms and softmax stay as wide as the operators' own.
"""

import math
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx.node import map_aggregate

from runtime.compiling.paging.cast import cast
from runtime.importing.tensor_program import TensorProgram

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def uploaded_precision(program: TensorProgram) -> str:
    """The floating dtype of most of its weights, as "float32"."""
    counts: dict[torch.dtype, int] = {}
    for tensor in program.state.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    widest = max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
    return str(widest).removeprefix("torch.")


def in_precision(graph: ExportedProgram, precision: str) -> ExportedProgram:
    """`graph`, which stays as it is, in `precision`."""
    if precision not in DTYPES:
        return graph
    dtype = DTYPES[precision]
    narrowed = cast(graph, dtype)
    _bound_numbers(narrowed, dtype)
    for before, after in (
        (graph.state_dict, narrowed.state_dict),
        (graph.constants, narrowed.constants),
    ):
        _bound_tensors(before, after, dtype)
    return narrowed


def _bound_numbers(program: ExportedProgram, dtype: torch.dtype) -> None:
    """Numbers in the graph that `dtype` cannot hold become the largest that it can. Masks are made
    of float32's least number; infinity in its place makes NaN of a row that is masked whole."""
    limit = torch.finfo(dtype).max

    def bound(value: Any) -> Any:
        if isinstance(value, float) and math.isfinite(value):
            return max(-limit, min(limit, value))
        return value

    for node in program.graph.nodes:
        node.args = map_aggregate(node.args, bound)  # type: ignore[assignment]
        node.kwargs = map_aggregate(node.kwargs, bound)  # type: ignore[assignment]
    program.graph_module.recompile()


def _bound_tensors(
    before: Mapping[str, Any], after: MutableMapping[str, Any], dtype: torch.dtype
) -> None:
    """Likewise for the numbers in weights and constants."""
    limit = torch.finfo(dtype).max
    for name, narrow in after.items():
        wide = before.get(name)
        if not isinstance(narrow, torch.Tensor) or not isinstance(wide, torch.Tensor):
            continue
        if narrow.dtype != dtype or not (narrow.isinf() & wide.isfinite()).any():
            continue
        bounded = torch.where(wide.isfinite(), wide.clamp(-limit, limit), wide).to(dtype)
        is_parameter = isinstance(narrow, torch.nn.Parameter)
        after[name] = torch.nn.Parameter(bounded, requires_grad=False) if is_parameter else bounded
