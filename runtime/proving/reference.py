"""A float64 form of a tensor program, and the tolerance that its deviation sets.

The rule of the proof: two forms are equal when they differ by at most 4 times what the
original itself differs from float64, but by no less than 1e-5 of the output's range.
"""

import logging
from typing import Any

import torch
from torch.export import ExportedProgram

from runtime.importing.exported import ExportedProgramModel

logger = logging.getLogger(__name__)

NOISE_FACTOR = 4.0
RANGE_FLOOR = 1e-5
MAX_REFERENCE_BYTES = 2 * 1024**3  # weights beyond this are not copied into float64
# Without a float64 reference, what a few hundred roundings of the dtype may add up to.
BLIND_FLOOR = {torch.float16: 16.0, torch.bfloat16: 16.0}


class Tolerance:
    """Per output: how far apart two float results may be, and the noise it came from."""

    def __init__(self, deviations: list[float | None], allowed: list[float]) -> None:
        self.deviations = deviations
        self.allowed = allowed


def find_tolerance(
    model: ExportedProgramModel,
    batches: list[list[torch.Tensor]],
    results: list[list[torch.Tensor]],
    *,
    has_reference: bool = True,
) -> Tolerance:
    """Runs the float64 form on `batches` and compares it with the original's `results`. Without
    a reference (of a program that may be random, say) only the floors count."""
    references = _run_float64(model, batches) if has_reference else None
    deviations: list[float | None] = []
    allowed = []
    for index in range(len(model.schema.outputs)):
        outputs = torch.cat([result[index].flatten() for result in results])
        reference = None
        if references is not None:
            reference = torch.cat([result[index].flatten() for result in references])
        deviation = _deviation(outputs, reference)
        deviations.append(deviation)
        allowed.append(max(_floor(model, index, outputs), NOISE_FACTOR * (deviation or 0.0)))
    return Tolerance(deviations, allowed)


def _run_float64(
    model: ExportedProgramModel, batches: list[list[torch.Tensor]]
) -> list[list[torch.Tensor]] | None:
    if model.weight_bytes > MAX_REFERENCE_BYTES:
        return None
    try:
        module = widen(model.program)
        with torch.inference_mode():
            return [
                [output.cpu() for output in model.call(module, inputs, torch.float64)]
                for inputs in batches
            ]
    except Exception:  # many graphs fix a dtype somewhere; the floor then decides
        logger.info("the program does not run in float64", exc_info=True)
        return None


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


def _deviation(outputs: torch.Tensor, reference: torch.Tensor | None) -> float | None:
    if reference is None or reference.dtype is not torch.float64 or outputs.is_complex():
        return None
    both = outputs.isfinite() & reference.isfinite()
    if not outputs.is_floating_point() or not both.any():
        return None
    return float((outputs.double() - reference)[both].abs().max())


def _floor(model: ExportedProgramModel, index: int, outputs: torch.Tensor) -> float:
    if not (outputs.is_floating_point() or outputs.is_complex()):
        return 0.0  # integers and booleans are equal or they are not
    values = torch.view_as_real(outputs) if outputs.is_complex() else outputs
    known = values[values.isfinite()].double()
    if not known.numel():
        return 0.0
    span = float(known.max() - known.min()) or float(known.abs().max())
    leaf = [leaf for leaf in model.signature.outputs if leaf.spec][index]
    assert leaf.dtype is not None, "a tensor has a dtype"
    roundings = BLIND_FLOOR.get(leaf.dtype, 0.0)
    unit = torch.finfo(leaf.dtype).eps if roundings else 0.0
    return span * max(RANGE_FLOOR, roundings * unit)
