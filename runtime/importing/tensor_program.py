"""What a tensor program is, whatever format it came in: the seam between importing and the rest.

Each format's loader gives one of these; proof, candidates and workers need nothing else.
"""

from typing import Protocol

import torch
from torch.export import ExportedProgram

from runtime.importing.signature import Signature
from runtime.protocol import Schema

MAX_REFERENCE_BYTES = 2 * 1024**3  # weights beyond this are not copied into float64


class TensorProgram(Protocol):
    """A loaded program. Tensors go in and out in the order of `schema`, which lacks the constants
    that `signature` lists. `notes` are what its owner should know of it, in plain words;
    `example_inputs` came with it, in the order of the schema. What is learned of the inputs later
    changes these four."""

    signature: Signature
    schema: Schema
    notes: list[str]
    example_inputs: list[torch.Tensor] | None

    @property
    def program(self) -> ExportedProgram | None:
        """Its graph, where it is one that torch can compile."""
        ...

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """Its weights and constants by name, as far as they can be seen."""
        ...

    @property
    def num_parameters(self) -> int: ...

    @property
    def weight_bytes(self) -> int: ...

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs on the CPU in their wire dtypes. Whatever the program raises, this raises."""
        ...

    def run_float64(self, batches: list[list[torch.Tensor]]) -> list[list[torch.Tensor]] | None:
        """The outputs of a float64 form for each of `batches`; None where there is none."""
        ...
