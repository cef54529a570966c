"""A float64 form of an exported graph: what its rounding is measured against."""

from typing import Any

import torch
from torch.export import ExportedProgram


def widen(program: ExportedProgram) -> torch.fx.GraphModule:
    """The program's graph with every float tensor and every named float dtype made float64; the
    program's own tensors stay as they are."""
    wide = program.module(check_guards=False)
    assert isinstance(wide, torch.fx.GraphModule), "an exported program's module is a graph"
    for owner in wide.modules():
        # torch keeps parameters, buffers and plain constants apart; all are replaced, not changed.
        for tensors in (owner._parameters, owner._buffers, vars(owner)):
            _widen_tensors(tensors)
    for node in wide.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, _widen_dtype)  # type: ignore[assignment]
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, _widen_dtype)  # type: ignore[assignment]
    wide.recompile()
    return wide


def _widen_tensors(tensors: dict[str, Any]) -> None:
    for name, value in list(tensors.items()):
        if isinstance(value, torch.nn.Parameter) and value.is_floating_point():
            tensors[name] = torch.nn.Parameter(value.detach().double(), requires_grad=False)
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            tensors[name] = value.double()


def _widen_dtype(argument: object) -> object:
    if isinstance(argument, torch.dtype) and argument.is_floating_point:
        return torch.float64
    return argument
