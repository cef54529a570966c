"""A few inputs and what a form gave for them when it was made, kept beside it.

A worker runs them before it serves: a form that answers otherwise here than where it was proved
is not used. They are also its first runs, so that the first caller does not pay for them.
"""

import json
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.compiling.forms.form import FormFailure, Run

WITNESS_NAME = "witness.safetensors"
# Shares of an output's range: the same code on the same machine differs by its order of sums.
_LEAST_SHARE, _MOST_SHARE = 1e-4, 0.05
_ROUNDINGS = 8.0


def keep_witness(run: Run, inputs: list[Tensor], directory: Path, dtype: torch.dtype) -> None:
    """Write what `run` gives for `inputs` beside the form; `dtype` is that of its arithmetic."""
    outputs = run(inputs)
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else _MOST_SHARE
    share = min(_MOST_SHARE, max(_LEAST_SHARE, _ROUNDINGS * eps))
    tensors = {f"input_{index}": _storable(tensor) for index, tensor in enumerate(inputs)}
    tensors |= {f"output_{index}": _storable(tensor) for index, tensor in enumerate(outputs)}
    is_complex = [index for index, tensor in enumerate(inputs) if tensor.is_complex()]
    about = {"share": str(share), "complex_inputs": json.dumps(is_complex)}
    save_file(tensors, directory / WITNESS_NAME, about)


def check_witness(run: Run, directory: Path) -> None:
    """Raises `FormFailure` when the form does not answer as it did when it was made."""
    try:
        tensors = load_file(directory / WITNESS_NAME)
        with safetensors.safe_open(directory / WITNESS_NAME, "pt") as file:
            about = file.metadata() or {}
        share, is_complex = float(about["share"]), set(json.loads(about["complex_inputs"]))
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise FormFailure(f"{WITNESS_NAME} of the form cannot be read: {error}.") from error
    num_inputs = sum(name.startswith("input_") for name in tensors)
    inputs = [tensors[f"input_{index}"] for index in range(num_inputs)]
    inputs = [
        torch.view_as_complex(tensor) if index in is_complex else tensor
        for index, tensor in enumerate(inputs)
    ]
    try:
        outputs = run(inputs)
    except Exception as error:  # whatever a compiled form raises
        raise FormFailure(f"It fails on inputs that it took when it was made: {error}.") from error
    if len(outputs) != len(tensors) - num_inputs:
        raise FormFailure("It gives another number of outputs than when it was made.")
    for index, output in enumerate(outputs):
        if not _is_close(_storable(output), tensors[f"output_{index}"], share):
            raise FormFailure("It gives other answers than it did when it was made.")


def _storable(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.contiguous().clone()


def _is_close(actual: Tensor, expected: Tensor, share: float) -> bool:
    """Integers are equal or they are not; NaN equals NaN and infinity itself."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    known = expected[expected.isfinite()].double()
    span = float(known.max() - known.min()) or float(known.abs().max()) if known.numel() else 0.0
    return torch.allclose(
        actual.double(), expected.double(), rtol=0.0, atol=span * share, equal_nan=True
    )
