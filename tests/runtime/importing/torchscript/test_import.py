"""TorchScript files: what is asked of their owners, how they are called, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from app.registry.input_hints import parse_inputs
from runtime.importing.program import ImportFailure
from runtime.importing.torchscript.converting import ConversionFailure, convert
from runtime.importing.torchscript.program import (
    TorchScriptProgram,
    import_torchscript,
    load_torchscript,
)
from runtime.protocol import BuildHints
from runtime.proving.tensor import prove_tensor
from tests.runtime.importing.programs import Digits
from tests.runtime.importing.torchscript import modules
from tests.runtime.importing.torchscript.modules import save_scripted, save_traced

X = "x: float32[batch, 4]"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pt"


def load(path: Path, inputs: str = "", **examples: torch.Tensor) -> TorchScriptProgram:
    return import_torchscript(path, BuildHints(inputs=parse_inputs(inputs)), examples or None)


def refused(path: Path, inputs: str = "", **examples: torch.Tensor) -> ImportFailure:
    with pytest.raises(ImportFailure) as caught:
        load(path, inputs, **examples)
    return caught.value


def code_lines(failure: ImportFailure) -> str:
    lines = failure.error.message.splitlines()
    return "\n".join(line for line in lines if line.startswith("    "))


# --- asking ---------------------------------------------------------------------------------


def test_an_owner_is_asked_for_inputs_with_the_line_that_fits(path: Path) -> None:
    save_traced(path, modules.Tokens(), torch.ones(2, 5, dtype=torch.long))
    failure = refused(path)
    assert failure.error.code == "needs_inputs"
    assert code_lines(failure) == "    ids: int64[batch, tokens] in 0..49"
    assert load(path, code_lines(failure)).schema.is_batched


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (nn.Linear(7, 2), "input: float32[batch, 7]"),
        (nn.Conv2d(4, 2, 3), "input: float32[batch, 4, 224, 224]"),
        (nn.Conv1d(4, 2, 3), "input: float32[batch, 4, 16000]"),
        (nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1)), "input: float32[batch, 5]"),
    ],
)
def test_the_line_is_guessed_from_the_first_layer(path: Path, module: nn.Module, line: str) -> None:
    failure = refused(save_scripted(path, module.eval()))
    assert code_lines(failure).strip() == line


def test_what_is_still_missing_is_asked_for(path: Path) -> None:
    save_scripted(path, modules.Pair().eval())
    failure = refused(path, "pair_0: float32[batch, 4]")
    assert failure.error.code == "needs_inputs"
    assert "pair_1" in code_lines(failure)
    assert "pair_0" not in code_lines(failure)


def test_a_name_that_is_none_of_the_inputs_is_refused(path: Path) -> None:
    save_scripted(path, modules.Masked().eval())
    failure = refused(path, "y: float32[batch]")
    assert failure.error.code == "inputs"
    assert "its inputs are x, mask (may be left out)" in failure.error.message


def test_hints_of_an_earlier_version_that_do_not_fit_are_no_error(path: Path) -> None:
    save_scripted(path, modules.Masked().eval())
    hints = BuildHints(inputs=parse_inputs("y: float32[batch]"), is_remembered=True)
    with pytest.raises(ImportFailure) as caught:
        import_torchscript(path, hints, None)
    assert caught.value.error.code == "needs_inputs"


# --- inputs and outputs ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (modules.Pair(), "pair_0: float32[batch, 4]; pair_1: float32[batch, 4]"),
        (modules.Many(), "many_0: float32[batch, 4]; many_1: float32[batch, 4]"),
        (modules.Named(), "named_left: float32[batch, 4]; named_right: float32[batch, 4]"),
    ],
)
def test_inputs_may_be_in_a_tuple_list_or_dict(
    path: Path, tmp_path: Path, module: nn.Module, inputs: str
) -> None:
    program = load(save_scripted(path, module.eval()), inputs)
    left, right = torch.rand(3, 4), torch.rand(3, 4)
    (answer,) = program.run([left, right])
    assert torch.equal(answer, left - 2 * right)
    (converted,) = convert(program, tmp_path / "c.pt2").run([left, right])
    assert torch.equal(converted, answer)


def test_an_optional_tensor_may_be_left_out_and_a_number_keeps_its_default(path: Path) -> None:
    x = torch.rand(2, 4)
    without = load(save_scripted(path, modules.Masked().eval()), X)
    assert torch.equal(without.run([x])[0], x + 1)
    both = load(path, f"{X}; mask: float32[batch, 4]")
    assert torch.equal(both.run([x, x])[0], x * x + 1)
    scaled = load(save_scripted(path, modules.Scaled().eval()), X)
    assert torch.equal(scaled.run([x])[0], x * 3)


def test_outputs_are_flattened_and_named_by_their_path(path: Path) -> None:
    program = load(save_scripted(path, modules.Nested().eval()), X)
    names = ["output_0", "output_1_twice", "output_2_0", "output_2_1"]
    assert [spec.name for spec in program.schema.outputs] == names
    assert program.schema.outputs[-1].dtype == "float64"
    x = torch.rand(2, 4)
    assert torch.equal(program.run([x])[1], x * 2)
    named = load(save_scripted(path, modules.NamedScores().eval()), X)
    assert [spec.name for spec in named.schema.outputs] == ["logits", "hidden"]


def test_axes_of_outputs_follow_those_of_inputs(path: Path) -> None:
    program = load(save_scripted(path, modules.Widened().eval()), "x: float32[batch, 4, width<=9]")
    assert program.schema.is_batched
    assert program.schema.inputs[0].max_shape == [None, 4, 9]
    flat, padded = program.signature.outputs
    assert str(flat.axes[1]) == "4*width"
    assert str(padded.axes[2]) == "width + 3"


def test_a_batch_that_a_trace_has_baked_in_is_told(path: Path) -> None:
    save_traced(path, modules.Baked(), torch.rand(1, 4, 3))
    program = load(path, "x: float32[batch, 4, 3]")
    assert program.schema.inputs[0].shape == [1, 4, 3]
    assert not program.schema.is_batched
    assert "fixed at 1" in program.signature.batch_note
    assert "torch.export.export" in program.signature.batch_note


def test_ranges_come_from_the_tables_that_ids_index(path: Path) -> None:
    save_traced(path, modules.Tokens(), torch.ones(2, 5, dtype=torch.long))
    (spec,) = load(path, "ids: int64[batch, tokens]").schema.inputs
    assert (spec.minimum, spec.maximum) == (0, 49)


def test_examples_describe_inputs_that_nobody_described(path: Path) -> None:
    save_traced(path, modules.Tokens(), torch.ones(2, 5, dtype=torch.long))
    for name in ("ids", "arr_0"):
        (spec,) = load(path, **{name: torch.ones(3, 5, dtype=torch.long)}).schema.inputs
        assert (spec.name, spec.dtype, spec.shape) == ("ids", "int64", [None, 5])
    failure = refused(path, other=torch.ones(3, 5, dtype=torch.long))
    assert "no input 'other'" in failure.error.message


def test_examples_must_be_as_said(path: Path) -> None:
    save_traced(path, modules.Tokens(), torch.ones(2, 5, dtype=torch.long))
    failure = refused(path, "ids: int64[batch, tokens]", ids=torch.ones(3, 5))
    assert failure.error.code == "examples"
    assert "as float32 of shape [3, 5]" in failure.error.message


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "code", "says"),
    [
        (modules.Counted(), "non_tensor", "'count' is int"),
        (modules.WithSize(), "non_tensor", "'output_1' is a int"),
        (modules.Counting(), "stateful", "(count)"),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train(), "training_mode", "eval()"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(), "training_mode", "eval()"),
    ],
)
def test_what_cannot_be_served_is_refused(
    path: Path, module: nn.Module, code: str, says: str
) -> None:
    name = "input" if isinstance(module, nn.Sequential) else "x"
    failure = refused(save_scripted(path, module), f"{name}: float32[batch, 4]")
    assert failure.error.code == code
    assert says in failure.error.message


def test_a_module_that_changes_itself_in_place_is_found_by_running_it(path: Path) -> None:
    program = load(save_scripted(path, modules.InPlace().eval()), X)
    with pytest.raises(ImportFailure) as caught:
        prove_tensor(program, 4)
    assert caught.value.error.code == "stateful"


def test_a_trace_in_training_mode_is_refused(path: Path) -> None:
    save_traced(path, Digits().train(), torch.rand(2, 1, 8, 8))
    assert refused(path).error.code == "training_mode"


def test_inputs_that_the_module_does_not_take_are_shown(path: Path) -> None:
    save_scripted(path, nn.Linear(4, 2).eval())
    failure = refused(path, "input: float32[batch, 5]")
    assert failure.error.code == "does_not_run"
    assert "input: float32[batch, 5]" in code_lines(failure)


def test_a_damaged_file_is_refused(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 nothing")
    assert refused(path).error.code == "torchscript_unloadable"


# --- both forms -----------------------------------------------------------------------------


def test_a_converted_program_answers_as_the_module(path: Path, tmp_path: Path) -> None:
    save_traced(path, Digits().eval(), torch.rand(2, 1, 8, 8))
    program = load(path, "image: float32[batch, 1, 8, 8] in 0..1")
    converted = convert(program, tmp_path / "converted.pt2")
    assert converted.schema == program.schema
    assert converted.num_parameters == program.num_parameters == 1386
    for rows in (1, 2, 5):
        images = torch.rand(rows, 1, 8, 8)
        torch.testing.assert_close(converted.run([images]), program.run([images]))


def test_what_torch_cannot_convert_is_said(path: Path, tmp_path: Path) -> None:
    program = load(save_scripted(path, modules.Looped().eval()), X)
    with pytest.raises(ConversionFailure, match="prim::Loop"):
        convert(program, tmp_path / "converted.pt2")


def test_a_packaged_module_needs_no_more_than_its_artifact(path: Path, tmp_path: Path) -> None:
    program = load(save_scripted(path, modules.Looped().eval()), X)
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    program.save(artifact)
    again = load_torchscript(artifact)
    assert again.schema == program.schema
    x = torch.rand(3, 4)
    assert torch.equal(again.run([x])[0], program.run([x])[0])


def test_a_float64_form_is_made_where_the_code_fixes_no_dtype(path: Path) -> None:
    program = load(save_scripted(path, nn.Linear(4, 2).eval()), "input: float32[batch, 4]")
    x = torch.rand(2, 4)
    references = program.run_float64([[x]])
    assert references is not None
    assert references[0][0].dtype is torch.float64
    torch.testing.assert_close(references[0][0].float(), program.run([x])[0])
