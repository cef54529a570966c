"""One batch that a candidate is asked, with the right answer."""

import msgspec
import torch

from runtime.proving.comparing import Outputs
from runtime.proving.reference import Tolerance

Inputs = list[torch.Tensor]


class Case(msgspec.Struct, frozen=True):
    """One batch, what the program as uploaded answers, and how far off an answer may be.
    `compared` has a mask for each output; None: all of it counts."""

    name: str
    inputs: Inputs
    expected: Outputs
    tolerance: Tolerance
    compared: list[torch.Tensor] | None = None

    @property
    def num_rows(self) -> int:
        """Of a batched program."""
        return self.inputs[0].shape[0]
