"""A candidate that is the program in other words passes; one that is subtly another does not."""

from collections.abc import Callable

import msgspec
import pytest
import torch
from torch import nn

from runtime.importing.exported import ExportedProgramModel, load_exported
from runtime.proving.candidate_cases import Cases, draw_cases
from runtime.proving.candidates import MOST_LOSS, CandidateProof, Loss, Run, prove_candidate
from runtime.proving.inputs import find_inputs
from tests.runtime.importing.programs import Classifier, Digits, export, export_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ExportedProgramModel:
    return load_exported(export_digits(tmp_path_factory.mktemp("digits") / "digits.pt2"))


def draw(program: ExportedProgramModel, **options: object) -> Cases:
    options = {"max_rows": 16, "examples": [], "schema": program.schema, **options}
    return draw_cases(program, find_inputs(program), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cases(digits: ExportedProgramModel) -> Cases:
    return draw(digits, examples=[[torch.rand(3, 1, 8, 8)]])


@pytest.fixture(scope="module")
def module() -> Digits:
    torch.manual_seed(0)
    return Digits().eval()


def changed(module: Digits, change: Callable[[torch.Tensor], torch.Tensor]) -> Run:
    """The digits, its logits changed."""

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [change(module(inputs[0]))]

    return run


def prove(run: Run, cases: Cases) -> CandidateProof:
    proof = prove_candidate("other", run, cases)
    assert all(check.form == "other" for check in proof.checks)
    return proof


def test_batches_are_one_few_odd_and_full_and_examples_are_kept(cases):
    sizes = [case.num_rows for case in cases.generated]
    assert sizes == [1, 2, 3, 7, 1, 2, 3, 7, 16, 7]
    seeds = [case.inputs[0][0] for case in cases.generated]
    assert not torch.equal(seeds[0], seeds[4])
    assert [case.num_rows for case in cases.examples] == [3]


def test_the_program_in_other_words_is_equal(module, cases):
    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.inference_mode():  # row by row: sums are added up otherwise
            return [torch.cat([module(row) for row in inputs[0].split(1)])]

    proof = prove(run, cases)
    assert proof.is_equal
    assert proof.error is not None
    assert proof.error < 1
    assert {check.name for check in proof.checks} == {
        *("answers", "examples", "top-1", "repeat", "batch and single", "neighbours"),
        *("unusual, scaled", "unusual, ties"),
    }


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("rounded to bfloat16", lambda logits: logits.bfloat16().float()),
        ("off by 1e-4", lambda logits: logits + 1e-4),
        ("of another shape", lambda logits: logits[:, :9]),
        ("of another dtype", lambda logits: logits.double()),
        ("NaN at one place", lambda logits: logits.index_fill(1, torch.tensor([3]), torch.nan)),
        ("mixing rows", lambda logits: logits - 1e-4 * logits.mean(0, keepdim=True)),
        ("clipped far out", lambda logits: logits.clamp(max=0.9)),
    ],
)
def test_what_is_subtly_another_program_is_refused(module, cases, what, change):
    proof = prove(changed(module, change), cases)
    assert not proof.is_equal, what
    assert proof.first_failure


def test_a_form_that_drops_a_bias_is_refused(module, cases):
    bias = module.head.bias
    proof = prove(changed(module, lambda logits: logits - bias), cases)
    assert not proof.is_equal
    assert proof.error is None or proof.error > 1


def test_a_form_that_is_wrong_for_one_batch_size_only_is_refused(module, cases):
    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.inference_mode():
            logits = module(inputs[0])
            return [logits * 1.001 if len(logits) == 7 else logits]

    assert not prove(run, cases).is_equal


def test_rows_that_feel_their_neighbours_nan_are_found(module, cases):
    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [module(inputs[0]) + 0 * inputs[0].mean()]

    proof = prove(run, cases)
    assert [check.name for check in proof.checks if not check.is_equal] == ["neighbours"]
    assert not proof.is_equal
    assert not proof.is_sound


def test_rows_of_a_form_that_feel_large_neighbours_are_found(module, cases):
    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.inference_mode():
            largest = inputs[0].nan_to_num(0, 0, 0).abs().amax()
            return [module(inputs[0]) * torch.where(largest > 1e3, 0.0, 1.0)]

    proof = prove(run, cases)
    assert "neighbours" in {check.name for check in proof.checks if not check.is_equal}
    assert not proof.is_sound


def test_noise_of_a_form_is_found_by_repeating(module, cases):
    generator = torch.Generator().manual_seed(0)

    def noise(logits: torch.Tensor) -> torch.Tensor:
        return logits + 1e-3 * torch.rand(logits.shape, generator=generator)

    proof = prove(changed(module, noise), cases)
    assert not next(check for check in proof.checks if check.name == "answers").is_equal


def test_what_a_lossy_form_loses_is_measured_and_bounded(module, cases):
    def lossy(share: float) -> CandidateProof:
        spread = torch.cat([case.expected[0] for case in cases.generated]).std()

        def change(logits: torch.Tensor) -> torch.Tensor:
            return logits + share * spread * torch.sin(1e4 * logits)  # nothing that adds up

        return prove(changed(module, change), cases)

    small = lossy(0.002)
    assert not small.is_equal
    assert small.is_sound
    assert small.loss.is_bounded
    assert 0.0005 < small.loss.error < 0.005
    assert small.loss.agreement == 1.0
    assert "top-1 agreement 100" in small.loss.describe()
    large = lossy(0.5)
    assert not large.loss.is_bounded
    assert large.loss.error > MOST_LOSS


@pytest.mark.parametrize(("agreement", "is_bounded"), [(None, True), (1.0, True), (0.0, False)])
def test_agreement_in_nothing_is_no_bounded_loss(agreement, is_bounded):
    assert Loss(0.0, agreement).is_bounded is is_bounded


def test_integer_outputs_are_equal_or_not(tmp_path):
    class Largest(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.argmax(-1)

    program = load_exported(export(tmp_path / "p.pt2", Largest(), torch.randn(2, 6)))
    cases = draw(program)
    assert prove(program.run, cases).is_equal
    proof = prove(lambda inputs: [program.run(inputs)[0].clamp(max=4)], cases)
    assert not proof.is_equal
    assert proof.loss.agreement is not None
    assert proof.loss.agreement < 0.99


def test_a_program_whose_rows_must_not_share_a_run_is_compared_whole(digits):
    schema = msgspec.structs.replace(digits.schema, is_batched=False)
    cases = draw(digits, schema=schema, max_rows=1)
    assert {case.num_rows for case in cases.generated} == {1, 2, 3, 7}
    proof = prove(digits.run, cases)
    assert proof.is_equal
    assert "batch and single" not in {check.name for check in proof.checks}


def test_padding_is_proved_where_runs_may_hold_it(tmp_path):
    length = torch.export.Dim("length", min=2, max=40)
    program = load_exported(
        export(
            tmp_path / "c.pt2",
            Classifier().eval(),
            torch.randint(0, 50, (2, 6)),
            dynamic=({0: torch.export.Dim.DYNAMIC, 1: length},),
        )
    )
    spec = msgspec.structs.replace(program.schema.inputs[0], padded_axis=1, pad_value=0)
    schema = msgspec.structs.replace(program.schema, inputs=[spec])
    cases = draw(program, schema=schema)
    padded = [case.inputs[0] for case in cases.generated if case.name == "padded"]
    assert len({tensor.shape[1] for tensor in padded}) == 3, "for each choice of lengths"
    assert all(tensor[-1, -1] == 0 for tensor in padded)
    assert prove(program.run, cases).is_equal
