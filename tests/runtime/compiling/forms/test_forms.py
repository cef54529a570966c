"""Every form of small programs against the program as uploaded."""

import shutil
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from runtime.compiling.forms import (
    FORMS,
    Form,
    FormFailure,
    Run,
    check_witness,
    environment,
    forms_for,
    load_form,
    make_form,
    unavailable,
)
from runtime.compiling.forms import processor as processors
from runtime.compiling.forms.compiled_library import CompiledLibrary
from runtime.compiling.forms.form import Making
from runtime.compiling.forms.graphs import graph_of
from runtime.compiling.forms.onnx_graph import write_onnx
from runtime.importing.exported import load_exported
from runtime.importing.onnx.model import load_onnx
from tests.runtime.compiling.forms.cases import CASES, MAX_ROWS, Case, make_and_load
from tests.runtime.importing.programs import Digits, export

GetCase = Callable[[str], Case]
MakeOnce = Callable[[str, str], tuple[Run, Path]]
CPU_FORMS = [
    "eager",
    "inductor",
    "onnxruntime",
    "aot_inductor",
    "aot_inductor_bfloat16",
    "aot_inductor_float16",
    "onnxruntime_int8",
]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> GetCase:
    """A case by its name, exported once."""
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            torch.manual_seed(0)
            made[name] = CASES[name](tmp_path_factory.mktemp("programs") / f"{name}.pt2")
        return made[name]

    return get


