"""The ONNX graph of a program: the uploaded file itself, or an export of its torch graph."""

import logging
import warnings
from pathlib import Path

import torch

from runtime.compiling.forms.calling import Calling, read_program_calling
from runtime.compiling.forms.form import FormFailure, Making
from runtime.compiling.forms.graphs import graph_of
from runtime.importing.exported import first_line
from runtime.importing.tensor_program import TensorProgram

# From 23 on attention is one operator, which ONNX Runtime has a kernel for, though one that takes
# fewer shapes of masks than the operator does; then torch's own choice.
_OPSETS = (23, None)


def onnx_file(program: TensorProgram) -> Path | None:
    """The file of a program that was uploaded as ONNX."""
    path = getattr(program, "onnx_path", None)
    return path if isinstance(path, Path) else None


def opsets(program: TensorProgram) -> tuple[int | None, ...]:
    """The versions of ONNX's operators to try in turn."""
    return _OPSETS if onnx_file(program) is None else (None,)


def write_onnx(making: Making, path: Path, opset: int | None) -> tuple[Path, Calling]:
    """The graph as a file, at `path` unless it is one already, and how it is called. Raises
    `FormFailure`."""
    program = making.program
    if (uploaded := onnx_file(program)) is not None:
        specs = program.schema.inputs
        return uploaded, Calling(
            input_dtypes=[spec.dtype for spec in specs],
            is_channels_last=[False] * len(specs),
            output_dtypes=[spec.dtype for spec in program.schema.outputs],
        )
    graph = graph_of(program, making.form.precision)
    calling = read_program_calling(graph, program.schema)
    if "bfloat16" in calling.input_dtypes:
        raise FormFailure("ONNX Runtime takes no bfloat16 from Python.")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of absent packages
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations within torch and onnxscript
            exported = torch.onnx.export(graph, (), dynamo=True, verbose=False, opset_version=opset)
            assert exported is not None, "exports to memory give a program"
            exported.save(path, external_data=True)
    except Exception as error:  # operators without a translation, of many kinds
        raise FormFailure(f"The graph cannot be written as ONNX: {first_line(error)}.") from error
    return path, calling
