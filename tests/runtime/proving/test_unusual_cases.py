"""Forms that are right on usual values and wrong beyond are refused; sound ones are not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runtime.compiling.forms import FORMS, load_form, make_form
from runtime.importing.exported import ExportedProgramModel, load_exported
from runtime.proving.candidate_cases import Cases, draw_cases
from runtime.proving.candidates import CandidateProof, Run, prove_candidate
from runtime.proving.inputs import find_inputs
from tests.runtime.importing.programs import Digits, export


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Applied(nn.Module):
    """A function of one tensor."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def load(path: Path, module: nn.Module, *args: torch.Tensor) -> ExportedProgramModel:
    return load_exported(export(path / "m.pt2", module.eval(), *args))


def draw(program: ExportedProgramModel) -> Cases:
    return draw_cases(program, find_inputs(program), program.schema, 16, [])


def prove(program: ExportedProgramModel, run: Run) -> CandidateProof:
    return prove_candidate("other", run, draw(program))


def failed(proof: CandidateProof) -> list[str]:
    return [check.name for check in proof.checks if not check.is_equal]


def onnxruntime(program: ExportedProgramModel, directory: Path) -> Run:
    directory.mkdir()
    form = next(form for form in FORMS if form.name == "onnxruntime")
    inputs = find_inputs(program)[0].make(8)
    make_form(form, program, directory, max_rows=16, calibration=[inputs], num_threads=1)
    return load_form("onnxruntime", program, directory, device="cpu", num_threads=1)


@pytest.mark.parametrize(
    ("name", "function", "example"),
    [
        ("unusual, scaled", lambda x: torch.log(torch.sigmoid(x)), torch.randn(3, 4)),
        (
            "unusual, integers",
            lambda x: torch.div(x, 7, rounding_mode="floor"),
            torch.randint(0, 2, (3, 4)),
        ),
        ("unusual, ties", lambda x: x.topk(2, -1).indices, torch.randn(3, 4)),
    ],
)
def test_where_onnxruntime_differs_is_found(tmp_path, name, function, example):
    program = load(tmp_path, Applied(function), example)
    proof = prove(program, onnxruntime(program, tmp_path / "form"))
    assert failed(proof) == [name]
    assert not proof.is_equal
    assert proof.is_sound == (name == "unusual, ties")


@pytest.mark.parametrize(
    ("module", "example"),
    [
        (Digits(), torch.rand(2, 1, 8, 8)),
        (Applied(lambda x: (x.exp(), x.softmax(-1), x.argmax(-1))), torch.randn(2, 6)),
        (nn.Sequential(nn.Linear(6, 64), nn.LayerNorm(64), nn.GELU()), torch.randn(2, 6)),
        (nn.LSTM(4, 8, batch_first=True), torch.randn(2, 5, 4)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8)),
        (Applied(lambda x: x // 2 + x % 3 - x * 5), torch.randint(0, 2, (2, 4))),
        (Applied(lambda x: x.float() / 255 - 0.5), torch.zeros(2, 4, dtype=torch.uint8)),
    ],
)
@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_sound_forms_of_ordinary_models_stay(tmp_path, module, example):
    program = load(tmp_path, module, example)
    proof = prove(program, onnxruntime(program, tmp_path / "form"))
    assert failed(proof) == []
    assert any(check.name.startswith("unusual") for check in proof.checks)


def test_integers_that_the_program_refuses_are_not_asked(tmp_path):
    table = torch.arange(40.0).reshape(20, 2)
    program = load(tmp_path, Applied(lambda x: table[x + 10]), torch.randint(0, 2, (2, 3)))
    asked = [case.inputs[0] for case in draw(program).unusual if case.name == "integers"]
    assert asked
    assert all(tensor.abs().max() <= 10 for tensor in asked)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_every_byte_is_asked_where_runs_have_room(tmp_path, dtype):
    program = load(tmp_path, Applied(lambda x: x + 1), torch.zeros(2, 16, dtype=dtype))
    asked = [case.inputs[0] for case in draw(program).unusual if case.name == "integers"]
    assert len(asked[0].unique()) == 256


def test_what_overflows_in_the_program_itself_is_not_compared(tmp_path):
    program = load(tmp_path, Applied(torch.exp), torch.randn(2, 4))

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        (expected,) = program.run(inputs)
        return [expected.nan_to_num(posinf=1.0)]

    assert prove(program, run).is_equal


def test_infinity_where_the_program_is_finite_is_no_loss_to_accept(tmp_path):
    program = load(tmp_path, Applied(lambda x: x * 1.5), torch.randn(2, 4))
    proof = prove(program, lambda inputs: [program.run(inputs)[0] / (inputs[0].abs() < 20)])
    assert failed(proof) == ["unusual, scaled"]
    assert not proof.is_sound
