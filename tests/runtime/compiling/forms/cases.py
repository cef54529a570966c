"""Small programs of every shape that forms must cope with, and the forms made of them."""

import warnings
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn
from torch.export import Dim

from runtime.compiling.forms import FORMS, Run, load_form, make_form
from runtime.importing.exported import load_exported
from runtime.importing.tensor_program import TensorProgram
from tests.runtime.importing.programs import Classifier, Digits, export

ROWS = {0: Dim.DYNAMIC}
ROWS_AND_TOKENS = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
MAX_ROWS = 16


class Recurrent(nn.Module):
    """An LSTM; beside its answer it returns things that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(6, 12, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, steps: Tensor) -> tuple[Tensor, None, int]:
        hidden, _ = self.memory(steps)
        return self.head(hidden[:, -1]), None, 3


class Transformer(nn.Module):
    """Attention under a mask of its own making, from a nested input."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        states = self.embedding(batch["ids"])
        bias = (1.0 - batch["mask"])[:, None, :] * torch.finfo(states.dtype).min
        scores = self.query(states) @ self.key(states).transpose(1, 2) / 4.0 + bias
        states = self.norm(states + scores.softmax(-1) @ self.value(states))
        return self.head(states[:, 0])


class Case(msgspec.Struct, frozen=True):
    """A loaded program, and inputs of as many rows as asked for; of texts, of as many tokens."""

    program: TensorProgram
    make: Callable[..., list[Tensor]]


def _ids_and_mask(vocab_size: int) -> Callable[..., list[Tensor]]:
    def make(rows: int, tokens: int = 5) -> list[Tensor]:
        generator = torch.Generator().manual_seed(rows)
        mask = torch.ones(rows, tokens)
        mask[:, 3:] = 0
        return [torch.randint(0, vocab_size, (rows, tokens), generator=generator), mask]

    return make


def _floats(*shape: int) -> Callable[..., list[Tensor]]:
    return lambda rows: [torch.rand(rows, *shape, generator=torch.Generator().manual_seed(rows))]


def _digits(path: Path) -> Case:
    export(path, Digits().eval(), torch.rand(2, 1, 8, 8))
    return Case(load_exported(path), _floats(1, 8, 8))


def _classifier(path: Path) -> Case:
    arguments = torch.randint(0, 50, (2, 7)), torch.ones(2, 7), True
    axes = (ROWS_AND_TOKENS, ROWS_AND_TOKENS, None)
    export(path, Classifier().eval(), *arguments, dynamic=axes)
    return Case(load_exported(path), _ids_and_mask(50))


def _recurrent(path: Path) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about an LSTM's flat weights
        export(path, Recurrent().eval(), torch.rand(2, 5, 6))
    return Case(load_exported(path), _floats(5, 6))


def _transformer(path: Path) -> Case:
    batch = {"ids": torch.randint(0, 40, (2, 7)), "mask": torch.ones(2, 7)}
    axes = ({"ids": ROWS_AND_TOKENS, "mask": ROWS_AND_TOKENS},)
    export(path, Transformer().eval(), batch, dynamic=axes)
    return Case(load_exported(path), _ids_and_mask(40))


CASES = {
    "digits": _digits,
    "classifier": _classifier,
    "recurrent": _recurrent,
    "transformer": _transformer,
}


def make_and_load(name: str, case: Case, directory: Path) -> Run:
    """A form as a worker would have it: loaded without its program."""
    form = next(form for form in FORMS if form.name == name)
    calibration = [case.make(rows) for rows in (2, 8, MAX_ROWS)]
    make_form(
        form, case.program, directory, max_rows=MAX_ROWS, calibration=calibration, num_threads=1
    )
    return load_form(name, None, directory, device="cpu", num_threads=1)
