"""Forms that ONNX Runtime runs, optimised once, when they are made.

Owns its sessions. Exporting is `onnx_graph.py`'s, int8 `onnx_int8.py`'s.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from runtime.compiling.forms.calling import Calling, load_calling, save_calling
from runtime.compiling.forms.form import Form, FormFailure, Loading, Making, Run
from runtime.compiling.forms.onnx_graph import onnx_file, opsets, write_onnx
from runtime.compiling.forms.precisions import uploaded_precision
from runtime.compiling.forms.processor import lacks_precision
from runtime.importing.exported import first_line
from runtime.importing.tensor_program import TensorProgram

if TYPE_CHECKING:  # a worker of another form does without its libraries
    from onnxruntime import InferenceSession
    from onnxruntime.capi.onnxruntime_pybind11_state import SessionOptions

MODEL_NAME = "model.onnx"
WEIGHTS_NAME = "model.weights"
_QUIET = 4  # errors are raised too; under a sandbox it warns of devices it may not look for


class OnnxRuntime(msgspec.Struct, frozen=True):
    """The forms of one execution provider."""

    provider: str = "CPUExecutionProvider"

    def suits(self, form: Form, program: TensorProgram, device: str) -> bool:
        is_here = device.startswith("cuda") != (self.provider == "CPUExecutionProvider")
        if not is_here or (program.program is None and onnx_file(program) is None):
            return False
        if form.precision in ("uploaded", "int8"):
            return True
        # An ONNX file has no torch graph whose precision could be changed.
        return program.program is not None and form.precision != uploaded_precision(program)

    def unavailable(self, form: Form, device: str) -> str | None:
        import onnxruntime

        if self.provider not in onnxruntime.get_available_providers():
            return f"This box's ONNX Runtime has no {self.provider}."
        if form.precision == "float16" and not device.startswith("cuda"):
            return "ONNX Runtime computes float16 on a processor by way of float32."
        return lacks_precision(form.precision, device)

    def make(self, making: Making) -> None:
        failure: FormFailure | None = None
        for opset in opsets(making.program):
            try:
                return self._make(making, opset)
            except FormFailure as error:
                failure = failure or error
            except Exception as error:  # noqa: BLE001 - kernels that do less than the operator
                failure = failure or FormFailure(f"ONNX Runtime refuses it: {first_line(error)}.")
        assert failure is not None, "at least one opset was tried"
        raise failure

    def _make(self, making: Making, opset: int | None) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            source, calling = write_onnx(making, Path(scratch) / "exported.onnx", opset)
            arguments = [calling.prepare(inputs) for inputs in making.inputs]
            if making.form.precision == "int8":
                from runtime.compiling.forms.onnx_int8 import quantise

                source = quantise(source, Path(scratch), arguments)
            options = session_options(making.num_threads)
            options.optimized_model_filepath = str(making.directory / MODEL_NAME)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", WEIGHTS_NAME
            )
            session = self._session(source, options, making.device)
            _check_arguments(session, calling)
            for inputs in arguments[:1]:
                _call(session, inputs)
        save_calling(making.directory, calling)

    def load(self, loading: Loading) -> Run:
        import onnxruntime

        options = session_options(loading.num_threads)
        # All of it was done when it was made.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = self._session(loading.directory / MODEL_NAME, options, loading.device)
        calling = load_calling(loading.directory)
        return calling.wrap(lambda inputs: _call(session, inputs))

    def _session(self, path: Path, options: "SessionOptions", device: str) -> "InferenceSession":
        """Raises `FormFailure` when the provider is not the one that runs: ONNX Runtime falls back
        to the processor without a word."""
        import onnxruntime

        onnxruntime.set_default_logger_severity(_QUIET)
        provider: Any = self.provider
        if self.provider != "CPUExecutionProvider":
            provider = (self.provider, {"device_id": torch.device(device).index or 0})
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        if self.provider not in session.get_providers():
            raise FormFailure(f"ONNX Runtime could not load its {self.provider}.")
        return session


def session_options(num_threads: int) -> "SessionOptions":
    """What every session of a worker or a build is made with."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # Other workers want the cores that an idle thread would spin on.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _check_arguments(session: "InferenceSession", calling: Calling) -> None:
    """An export must keep every input, used or not, in its place, and every output."""
    for what, found, expected in (
        ("inputs", session.get_inputs(), calling.input_dtypes),
        ("outputs", session.get_outputs(), calling.output_dtypes),
    ):
        if len(found) != len(expected):
            raise FormFailure(
                f"The ONNX graph has {len(found)} {what}, the program {len(expected)}."
            )


def _call(session: "InferenceSession", inputs: list[Tensor]) -> list[Tensor]:
    names = [value.name for value in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return [_tensor(output) for output in session.run(None, feed)]


def _tensor(output: Any) -> Tensor:
    if not isinstance(output, np.ndarray):
        raise TypeError("an output is a sequence or a map, and no tensor")
    return torch.from_numpy(output)
