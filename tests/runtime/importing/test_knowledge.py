"""What is known of inputs beyond the file, and programs that cannot be what was meant."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runtime.importing.exported import ExportedProgramModel, load_exported
from runtime.importing.input_ranges import find_ranges
from runtime.importing.knowledge import inform
from runtime.importing.program import ImportFailure
from runtime.importing.soundness import check_outputs, check_weights, unread_inputs
from runtime.protocol import BuildHints, InputHint
from runtime.proving.constant_outputs import constant_warnings
from runtime.proving.inputs import find_inputs
from tests.runtime.importing.programs import Classifier, Digits, export, export_digits


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pt2"


def make(path: Path, module: nn.Module, *args: Any) -> ExportedProgramModel:
    return load_exported(export(path, module.eval(), *args))


class Tables(nn.Module):
    """Several tables, some behind views and casts; `codes` are only added."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(50, 4), nn.Embedding(2, 4)
        self.small = nn.Embedding(30, 4)

    def forward(self, ids: torch.Tensor, kinds: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        words = self.words(ids.flatten(1).long()) + self.small(ids.long())
        return words + self.kinds(kinds) + codes.unsqueeze(-1)


def test_ranges_of_ids_are_those_of_the_smallest_table(path: Path) -> None:
    ids = torch.ones(2, 3, dtype=torch.int32)
    model = make(path, Tables(), ids, ids.long(), ids.long())
    assert find_ranges(model.program) == {"ids": (0, 29), "kinds": (0, 1)}
    inform(model, BuildHints(), None)
    assert [(spec.minimum, spec.maximum) for spec in model.schema.inputs] == [
        (0, 29),
        (0, 1),
        (None, None),
    ]
    assert [leaf.spec for leaf in model.signature.inputs] == model.schema.inputs
    made, _, _ = find_inputs(model)[0].make(4)
    assert (int(made.min()), int(made.max())) == (0, 29), "the extremes are among them"


class Indexed(nn.Module):
    """Tables that are indexed in other ways than as embeddings; `bits` are a mask."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.rand(7, 4))

    def forward(
        self, rows: torch.Tensor, columns: torch.Tensor, picks: torch.Tensor, bits: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        chosen = self.table[:, columns.long()], self.table.gather(1, picks)
        return self.table[rows], *chosen, self.table[:, bits[0].bool()].sum()


def test_ranges_of_indices_are_those_of_their_axis(path: Path) -> None:
    """Plain indexing counts from the end too; gathering does not."""
    ids = torch.ones(2, 3, dtype=torch.long)
    bits = torch.ones(2, 4, dtype=torch.int32)
    model = make(path, Indexed(), ids, ids.int(), ids.clone(), bits)
    assert find_ranges(model.program) == {"rows": (-7, 6), "columns": (-4, 3), "picks": (0, 3)}


def test_what_an_owner_says_comes_before_what_the_graph_shows(path: Path) -> None:
    model = make(path, Classifier(), torch.ones(2, 5, dtype=torch.long))
    hint = InputHint("ids", "int64", ["batch", 5], 3, 7)
    inform(model, BuildHints(inputs=[hint]), None)
    (made,) = find_inputs(model)[0].make(8)
    assert (int(made.min()), int(made.max())) == (3, 7)


def test_floats_stay_in_the_range_that_was_said(path: Path) -> None:
    model = load_exported(export_digits(path))
    hint = InputHint("image", "float32", ["batch", 1, 8, 8], 0, 1)
    inform(model, BuildHints(inputs=[hint]), {"image": torch.rand(3, 1, 8, 8)})
    (made,) = find_inputs(model)[0].make(64)
    assert (float(made.min()), float(made.max())) == (0, 1)
    assert model.example_inputs is not None
    assert model.example_inputs[0].shape[0] == 3


@pytest.mark.parametrize(
    ("hint", "says"),
    [
        (InputHint("picture", "float32", ["batch", 1, 8, 8]), "is no input of the model"),
        (InputHint("image", "int64", ["batch", 1, 8, 8]), "another dtype"),
        (InputHint("image", "float32", ["batch", 3, 8, 8]), "other axes"),
        (InputHint("image", "float32", ["batch", 1, 8]), "other axes"),
    ],
)
def test_what_contradicts_the_file_is_refused_unless_remembered(
    path: Path, hint: InputHint, says: str
) -> None:
    model = load_exported(export_digits(path))
    with pytest.raises(ImportFailure) as caught:
        inform(model, BuildHints(inputs=[hint]), None)
    assert says in caught.value.error.message
    inform(model, BuildHints(inputs=[hint], is_remembered=True), None)
    assert "left aside" in model.notes[-1]


def test_examples_outside_a_table_are_refused(path: Path) -> None:
    model = make(path, Classifier(), torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(ImportFailure, match="0 to 49"):
        inform(model, BuildHints(), {"ids": torch.full((2, 5), 50)})


# --- soundness ------------------------------------------------------------------------------


def test_weights_that_are_not_numbers_are_named(path: Path) -> None:
    module = Digits()
    with torch.no_grad():
        module.head.weight[0, 0] = torch.nan
    model = make(path, module, torch.rand(2, 1, 8, 8))
    with pytest.raises(ImportFailure) as caught:
        check_weights(model.state)
    assert caught.value.error.code == "nan_weights"
    assert "head.weight hold NaN" in caught.value.error.message
    check_weights({"mask": torch.full((2, 2), -torch.inf)})


class Constant(nn.Module):
    """`second` is made of the input in place, through a view."""

    def __init__(self, is_all: bool) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(3))
        self.is_all = is_all

    def forward(self, x: torch.Tensor) -> Any:
        first = self.table * 2
        if self.is_all:
            return first
        second = torch.zeros(4)
        second[1:].add_(x.sum())
        return {"first": first, "second": second, "third": x * 2}


def test_an_answer_that_no_input_can_change_is_refused(path: Path) -> None:
    model = make(path, Constant(True), torch.rand(2, 4))
    with pytest.raises(ImportFailure) as caught:
        check_outputs(model.program, ["output"])
    assert caught.value.error.code == "constant_output"


def test_outputs_that_never_change_are_told_of(path: Path) -> None:
    model = make(path, Constant(False), torch.rand(2, 4))
    assert check_outputs(model.program, ["first", "second", "third"]) == ["first"]
    warnings = constant_warnings(model, find_inputs(model)[0])
    assert list(warnings) == ["first"]


def test_an_input_that_nothing_reads_is_found(path: Path) -> None:
    """As when one tensor is given for two inputs of an export."""
    same = torch.rand(2, 4)
    model = make(path, Sum(), same, same)
    assert unread_inputs(model.program, ["left", "right"]) == ["left"]
    model = make(path, Sum(), same, same.clone())
    assert unread_inputs(model.program, ["left", "right"]) == []


class Sum(nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left + 2 * right


class Dead(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.relu() * 0, x.sum(1).abs().neg().log()


def test_runs_show_what_structure_does_not(path: Path) -> None:
    model = make(path, Dead(), torch.rand(2, 4))
    assert check_outputs(model.program, ["output_0", "output_1"]) == []
    warnings = constant_warnings(model, find_inputs(model)[0])
    assert "'output_0' never changed" in warnings["output_0"]
    assert "'output_1' was NaN" in warnings["output_1"]
