"""The tolerance of a tensor program's proof, set by how far it deviates from float64.

The rule of the proof: two forms are equal when they differ by at most 4 times what the
original itself differs from float64, but by no less than 1e-5 of the output's range.
"""

import torch

from runtime.importing.tensor_program import TensorProgram

NOISE_FACTOR = 4.0
RANGE_FLOOR = 1e-5
# Without a float64 reference, what a few hundred roundings of the dtype may add up to.
BLIND_FLOOR = {torch.float16: 16.0, torch.bfloat16: 16.0}


class Tolerance:
    """Per output: how far apart two float results may be, and the noise it came from."""

    def __init__(self, deviations: list[float | None], allowed: list[float]) -> None:
        self.deviations = deviations
        self.allowed = allowed


def find_tolerance(
    model: TensorProgram,
    batches: list[list[torch.Tensor]],
    results: list[list[torch.Tensor]],
    *,
    has_reference: bool = True,
    is_strict: bool = False,
) -> Tolerance:
    """Runs the float64 form on `batches` and compares it with the original's `results`. Without
    a reference (of a program that may be random, say) only the floors count. `is_strict`: the
    floor of half dtypes counts only where the deviation is not known."""
    references = model.run_float64(batches) if has_reference else None
    deviations: list[float | None] = []
    allowed = []
    for index in range(len(model.schema.outputs)):
        outputs = torch.cat([result[index].flatten() for result in results])
        reference = None
        if references is not None:
            reference = torch.cat([result[index].flatten() for result in references])
        deviation = _deviation(outputs, reference)
        deviations.append(deviation)
        is_blind = not is_strict or deviation is None
        floor = _floor(model, index, outputs, is_blind=is_blind)
        allowed.append(max(floor, NOISE_FACTOR * (deviation or 0.0)))
    return Tolerance(deviations, allowed)


def _deviation(outputs: torch.Tensor, reference: torch.Tensor | None) -> float | None:
    if reference is None or reference.dtype is not torch.float64 or outputs.is_complex():
        return None
    both = outputs.isfinite() & reference.isfinite()
    if not outputs.is_floating_point() or not both.any():
        return None
    return float((outputs.double() - reference)[both].abs().max())


def _floor(model: TensorProgram, index: int, outputs: torch.Tensor, *, is_blind: bool) -> float:
    if not (outputs.is_floating_point() or outputs.is_complex()):
        return 0.0  # integers and booleans are equal or they are not
    values = torch.view_as_real(outputs) if outputs.is_complex() else outputs
    known = values[values.isfinite()].double()
    if not known.numel():
        return 0.0
    span = float(known.max() - known.min()) or float(known.abs().max())
    leaf = [leaf for leaf in model.signature.outputs if leaf.spec][index]
    assert leaf.dtype is not None, "a tensor has a dtype"
    roundings = BLIND_FLOOR.get(leaf.dtype, 0.0) if is_blind else 0.0
    unit = torch.finfo(leaf.dtype).eps if roundings else 0.0
    return span * max(RANGE_FLOOR, roundings * unit)
