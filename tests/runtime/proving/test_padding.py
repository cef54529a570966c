"""Padding is allowed exactly where it is harmless; models that only seem to bear it are found."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from runtime.importing.exported import load_exported
from runtime.proving import padding_reach
from runtime.proving.padding import Padding, find_padding
from runtime.proving.tensor import TensorProof, prove_tensor
from tests.runtime.importing.programs import export

LENGTH = Dim("length", min=1, max=64)
ROWS = {0: Dim.DYNAMIC, 1: LENGTH}
PROVED = {"padding": True, "padding, filled": True, "padding, long": True}
IDS = torch.tensor([[0, 19, 3, 7, 2, 5], [1, 2, 3, 4, 9, 8]])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pt2"


def prove(path: Path, module: nn.Module, **inputs: torch.Tensor) -> TensorProof:
    dynamic = dict.fromkeys(inputs, ROWS)
    export(path, module.eval(), dynamic=dynamic, **inputs)
    return prove_tensor(load_exported(path), 16)


def padding_checks(proof: TensorProof) -> dict[str, bool]:
    return {c.name: c.is_equal for c in proof.checks if c.name.startswith("padding")}


def rules(proof: TensorProof) -> list[tuple[str, int | None, float]]:
    specs = [*proof.schema.inputs, *proof.schema.outputs]
    return [(spec.name, spec.padded_axis, spec.pad_value) for spec in specs]


class Attention(nn.Module):
    """A layer of a transformer over embedded tokens, and what is made of them: each token's
    state, and their mean where the mask shows them."""

    def __init__(self, *, is_hiding: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.is_hiding = is_hiding

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.embedding(ids)
        shown = mask == (0 if self.is_hiding else 1)
        scores = self.query(hidden) @ self.key(hidden).transpose(1, 2)
        scores = scores.masked_fill(~shown[:, None], -1e9)
        states = scores.softmax(-1) @ self.value(hidden)
        weights = shown.to(states.dtype).unsqueeze(-1)
        return states, (states * weights).sum(1) / weights.sum(1)


class OwnMask(nn.Module):
    """Its ids say themselves where a row ends."""

    def __init__(self, reduce: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.reduce = reduce

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        if self.reduce == "mean":
            return hidden.mean(1)
        if self.reduce == "max":
            return hidden.amax(1)
        return hidden.sum(1) / (ids != 0).sum(1, keepdim=True).clamp(min=1)


class OverTime(nn.Module):
    """Real numbers over time, without a mask."""

    def __init__(self, reduce: str) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(3, 4, 3, padding=1)
        self.linear = nn.Linear(3, 4)
        self.recurrent = nn.GRU(3, 4, batch_first=True)
        self.reduce = reduce

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.reduce:
            case "convolution":
                return self.convolution(x.transpose(1, 2)).transpose(1, 2)
            case "mean":
                return x.mean(1)
            case "max":
                return x.amax(1)
            case "sum":
                return x.sum(1)
            case "each":
                return self.linear(x).tanh()
            case _:
                return x.cumsum(1)


@pytest.mark.parametrize("is_hiding", [False, True])
def test_a_mask_that_is_honoured_makes_padding_harmless(path, is_hiding):
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, 2:4] = 0
    proof = prove(path, Attention(is_hiding=is_hiding), ids=IDS, mask=mask)
    assert padding_checks(proof) == PROVED
    assert rules(proof) == [
        ("ids", 1, 0.0),
        ("mask", 1, float(is_hiding)),
        ("output_0", 1, 0.0),
        ("output_1", None, 0.0),
    ]
    filled = next(check for check in proof.checks if check.name == "padding, filled")
    assert "everything but 'mask'" in filled.detail


def test_a_mask_that_is_not_honoured_everywhere_is_found(path):
    class Leaks(Attention):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
            states, _ = super().forward(ids, mask)
            return states.mean(1)

    proof = prove(path, Leaks(), ids=IDS, mask=torch.ones(2, 6, dtype=torch.int64))
    assert proof.is_batched
    assert padding_checks(proof) == {"padding": False}
    assert all(spec.padded_axis is None for spec in proof.schema.inputs)


def test_ids_that_are_their_own_mask_may_be_padded(path):
    proof = prove(path, OwnMask("masked mean"), ids=IDS)
    assert padding_checks(proof) == PROVED
    assert rules(proof)[0] == ("ids", 1, 0.0)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_an_embedding_of_zeros_is_no_mask(path, reduce):
    proof = prove(path, OwnMask(reduce), ids=IDS)
    assert padding_checks(proof) == {"padding": False}


@pytest.mark.parametrize("reduce", ["convolution", "mean", "max", "sum"])
def test_real_numbers_without_a_mask_are_not_padded(path, reduce):
    proof = prove(path, OverTime(reduce), x=torch.randn(2, 6, 3))
    assert proof.is_batched
    assert False in padding_checks(proof).values()
    assert all(spec.padded_axis is None for spec in proof.schema.inputs)


@pytest.mark.parametrize("reduce", ["each", "cumulative"])
def test_what_only_looks_at_itself_and_back_may_be_padded(path, reduce):
    proof = prove(path, OverTime(reduce), x=torch.randn(2, 6, 3))
    assert padding_checks(proof) == PROVED
    assert rules(proof)[0] == ("x", 1, 0.0)


def test_an_output_that_grows_otherwise_cannot_be_cut_back(path):
    class Pairs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x.transpose(1, 2)

    assert padding_checks(prove(path, Pairs(), x=torch.randn(2, 6, 3))) == {}


def test_two_free_axes_are_not_padded(path):
    class Each(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    axes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    export(path, Each(), torch.randn(2, 6, 3), dynamic=(axes,))
    proof = prove_tensor(load_exported(path), 16)
    assert padding_checks(proof) == {}


class ScaledByLength(nn.Module):
    """Attention whose scores are scaled by the logarithm of rows' length, beyond a trained one."""

    def __init__(self, trained: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.trained = trained

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scale = torch.log((torch.ones_like(mask[0]).sum() / self.trained).clamp(min=1.0)) + 1
        hidden = self.embedding(ids)
        scores = hidden.sum(-1) * scale + (mask.float() - 1) * 1e9
        return (hidden * scores.softmax(-1).unsqueeze(-1)).sum(1)


@pytest.mark.parametrize(("trained", "reached"), [(32, 32), (100, 64), (500, 256), (4096, 512)])
def test_padding_ends_where_a_model_changes_with_length(path, trained, reached):
    rows = {0: Dim.DYNAMIC, 1: Dim("length", min=1, max=512)}
    mask = torch.ones(2, 6, dtype=torch.int64)
    dynamic = {"ids": rows, "mask": rows}
    export(path, ScaledByLength(trained).eval(), dynamic=dynamic, ids=IDS, mask=mask)
    proof = prove_tensor(load_exported(path), 16)
    assert [spec.padded_axis for spec in proof.schema.inputs] == [1, 1]
    assert [spec.longest_padded for spec in proof.schema.inputs] == [reached, reached]
    said = next(check.detail for check in proof.checks if check.name == "padding, long")
    assert ("rows get other answers" in said) == (reached < 512)


def test_lengths_end_when_their_time_is_over(path, monkeypatch):
    monkeypatch.setattr(padding_reach, "MOST_SECONDS", 0.0)
    proof = prove(path, OwnMask("masked mean"), ids=IDS)
    assert proof.schema.inputs[0].longest_padded == 14
    said = next(check.detail for check in proof.checks if check.name == "padding, long")
    assert "The time for longer rows was over" in said


def test_what_is_known_already_is_kept(path):
    export(path, OverTime("mean"), dynamic={"x": ROWS}, x=torch.randn(2, 6, 3))
    model = load_exported(path)
    model.schema = Padding([1], [None], [0.0]).apply(model.schema)
    proof = prove_tensor(model, 16)
    assert padding_checks(proof) == {}
    assert proof.schema.inputs[0].padded_axis == 1


def test_a_program_that_fails_on_padded_rows_is_not_padded(path):
    export(path, OverTime("each"), dynamic={"x": ROWS}, x=torch.randn(2, 6, 3))
    model = load_exported(path)
    makers = prove_tensor(model, 4).makers
    run = model.run

    def fail(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        if inputs[0].shape[0] == 64:
            raise RuntimeError("too long")
        return run(inputs)

    model.run = fail
    padding, checks = find_padding(model, makers[0], 64)
    assert padding is None
    assert [check.is_equal for check in checks] == [False]
