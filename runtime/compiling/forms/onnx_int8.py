"""Quantises an ONNX graph to int8 with ONNX Runtime's own quantiser. Only ever run in a build.

Owns what of a graph is quantised and how. Whether the answers are close enough is the proof's.
"""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnxruntime import quantization
from torch import Tensor

from runtime.compiling.forms.form import FormFailure

_DYNAMIC_OPERATORS = ["MatMul", "Gemm", "LSTM", "Gather"]
_STATIC_OPERATORS = ["Conv", "MatMul", "Gemm"]
MAX_CALIBRATION_RUNS = 16
_LARGE_BYTES = 2**30  # beyond which weights do not fit into the graph's own file


def quantise(source: Path, scratch: Path, batches: list[list[Tensor]]) -> Path:
    """A file in `scratch` with the weights and activations of the large operators as int8.
    Convolutions need the ranges of activations beforehand, which `batches` of arguments show; the
    other operators find them as they run, which is more exact. Raises `FormFailure`."""
    prepared, quantised = scratch / "prepared.onnx", scratch / "int8.onnx"
    graph = _fold_constants(source, prepared)
    operators = {node.op_type for node in graph.node}
    is_large = sum(path.stat().st_size for path in scratch.iterdir()) > _LARGE_BYTES
    if "Conv" in operators:
        quantization.quantize_static(
            prepared,
            quantised,
            _Calibration([value.name for value in graph.input], batches),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=_STATIC_OPERATORS,
            per_channel=True,
            use_external_data_format=is_large,
        )
    elif operators.intersection(_DYNAMIC_OPERATORS):
        quantization.quantize_dynamic(
            prepared,
            quantised,
            op_types_to_quantize=_DYNAMIC_OPERATORS,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=is_large,
        )
    else:
        raise FormFailure("Nothing in the program is worth computing in int8.")
    return quantised


def _fold_constants(source: Path, target: Path) -> onnx.GraphProto:
    """So that weights show as such. Returns the graph."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", f"{target.stem}.weights"
    )
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    model = onnx.load(target)
    del model.graph.value_info[:]  # some are of weights before they were transposed
    onnx.save(model, target, save_as_external_data=True, location=f"{target.stem}.data")
    return onnx.load(target, load_external_data=False).graph


class _Calibration(quantization.CalibrationDataReader):
    """Inputs for the ranges of activations, as the quantiser reads them."""

    def __init__(self, names: list[str], batches: list[list[Tensor]]) -> None:
        self._feeds = iter(
            {name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)}
            for batch in batches[:MAX_CALIBRATION_RUNS]
        )

    def get_next(self) -> Any:
        """Arrays by input, and None after the last."""
        return next(self._feeds, None)
