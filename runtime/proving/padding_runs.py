"""Runs rows of several lengths together, padded, and compares them with their answers alone.

Owns one run, not which rows and values are tried: `padding.py` and `padding_reach.py`.
"""

from collections.abc import Sequence

import torch

from runtime.importing.tensor_program import TensorProgram
from runtime.proving.comparing import compare
from runtime.proving.padding_trial import Trial


def run_error(
    model: TensorProgram,
    trial: Trial,
    values: list[float],
    filled: dict[int, torch.Tensor],
    picked: Sequence[tuple[int, int]],
    length: int,
) -> float:
    """Of one run, of so many rows of each of the lengths at the places `picked`."""
    inputs = []
    for at, axis in enumerate(trial.input_axes):
        tensors = [trial.batches[place][at][:num_rows] for place, num_rows in picked]
        if axis is not None:
            tensors = [_pad(each, axis, length, values[at], filled.get(at)) for each in tensors]
        inputs.append(torch.cat(tensors))
    outputs = model.run(inputs)
    worst = 0.0
    start = 0
    for place, most in picked:
        answer = [output[:most] for output in trial.answers[place]]
        stop = start + len(trial.batches[place][0][:most])
        mine = [
            _cut(output[start:stop], axis, trial.lengths[place])
            for output, axis in zip(outputs, trial.output_axes, strict=True)
        ]
        worst = max(worst, compare(answer, mine, trial.tolerance)[0])
        start = stop
    return worst


def _cut(output: torch.Tensor, axis: int | None, length: int) -> torch.Tensor:
    return output if axis is None else output.narrow(axis, 0, length)


def _pad(
    tensor: torch.Tensor, axis: int, length: int, value: float, filled: torch.Tensor | None
) -> torch.Tensor:
    shape = list(tensor.shape)
    own = shape[axis]
    shape[axis] = length
    padded = tensor.new_full(shape, value)
    if filled is not None:
        padded.copy_(filled.narrow(axis, 0, length).expand(shape))
    padded.narrow(axis, 0, own).copy_(tensor)
    return padded
