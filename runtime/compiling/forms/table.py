"""The table of forms, and making and loading them by name."""

from pathlib import Path

import torch

from runtime.compiling.forms.aot_inductor import AotInductor
from runtime.compiling.forms.eager import Eager
from runtime.compiling.forms.form import Family, Form, FormFailure, Loading, Making, Run
from runtime.compiling.forms.inductor import Inductor
from runtime.compiling.forms.onnx_runtime import OnnxRuntime
from runtime.compiling.forms.precisions import DTYPES, uploaded_precision
from runtime.compiling.forms.witness import keep_witness
from runtime.importing.exported import first_line
from runtime.importing.tensor_program import TensorProgram

# In the order in which they are tried.
_TABLE: list[tuple[Form, Family]] = [
    (Form("eager"), Eager()),
    (Form("inductor"), Inductor()),
    (Form("onnxruntime"), OnnxRuntime()),
    (Form("onnxruntime_cuda"), OnnxRuntime("CUDAExecutionProvider")),
    (Form("onnxruntime_cuda_float16", "float16"), OnnxRuntime("CUDAExecutionProvider")),
    (Form("tensorrt"), OnnxRuntime("TensorrtExecutionProvider")),
    (Form("aot_inductor"), AotInductor()),
    (Form("aot_inductor_bfloat16", "bfloat16"), AotInductor()),
    (Form("aot_inductor_float16", "float16"), AotInductor()),
    (Form("onnxruntime_int8", "int8", is_lossy=True), OnnxRuntime()),
]
FORMS: list[Form] = [form for form, _ in _TABLE]
_FAMILIES = {form.name: (form, family) for form, family in _TABLE}


def forms_for(program: TensorProgram, device: str) -> list[Form]:
    """Those that make sense for this program on this kind of device, eager first. Whether the box
    can have them is `unavailable`'s question."""
    return [form for form, family in _TABLE if family.suits(form, program, device)]


def unavailable(form: Form, device: str) -> str | None:
    """Why this box cannot have the form, in one plain sentence; None if it can."""
    return _FAMILIES[form.name][1].unavailable(form, device)


def make_form(
    form: Form,
    program: TensorProgram,
    directory: Path,
    *,
    max_rows: int,
    calibration: list[list[torch.Tensor]],
    num_threads: int,
    device: str = "cpu",
) -> None:
    """Write what a worker loads into `directory`, which is empty. `calibration` are inputs the
    program is known to take, of at most `max_rows` rows; the smallest become the form's witness.
    Raises `FormFailure`."""
    making = Making(form, program, directory, max_rows, calibration, num_threads, device)
    try:
        family = _FAMILIES[form.name][1]
        family.make(making)
        if any(directory.iterdir()):
            run = family.load(Loading(form, None, directory, making.device, num_threads))
            keep_witness(run, min(calibration, key=_num_values), directory, _dtype(making))
    except FormFailure:
        raise
    except Exception as error:  # compilers raise anything, on graphs of strangers
        raise FormFailure(f"{form.name} cannot be made: {first_line(error)}.") from error


def load_form(
    name: str, program: TensorProgram | None, directory: Path, *, device: str, num_threads: int
) -> Run:
    """The form that `make_form` wrote into `directory`; all but the eager one do without the
    program. Raises `FormFailure`."""
    if name not in _FAMILIES:
        raise FormFailure(f"This release has no form called {name!r}.")
    form, family = _FAMILIES[name]
    try:
        return family.load(Loading(form, program, directory, device, num_threads))
    except FormFailure:
        raise
    except Exception as error:  # whatever a damaged file brings about
        raise FormFailure(f"{name} cannot be loaded: {first_line(error)}.") from error


def form_directory(artifact_dir: Path, name: str) -> Path:
    """Where an artifact keeps the files of a form."""
    return artifact_dir / "forms" / name


def _num_values(inputs: list[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in inputs)


def _dtype(making: Making) -> torch.dtype:
    """Of a form's arithmetic."""
    precision = making.form.precision
    if precision == "int8":
        return torch.int8
    return DTYPES.get(precision) or getattr(torch, uploaded_precision(making.program))
