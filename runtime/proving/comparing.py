"""Compares outputs of tensor programs: how far apart they are, in multiples of what is allowed.

What is allowed is `reference.py`'s; what follows from it is the proof's.
"""

import math

import torch

from runtime.proving.reference import Tolerance

Outputs = list[torch.Tensor]


def compare(expected: Outputs, actual: Outputs, tolerance: Tolerance) -> tuple[float, bool]:
    """The largest error as a multiple of what is allowed, and whether all is within. NaN equals
    NaN and infinity itself; a NaN on one side alone is an infinite error."""
    worst = 0.0
    for left, right, allowed in zip(expected, actual, tolerance.allowed, strict=True):
        if left.shape != right.shape or left.dtype != right.dtype:
            return math.inf, False
        if not (left.is_floating_point() or left.is_complex()):
            worst = max(worst, 0.0 if torch.equal(left, right) else math.inf)
            continue
        is_same = (left == right) | (left.isnan() & right.isnan())
        error = torch.where(is_same, torch.zeros_like(left), left - right).abs().double()
        error = error.nan_to_num(nan=math.inf)
        largest = float(error.max()) if error.numel() else 0.0
        if largest:
            worst = max(worst, largest / allowed if allowed else math.inf)
    return worst, worst <= 1.0


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """NaN included."""
    return left.shape == right.shape and torch.equal(
        left.contiguous().reshape(-1).view(torch.uint8),
        right.contiguous().reshape(-1).view(torch.uint8),
    )


def is_logits(output: torch.Tensor) -> bool:
    """Whether the largest value along the last axis may mean something."""
    return output.is_floating_point() and output.dim() >= 2 and output.shape[-1] >= 2


def take_rows(tensors: list[torch.Tensor], picked: list[int]) -> list[torch.Tensor]:
    """These rows of each."""
    return [tensor[picked] for tensor in tensors]


def finite(error: float) -> float | None:
    """None for what JSON cannot say."""
    return error if math.isfinite(error) else None
