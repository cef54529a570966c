"""Finds outputs that never change, however different the inputs: most likely a mistake of export
or training, which runs alone can show."""

import torch

from runtime.importing.tensor_program import TensorProgram
from runtime.proving.comparing import Outputs, same_bits
from runtime.proving.inputs import InputMaker

NUM_ROWS = 4
SEEDS = (11, 12, 13)
FAR = 10.0  # how much larger the values of the farthest inputs are


def constant_warnings(model: TensorProgram, maker: InputMaker) -> dict[str, str]:
    """By name, a sentence for every output that is the same in all runs, or never a number."""
    batches = [maker.make(NUM_ROWS, seed) for seed in SEEDS]
    batches.append([_far(tensor, index, model) for index, tensor in enumerate(batches[0])])
    results = [model.run(inputs) for inputs in batches]
    warnings: dict[str, str] = {}
    for index, spec in enumerate(model.schema.outputs):
        outputs = [result[index] for result in results]
        if _is_nan(outputs):
            warnings[spec.name] = (
                f"The output {spec.name!r} was NaN in every run: the weights or an operation of "
                "the model (a division by zero, a logarithm of a negative number) spoil it."
            )
        elif _is_constant(outputs):
            warnings[spec.name] = (
                f"The output {spec.name!r} never changed: {len(batches)} very different inputs all "
                "gave the same values. If that is not meant, the model may have been exported "
                "with values fixed that should come from its inputs, or its training may have "
                "failed."
            )
    return warnings


def _far(tensor: torch.Tensor, index: int, model: TensorProgram) -> torch.Tensor:
    """Much larger values, where the schema allows any."""
    spec = model.schema.inputs[index]
    if spec.maximum is None and tensor.is_floating_point():
        return tensor * FAR + FAR
    return tensor


def _is_constant(outputs: Outputs) -> bool:
    """Equal in all runs, whose shapes are the same; of nothing there is nothing to tell."""
    first = outputs[0]
    return bool(first.numel()) and all(
        other.shape == first.shape and same_bits(first, other) for other in outputs[1:]
    )


def _is_nan(outputs: Outputs) -> bool:
    return all(
        output.numel() and output.is_floating_point() and bool(output.isnan().all())
        for output in outputs
    )
