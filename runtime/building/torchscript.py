"""Builds a TorchScript module: as an exported program where that is proved equal, else as it is.

Owns the choice between the two and what its owner is told of it.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from runtime.building.outcome import Outcome
from runtime.building.reporter import Reporter
from runtime.building.tensor import build_tensor
from runtime.compiling.packaging import add_program
from runtime.importing.archive import UnpackedUpload
from runtime.importing.examples import read_examples
from runtime.importing.exported import ExportedProgramModel, first_line
from runtime.importing.torchscript.converting import ConversionFailure, convert
from runtime.importing.torchscript.module import DEPRECATED
from runtime.importing.torchscript.program import TorchScriptProgram, import_torchscript
from runtime.protocol import BuildHints, Check
from runtime.proving.candidate_cases import draw_cases
from runtime.proving.candidates import CandidateProof, prove_candidate
from runtime.proving.inputs import find_inputs

logger = logging.getLogger(__name__)

CONVERTED_NAME = "converted.pt2"
FORM = "converted"  # what the checks of the conversion are filed under
MAX_ROWS = 32  # of the batches that the conversion is proved on


def build_torchscript(
    upload: UnpackedUpload, scratch: Path, reporter: Reporter, hints: BuildHints
) -> Outcome:
    """Raises `ImportFailure`."""
    with reporter.phase("import") as report:
        report(0.0, "loading the TorchScript module")
        examples = read_examples(upload.examples) if upload.examples else None
        model = import_torchscript(upload.path, hints, examples)
        report(0.5, "converting it to an exported program")
        path = scratch / CONVERTED_NAME
        converted, reason = _convert(model, path)
    checks: list[Check] = []
    if converted is not None:
        with reporter.phase("prove") as report:
            proof, reason = _prove(model, converted, report)
            checks = proof.checks if proof else []
    if converted is None or reason:
        outcome = _build_as_it_is(upload, model, reporter, hints)
        served = f"It is served as TorchScript, in its own sandbox: {reason}."
    else:
        outcome = _build_converted(upload, path, converted, reporter, hints)
        outcome.checks = [*checks, *outcome.checks]
        served = (
            "It was converted to an exported program (torch.export), which was proved to answer "
            "as the TorchScript module does, and that is what is served."
        )
    # Of the module: what is said of the batch is in the outcome already.
    outcome.notes = [served, DEPRECATED, *(n for n in outcome.notes if n != DEPRECATED)]
    return outcome


def _convert(model: TorchScriptProgram, path: Path) -> tuple[ExportedProgramModel | None, str]:
    try:
        return convert(model, path), ""
    except ConversionFailure as failure:
        return None, f"{failure}, so it cannot be compiled"


def _prove(
    model: TorchScriptProgram,
    converted: ExportedProgramModel,
    report: Callable[[float, str], None],
) -> tuple[CandidateProof | None, str]:
    """The proof that both answer alike; and why they do not, if so."""
    examples = [model.example_inputs] if model.example_inputs else []
    makers = find_inputs(model)
    cases = draw_cases(model, makers, model.schema, MAX_ROWS, examples, report)
    try:
        proof = prove_candidate(FORM, converted.run, cases, report)
    except Exception as error:  # torch may convert to what does not run
        logger.info("the converted program does not run", exc_info=True)
        return None, f"the converted program fails where the module runs ({first_line(error)})"
    if proof.is_equal:
        return proof, ""
    return proof, f"the converted program answers differently ({proof.first_failure})"


def _build_as_it_is(
    upload: UnpackedUpload, model: TorchScriptProgram, reporter: Reporter, hints: BuildHints
) -> Outcome:
    return build_tensor(
        upload,
        model,
        reporter,
        hints,
        format="torchscript",
        add=lambda _, artifact_dir: model.save(artifact_dir),
    )


def _build_converted(
    upload: UnpackedUpload,
    path: Path,
    converted: ExportedProgramModel,
    reporter: Reporter,
    hints: BuildHints,
) -> Outcome:
    from runtime.compiling.paging import is_decoder_graph

    if is_decoder_graph(converted.program):
        from runtime.building.decoder import build_decoder
        from runtime.building.routes import graph_source

        as_pt2 = msgspec.structs.replace(upload, kind="pt2", path=path)
        return build_decoder(graph_source(as_pt2, converted), reporter)
    return build_tensor(
        upload,
        converted,
        reporter,
        hints,
        add=lambda _, artifact_dir: add_program(path, artifact_dir),
    )
