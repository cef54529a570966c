"""Batching is allowed exactly when it is harmless; planted faults are found."""

from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn
from torch.export import Dim

from runtime.importing.exported import load_exported
from runtime.importing.program import ImportFailure
from runtime.importing.widening import widen
from runtime.proving.tensor import TensorProof, prove_tensor
from tests.runtime.importing.programs import (
    BATCH,
    Classifier,
    Counting,
    Digits,
    MinusBatchMean,
    Noisy,
    export,
    export_digits,
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pt2"


def prove(path: Path, max_batch_rows: int = 16) -> TensorProof:
    return prove_tensor(load_exported(path), max_batch_rows)


def check_names(proof: TensorProof) -> list[str]:
    return [check.name for check in proof.checks]


def failed(proof: TensorProof) -> list[str]:
    return [check.name for check in proof.checks if not check.is_equal]


def test_a_sound_program_is_batched(path):
    lines: list[str] = []
    model = load_exported(export_digits(path))
    proof = prove_tensor(model, 16, lambda fraction, line: lines.append(line))
    assert proof.verdict == "equal"
    assert proof.is_batched
    assert failed(proof) == []
    assert check_names(proof) == [
        *("outputs", "repeat", "float64", "batch of 2", "batch of 3", "batch of 16"),
        *("neighbours", "top-1"),
    ]
    noise = next(check for check in proof.checks if check.name == "float64")
    assert noise.error is not None
    assert 0 < noise.error < 1e-5
    assert any("neighbours" in line or "top-1" in line for line in lines)


def test_the_programs_own_limit_is_the_largest_batch(path):
    dynamic = ({0: Dim("batch", min=1, max=5)},)
    proof = prove(export_digits(path, dynamic=dynamic))
    assert "batch of 5" in check_names(proof)
    assert proof.is_batched


@pytest.mark.parametrize("strength", [1.0, 1e-3, 1e-9])
def test_a_row_that_depends_on_its_neighbours_is_never_batched(path, strength):
    proof = prove(export(path, MinusBatchMean(strength), torch.randn(2, 4)))
    assert not proof.is_batched
    assert proof.verdict == "equal", "served alone, it is what was uploaded"
    assert "neighbours" in failed(proof)
    assert "requests run one at a time" in proof.notes[0]


class Gated(nn.Module):
    """A planted fault: rows feel each other as soon as one of them is large."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        largest = x.double().nan_to_num(0, 0, 0).abs().amax()
        return x * torch.where(largest > self.most, 0, 1).to(x.dtype)


@pytest.mark.parametrize("most", [100.0, 1e9])
def test_coupling_that_only_large_values_open_is_found(path, most):
    proof = prove(export(path, Gated(most), torch.randn(2, 4)))
    assert not proof.is_batched
    assert "neighbours" in failed(proof)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_coupling_that_only_large_integers_open_is_found(path, dtype):
    proof = prove(export(path, Gated(99.0), torch.randint(0, 2, (2, 4)).to(dtype)))
    assert not proof.is_batched
    assert "neighbours" in failed(proof)


def test_coupling_at_the_end_of_a_declared_range_is_found(path):
    model = load_exported(export(path, Gated(4999.0), torch.randint(0, 2, (2, 4))))
    spec = msgspec.structs.replace(model.schema.inputs[0], minimum=0.0, maximum=5000.0)
    model.schema = msgspec.structs.replace(model.schema, inputs=[spec])
    # Rows alone hold the ends of the range as well: only one beside them shows it.
    assert not prove_tensor(model, 16).is_batched


def test_sorting_across_the_batch_is_found(path):
    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sort(0).values

    assert not prove(export(path, Sorted(), torch.randn(2, 4))).is_batched


def test_an_integer_program_that_counts_across_the_batch_is_found(path):
    class Ranks(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return ids.cumsum(0)

    proof = prove(export(path, Ranks(), torch.randint(1, 9, (2, 3))))
    assert not proof.is_batched


def test_randomness_is_unproved_and_unbatched(path):
    proof = prove(export(path, Noisy(), torch.randn(2, 4)))
    assert proof.verdict == "unproved"
    assert not proof.is_batched
    assert failed(proof) == ["repeat"]


@pytest.mark.parametrize("what", ["shape", "dtype"])
def test_outputs_that_are_not_as_declared_leave_a_program_unproved(path, what):
    model = load_exported(export_digits(path))
    run = model.run
    if what == "dtype":
        model.run = lambda inputs: [output.double() for output in run(inputs)]
    else:
        output = msgspec.structs.replace(model.schema.outputs[0], shape=[None, 7])
        model.schema = msgspec.structs.replace(model.schema, outputs=[output])
    proof = prove_tensor(model, 16)
    assert proof.verdict == "unproved"
    assert not proof.is_batched
    assert failed(proof) == ["outputs"]
    assert "Correct what the file says" in proof.notes[0]


@pytest.mark.parametrize("kind", ["buffer", "parameter", "constant"])
def test_a_program_that_changes_itself_is_refused(path, kind):
    with pytest.raises(ImportFailure, match="changes its own tensors"):
        prove(export(path, Counting(kind), torch.randn(2, 4)))


def test_token_ids_stay_inside_the_vocabulary(path):
    ids = torch.tensor([[0, 49, 3, 7], [1, 2, 3, 4]])
    program = export(path, Classifier(50), ids, dynamic=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))
    proof = prove(program)
    assert proof.is_batched
    assert len(proof.makers) > 1, "other lengths were tried too"
    assert "batch of 16, other sizes" in check_names(proof)
    made = proof.makers[0].make(8)[0]
    assert int(made.max()) < 50


def test_examples_of_padding_alone_fall_back_to_small_integers(path):
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(2, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.embedding(ids - 7).sum(1)

    # The example's ids run; 0 and 1 would not.
    proof = prove(export(path, Lookup(), torch.full((2, 3), 8)))
    assert proof.is_batched


def test_constant_arguments_keep_the_value_they_were_exported_with(path):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    program = export(
        path,
        Classifier(),
        dynamic={"ids": BATCH, "mask": BATCH, "scale": None},
        ids=ids,
        mask=torch.ones(2, 3),
        scale=False,
    )
    proof = prove(program)
    assert proof.is_batched
    model = load_exported(program)
    assert [spec.name for spec in model.schema.inputs] == ["ids", "mask"]


def test_inputs_that_lead_separate_lives_are_proved_with_equal_rows(path):
    class Apart(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x * 2, y * 3

    assert prove(export(path, Apart(), torch.randn(2, 3), torch.randn(2, 4))).is_batched


def test_a_fixed_batch_is_proved_unbatched(path):
    proof = prove(export(path, Digits().eval(), torch.rand(1, 1, 8, 8), dynamic=None))
    assert proof.verdict == "equal"
    assert not proof.is_batched
    assert check_names(proof) == ["outputs", "repeat"]


def test_bfloat16_programs_are_judged_by_their_own_noise(path):
    model = Digits().eval().bfloat16()
    proof = prove(export(path, model, torch.rand(2, 1, 8, 8).bfloat16()))
    assert proof.is_batched
    noise = next(check for check in proof.checks if check.name == "float64")
    assert noise.error is not None
    assert noise.error > 1e-4


def test_not_a_number_where_the_original_gives_it_is_no_difference(path):
    class Roots(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sqrt()

    proof = prove(export(path, Roots(), torch.randn(2, 4)))
    assert proof.is_batched
    assert "NaN" in proof.checks[0].detail


def test_a_program_that_cannot_run_is_refused(path):
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.embedding(torch.full_like(x, 99).long())

    with pytest.raises(ImportFailure, match="does not run on inputs"):
        prove(export(path, Picky(), torch.randn(2, 4)))


def test_the_float64_form_widens_what_the_graph_names(path):
    class Casting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float32) + torch.zeros(3, dtype=torch.float32) / 3

    model = load_exported(export(path, Casting(), torch.randn(2, 3)))
    wide = widen(model.program)
    (output,) = model.call(wide, [torch.randn(2, 3)], torch.float64)
    assert output.dtype is torch.float64
    assert model.run([torch.randn(2, 3)])[0].dtype is torch.float32
