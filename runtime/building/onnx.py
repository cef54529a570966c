"""Builds an ONNX file: a tensor program that ONNX Runtime runs."""

from pathlib import Path

import msgspec

from runtime.building.outcome import Outcome
from runtime.building.reporter import Reporter
from runtime.building.tensor import build_tensor
from runtime.compiling.packaging import add_onnx
from runtime.importing.onnx.model import OnnxModel, load_onnx
from runtime.importing.onnx.preparing import BATCH_NOTE, prepare_onnx
from runtime.importing.onnx.reach import check_reach
from runtime.importing.onnx.reading import read_onnx
from runtime.importing.tensor_program import TensorProgram
from runtime.importing.unpacked import UnpackedUpload
from runtime.protocol import BuildHints


def build_onnx(
    upload: UnpackedUpload, scratch: Path, reporter: Reporter, hints: BuildHints
) -> Outcome:
    """Raises `ImportFailure`."""
    with reporter.phase("import") as report:
        report(0.0, "loading the graph")
        prepared = prepare_onnx(upload.path, scratch, hints)
        check_reach(read_onnx(prepared.path))
        if prepared.batched is None:
            model, otherwise = load_onnx(prepared.path), None
        else:
            model, otherwise = load_onnx(prepared.batched), lambda: load_onnx(prepared.path)
            model.notes.append(BATCH_NOTE)
    upload = msgspec.structs.replace(
        upload, beside=[name for name in upload.beside if name not in prepared.used]
    )

    def add(served: TensorProgram, artifact_dir: Path) -> None:
        assert isinstance(served, OnnxModel), "it was loaded here"
        add_onnx(served.onnx_path, served.locations, artifact_dir)

    return build_tensor(upload, model, reporter, hints, format="onnx", add=add, otherwise=otherwise)
