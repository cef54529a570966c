"""What an optimised form of a tensor program is, and what a family of forms must do.

Owns the words; the table of forms is `table.py`'s, each family has a file of its own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from runtime.importing.tensor_program import TensorProgram

# Wire tensors in the schema's order in, and out, on the CPU.
Run = Callable[[list[torch.Tensor]], list[torch.Tensor]]


class Form(msgspec.Struct, frozen=True):
    """One way to run a program. `precision` is that of its arithmetic: "uploaded", "bfloat16",
    "float16" or "int8"; a lossy one answers measurably otherwise by definition."""

    name: str
    precision: str = "uploaded"
    is_lossy: bool = False


class FormFailure(Exception):
    """A form cannot be made of this program, or cannot be loaded; the text says why in one plain
    sentence."""


class Making(msgspec.Struct, frozen=True):
    """What a family makes a form from. `directory` is empty and gets what a worker loads, `inputs`
    of 1 to `max_rows` rows are what the program is known to take."""

    form: Form
    program: TensorProgram
    directory: Path
    max_rows: int
    inputs: list[list[torch.Tensor]]
    num_threads: int
    device: str


class Loading(msgspec.Struct, frozen=True):
    """What a family loads a form from. Compiled forms need no `program`: a worker does not hold
    the weights twice."""

    form: Form
    program: TensorProgram | None
    directory: Path
    device: str
    num_threads: int


class Family(Protocol):
    """Makes and loads the forms of one compiler or runtime. Whatever `make` and `load` raise is
    caught by the table; reasons that they know are `FormFailure`s."""

    def suits(self, form: Form, program: TensorProgram, device: str) -> bool:
        """Whether the program is one that this family could ever run there."""
        ...

    def unavailable(self, form: Form, device: str) -> str | None:
        """Why this box cannot have the form, in one plain sentence; None if it can."""
        ...

    def make(self, making: Making) -> None: ...

    def load(self, loading: Loading) -> Run: ...