@pytest.fixture(scope="module")
def made(case: GetCase, tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """A form of a case and its directory, made once."""
    done: dict[tuple[str, str], tuple[Run, Path]] = {}

    def get(form: str, name: str) -> tuple[Run, Path]:
        if (form, name) not in done:
            directory = tmp_path_factory.mktemp(form)
            done[form, name] = make_and_load(form, case(name), directory), directory
        return done[form, name]

    return get


def check_equal(run: Callable[..., list[torch.Tensor]], case: Case, share: float) -> None:
    """At one row, few and many, within `share` of each output's range."""
    for rows in (1, 2, 3, MAX_ROWS):
        inputs = case.make(rows)
        expected, actual = case.program.run(inputs), run(inputs)
        assert [each.dtype for each in actual] == [each.dtype for each in expected]
        assert [each.shape for each in actual] == [each.shape for each in expected]
        for left, right in zip(actual, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=share * float(right.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_onnx_runtime_answers_as_eager_does(name: str, case: GetCase, made: MakeOnce) -> None:
    run, directory = made("onnxruntime", name)
    check_equal(run, case(name), 1e-5)
    check_witness(run, directory)


@pytest.mark.compiler
@pytest.mark.parametrize("name", CASES)
def test_aot_inductor_answers_as_eager_does(name: str, case: GetCase, made: MakeOnce) -> None:
    run, directory = made("aot_inductor", name)
    check_equal(run, case(name), 1e-5)
    check_witness(run, directory)


@pytest.mark.compiler
@pytest.mark.parametrize("form", ["onnxruntime", "aot_inductor"])
def test_axes_of_one_and_of_many_hold(form: str, case: GetCase, made: MakeOnce) -> None:
    """Exports promise nothing of sizes below 2, and are compiled as if there were none."""
    run, _ = made(form, "transformer")
    for rows, tokens in ((1, 1), (3, 1), (1, 2), (2, 300)):
        inputs = case("transformer").make(rows, tokens)
        expected = case("transformer").program.run(inputs)
        torch.testing.assert_close(run(inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.compiler
def test_bfloat16_keeps_wire_dtypes(case: GetCase, made: MakeOnce) -> None:
    run, _ = made("aot_inductor_bfloat16", "transformer")
    check_equal(run, case("transformer"), 0.05)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precisions_keep_whole_masks(precision: str, case: GetCase) -> None:
    """The transformer masks with float32's least number, which neither precision can hold."""
    program = case("transformer").program
    graph = graph_of(program, precision)
    ids, mask = case("transformer").make(2)
    dtype = getattr(torch, precision)
    for kept in (mask, torch.zeros_like(mask)):
        expected = program.run([ids, kept])[0]
        actual = graph.module(check_guards=False)({"ids": ids, "mask": kept.to(dtype)})
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)
    assert program.run([ids, mask])[0].dtype == torch.float32  # the uploaded one stays as it is


@pytest.mark.parametrize("name", ["digits", "classifier", "recurrent"])
def test_int8_is_lossy_and_near(name: str, case: GetCase, made: MakeOnce) -> None:
    """Convolutions by calibration, the others as they run."""
    run, _ = made("onnxruntime_int8", name)
    check_equal(run, case(name), 0.15)
    assert next(form for form in FORMS if form.name == "onnxruntime_int8").is_lossy


def test_an_onnx_upload_is_optimised_and_quantised_as_it_is(case: GetCase, tmp_path: Path) -> None:
    """Without a torch graph; its eager form is ONNX Runtime with optimisations off."""
    making = Making(_form("onnxruntime"), case("digits").program, tmp_path, MAX_ROWS, [], 1, "cpu")
    write_onnx(making, tmp_path / "uploaded.onnx", None)
    uploaded = Case(load_onnx(tmp_path / "uploaded.onnx"), case("digits").make)
    names = [form.name for form in forms_for(uploaded.program, "cpu")]
    assert names == ["eager", "onnxruntime", "onnxruntime_int8"]
    for name, share in (("onnxruntime", 1e-5), ("onnxruntime_int8", 0.15)):
        (tmp_path / name).mkdir()
        run = make_and_load(name, uploaded, tmp_path / name)
        check_equal(run, uploaded, share)


def test_the_table_starts_with_eager_and_leaves_out_what_does_not_suit(case: GetCase) -> None:
    names = [form.name for form in forms_for(case("digits").program, "cpu")]
    assert names == CPU_FORMS
    on_gpu = [form.name for form in forms_for(case("digits").program, "cuda:0")]
    assert on_gpu[0] == "eager"
    assert {"tensorrt", "onnxruntime_cuda", "aot_inductor"} < set(on_gpu)
    assert "onnxruntime" not in on_gpu


def test_a_program_in_bfloat16_has_no_form_cast_to_it(tmp_path: Path) -> None:
    export(tmp_path / "m.pt2", Digits().eval().bfloat16(), torch.rand(2, 1, 8, 8).bfloat16())
    program = load_exported(tmp_path / "m.pt2")
    names = [form.name for form in forms_for(program, "cpu")]
    assert "aot_inductor" in names
    assert "aot_inductor_bfloat16" not in names


def test_what_this_box_lacks_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {form.name: unavailable(form, "cpu") for form in FORMS}
    assert reasons["eager"] is None
    assert "needs a compiler as it serves" in str(reasons["inductor"])
    assert reasons["tensorrt"] == "This box's ONNX Runtime has no TensorrtExecutionProvider."
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(processors, "processor", lambda: ("plain", frozenset({"avx2"})))
    reasons = {form.name: unavailable(form, "cpu") for form in FORMS}
    assert reasons["aot_inductor"] == "There is no C++ compiler here."
    monkeypatch.undo()
    monkeypatch.setattr(processors, "processor", lambda: ("plain", frozenset({"avx2"})))
    assert "no instructions for bfloat16" in str(unavailable(_form("aot_inductor_bfloat16"), "cpu"))


def test_the_environment_names_processor_versions_and_threads() -> None:
    one, two = environment("cpu", 1), environment("cpu", 2)
    assert one != two
    assert f"torch {version('torch')}" in one
    assert "onnxruntime" in one
    assert "flags" in one


def test_failures_are_sentences(case: GetCase, tmp_path: Path) -> None:
    with pytest.raises(FormFailure, match="no form called 'quantum'"):
        load_form("quantum", None, tmp_path, device="cpu", num_threads=1)
    with pytest.raises(FormFailure, match=r"onnxruntime cannot be loaded: .+\."):
        load_form("onnxruntime", None, tmp_path, device="cpu", num_threads=1)
    with pytest.raises(FormFailure, match="library is missing"):
        load_form("aot_inductor", None, tmp_path, device="cpu", num_threads=1)
    with pytest.raises(FormFailure, match="was not loaded"):
        load_form("eager", None, tmp_path, device="cpu", num_threads=1)
    wrong = [[torch.rand(2, 3)]]
    with pytest.raises(FormFailure):
        make_form(
            _form("onnxruntime"),
            case("digits").program,
            tmp_path,
            max_rows=2,
            calibration=wrong,
            num_threads=1,
        )


def test_a_form_that_answers_otherwise_than_its_witness_is_refused(
    made: MakeOnce, tmp_path: Path
) -> None:
    run, directory = made("onnxruntime", "digits")
    shutil.copy(directory / "witness.safetensors", tmp_path)
    with pytest.raises(FormFailure, match="other answers"):
        check_witness(lambda inputs: [output * 1.01 for output in run(inputs)], tmp_path)
    with pytest.raises(FormFailure, match="other answers"):
        check_witness(lambda inputs: [output * torch.nan for output in run(inputs)], tmp_path)
    (tmp_path / "witness.safetensors").write_bytes(b"x")
    with pytest.raises(FormFailure, match="cannot be read"):
        check_witness(run, tmp_path)


@pytest.mark.compiler
def test_a_compiled_library_lets_other_threads_run(made: MakeOnce) -> None:
    """torch's runner holds the interpreter lock for a whole run; this call must not."""
    _, directory = made("aot_inductor", "digits")
    path = next(directory.glob("*.so"))
    library = CompiledLibrary(path, 1)
    with pytest.raises(RuntimeError, match="2"):
        CompiledLibrary(path, 2)
    inputs = [torch.rand(60_000, 1, 8, 8)]
    with torch.inference_mode():
        library(inputs)
        assert _ticks_during(lambda: library(inputs)) > 2


@pytest.mark.compiler
@pytest.mark.skipif(torch.__version__ < "2.12", reason="these libraries tell stderr alone")
def test_a_compiled_library_says_why_it_failed(made: MakeOnce) -> None:
    run, _ = made("aot_inductor", "transformer")
    with pytest.raises(RuntimeError, match=r"^index out of bounds: .* < 40L?$"):
        run([torch.full((2, 5), 40), torch.ones(2, 5)])


def _ticks_during(step: Callable[[], object]) -> int:
    """How often another thread got its turn while `step` ran."""
    ticks, is_done = [0], threading.Event()

    def tick() -> None:
        while not is_done.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks[0]
    step()
    num_ticks = ticks[0] - before
    is_done.set()
    thread.join()
    return num_ticks


def _form(name: str) -> Form:
    return next(form for form in FORMS if form.name == name)
