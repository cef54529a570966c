"""A decoder program in another floating dtype, for proofs.

Owns the conversion of weights and of the places where the graph names its own dtype. Other
dtypes that it names (float32 inside a bfloat16 model's norms, say) stay.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.node import map_aggregate

from runtime.compiling.paging.normal import functional


def cast(program: ExportedProgram, dtype: torch.dtype) -> ExportedProgram:
    """A program whose own floating dtype is `dtype`; the given one stays as it is."""
    program = functional(program)
    own = _own_dtype(program)
    if own == dtype:
        return program

    def convert(value: Any) -> Any:
        return dtype if value is own else value

    def convert_tensor(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != own:
            return value
        if isinstance(value, torch.nn.Parameter):
            return torch.nn.Parameter(value.detach().to(dtype), requires_grad=False)
        return value.detach().to(dtype)

    graph_module = torch.fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
    for node in graph_module.graph.nodes:
        node.args = map_aggregate(node.args, convert)  # type: ignore[assignment]
        node.kwargs = map_aggregate(node.kwargs, convert)  # type: ignore[assignment]
        node.meta["val"] = map_aggregate(node.meta.get("val"), convert_tensor)
    graph_module.recompile()
    graph_module.meta.update(program.graph_module.meta)
    return ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict={name: convert_tensor(value) for name, value in program.state_dict.items()},
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants={name: convert_tensor(value) for name, value in program.constants.items()},
        verifiers=program.verifiers,
    )


def _own_dtype(program: ExportedProgram) -> torch.dtype:
    counts: dict[torch.dtype, int] = {}
    for tensor in program.state_dict.values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
