"""Builds a tensor program: any exported graph that is no decoder."""

from pathlib import Path

import msgspec

from runtime.building.outcome import Outcome
from runtime.building.reporter import Reporter
from runtime.compiling.candidates import measure_candidates
from runtime.compiling.packaging import add_program
from runtime.importing.archive import UnpackedUpload
from runtime.importing.signature import describe_schema
from runtime.importing.tensor_program import TensorProgram
from runtime.protocol import Manifest
from runtime.proving.tensor import prove_tensor

MAX_BATCH_ROWS = 128  # of a run, as `Serve.max_batch_rows`


def build_tensor(upload: UnpackedUpload, model: TensorProgram, reporter: Reporter) -> Outcome:
    """Raises `ImportFailure`."""
    with reporter.phase("import") as report:
        schema = describe_schema(model.schema)
        report(1.0, f"{model.num_parameters:,} parameters; {schema}")
    with reporter.phase("prove") as report:
        proof = prove_tensor(model, MAX_BATCH_ROWS, report)
    with reporter.phase("measure") as report:
        make_inputs = proof.makers[0].make
        candidates = measure_candidates(model, make_inputs, proof.max_rows, report)
    manifest = Manifest(
        kind="tensor",
        format="pt2",
        num_parameters=model.num_parameters,
        weight_bytes=model.weight_bytes,
        schema=msgspec.structs.replace(model.schema, is_batched=proof.is_batched),
    )

    def package(artifact_dir: Path) -> list[str]:
        add_program(upload.path, artifact_dir)
        return upload.beside

    return Outcome(
        manifest=manifest,
        verdict=proof.verdict,
        checks=proof.checks,
        candidates=candidates,
        notes=model.notes + proof.notes,
        package=package,
    )
