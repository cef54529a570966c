"""Decides what kind of program an upload is, and so which build it gets.

The one table of kinds; each kind's detection lies with its build.
"""

from pathlib import Path

from runtime.building.outcome import Outcome
from runtime.building.reporter import Reporter
from runtime.importing.archive import UnpackedUpload
from runtime.protocol import BuildHints


def build_program(
    upload: UnpackedUpload, scratch: Path, reporter: Reporter, hints: BuildHints
) -> Outcome:
    """Import, prove and measure, as the upload's kind asks. What is only needed on the way goes
    to `scratch`; `hints` are what its owner says of a tensor program. Raises `ImportFailure`."""
    # Imported late: a graph's build needs no transformers.
    if upload.kind == "pt2":
        return _build_graph(upload, reporter, hints)
    if upload.kind == "onnx":
        from runtime.building.onnx import build_onnx

        return build_onnx(upload, scratch, reporter, hints)
    if upload.kind == "torchscript":
        from runtime.building.torchscript import build_torchscript

        return build_torchscript(upload, scratch, reporter, hints)
    from runtime.importing.embedder_layout import is_embedder
    from runtime.importing.heads_layout import read_head

    if (head := read_head(upload.path)) is not None:
        from runtime.building.heads import build_head

        return build_head(upload, head, scratch, reporter, hints)
    if is_embedder(upload.path):
        from runtime.building.embedder import build_embedder

        return build_embedder(upload, reporter)
    from runtime.building.decoder import build_decoder
    from runtime.building.directory_routes import directory_source

    return build_decoder(directory_source(upload, scratch), reporter)


def _build_graph(upload: UnpackedUpload, reporter: Reporter, hints: BuildHints) -> Outcome:
    from runtime.compiling.paging import is_decoder_graph
    from runtime.importing.exported import load_exported
    from runtime.importing.soundness import check_weights

    with reporter.phase("import") as report:
        report(0.0, "loading the graph")
        model = load_exported(upload.path)
        check_weights(model.state)
    if is_decoder_graph(model.program):
        from runtime.building.decoder import build_decoder
        from runtime.building.routes import graph_source

        return build_decoder(graph_source(upload, model), reporter)
    from runtime.building.tensor import build_tensor

    return build_tensor(upload, model, reporter, hints)
