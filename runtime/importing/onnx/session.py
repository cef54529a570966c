"""ONNX Runtime as it is used here: options, providers, and errors in one plain line."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto

from runtime.importing.program import ImportFailure
from runtime.text.printable import printable

logger = logging.getLogger(__name__)

MAX_ERROR_CHARS = 300
_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_SILENT = 4  # only what is fatal: errors are raised, and need not be printed too

_SOURCE = re.compile(r"\S*/[\w./+-]+\.(?:h|hpp|cc|cpp|cu)(?::\d+)?\s")
_CONDITION = re.compile(r"^.*? was false\.\s*", re.DOTALL)
_PATH = re.compile(r"(?<![\w.])/(?:[^\s/'\"]+/)+")
_NODE = re.compile(r"while running (\w+) node\. Name:'([^']*)' Status Message: (.*)", re.DOTALL)


class OnnxRunError(RuntimeError):
    """The graph could not run on these inputs; the text is one plain line."""


def make_session(
    path: Path, *, device: str, num_threads: int, is_optimized: bool = False
) -> onnxruntime.InferenceSession:
    """A session of the file at `path`, by default with its nodes exactly as they are. Raises
    `ImportFailure` when ONNX Runtime does not take it."""
    onnxruntime.set_default_logger_severity(_SILENT)
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if is_optimized else levels.ORT_DISABLE_ALL
    )
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers(device))
    except Exception as error:  # of many kinds, none of them typed
        raise ImportFailure(
            "onnx_unloadable",
            f"ONNX Runtime {onnxruntime.__version__} cannot load the model: {plain_error(error)}. "
            "Check that it runs there: onnxruntime.InferenceSession(...).",
        ) from error
    if device.startswith("cuda") and session.get_providers()[0] != _CUDA:
        logger.warning("ONNX Runtime has no CUDA provider here: the model runs on the CPU")
    return session


def providers(device: str) -> list[str]:
    """The CPU's, and before it CUDA's where it was asked for and is there."""
    has_cuda = _CUDA in onnxruntime.get_available_providers()
    return [_CUDA, _CPU] if device.startswith("cuda") and has_cuda else [_CPU]


def run_session(
    session: onnxruntime.InferenceSession,
    names: Sequence[str],
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[str],
) -> list[torch.Tensor]:
    """`outputs` for tensors in the graph's own dtypes. Raises `OnnxRunError`."""
    has_bfloat16 = any(tensor.dtype is torch.bfloat16 for tensor in inputs) or any(
        output.type == "tensor(bfloat16)" for output in session.get_outputs()
    )
    try:
        if has_bfloat16:  # which numpy does not have
            feeds = {name: _ort_value(tensor) for name, tensor in zip(names, inputs, strict=True)}
            found = session.run_with_ort_values(list(outputs), feeds)
            return [torch.from_dlpack(value._ortvalue.to_dlpack()).clone() for value in found]
        arrays = {
            name: tensor.contiguous().numpy() for name, tensor in zip(names, inputs, strict=True)
        }
        return [torch.from_numpy(np.asarray(found)) for found in session.run(outputs, arrays)]
    except Exception as error:  # of many kinds, none of them typed
        raise OnnxRunError(plain_error(error)) from error


def _ort_value(tensor: torch.Tensor) -> onnxruntime.OrtValue:
    if tensor.dtype is torch.bfloat16:
        bits = tensor.contiguous().view(torch.uint16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())


def plain_error(error: BaseException) -> str:
    """What ONNX Runtime says, in one line, without its source files and this machine's paths."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    node = ""
    if match := _NODE.search(text):
        node = f"{match[1]} {match[2]!r}: " if match[2] else f"{match[1]}: "
        text = match[3]
    if _SOURCE.search(text) and " was false." in text:
        text = _CONDITION.sub("", text)
    text = _PATH.sub("", _SOURCE.sub("", text + " "))
    line = " ".join((node + text).split()).rstrip(".")
    return printable(line[:MAX_ERROR_CHARS]) or type(error).__name__
