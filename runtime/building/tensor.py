"""Builds a tensor program: any graph that is no decoder, whatever its format."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from runtime.building.outcome import Outcome
from runtime.building.reporter import Reporter
from runtime.compiling.packaging import add_program
from runtime.importing.archive import UnpackedUpload
from runtime.importing.image_inputs import with_image
from runtime.importing.signature import describe_schema
from runtime.importing.tensor_program import TensorProgram
from runtime.protocol import BuildHints, Format, Manifest
from runtime.proving.tensor import prove_tensor
from runtime.proving.tensor_speed import measure_tensor

MAX_BATCH_ROWS = 128  # of a run, as `Serve.max_batch_rows`


def build_tensor(
    upload: UnpackedUpload,
    model: TensorProgram,
    reporter: Reporter,
    hints: BuildHints = BuildHints(),  # noqa: B008 -- immutable
    *,
    format: Format = "pt2",
    add: Callable[[TensorProgram, Path], object] | None = None,
    otherwise: Callable[[], TensorProgram] | None = None,
) -> Outcome:
    """`add` writes the program's files into the artifact, as `load_program` wants them for
    `format`; without it the upload's own file is copied. `otherwise` gives the program to build
    instead if this one's rows must not share a run. Raises `ImportFailure`."""
    with reporter.phase("import") as report:
        schema = describe_schema(model.schema)
        report(1.0, f"{model.num_parameters:,} parameters; {schema}")
    with reporter.phase("prove") as report:
        proof = prove_tensor(model, MAX_BATCH_ROWS, report)
        if otherwise is not None and not proof.is_batched:
            model = otherwise()
            proof = prove_tensor(model, MAX_BATCH_ROWS, report)
    with reporter.phase("measure") as report:
        make_inputs = proof.makers[0].make
        candidates = measure_tensor(model.run, make_inputs, proof.max_rows, report)
    manifest = Manifest(
        kind="tensor",
        format=format,
        num_parameters=model.num_parameters,
        weight_bytes=model.weight_bytes,
        schema=with_image(msgspec.structs.replace(model.schema, is_batched=proof.is_batched)),
        accepts_loss=hints.accepts_loss,
    )

    def package(artifact_dir: Path) -> list[str]:
        if add is None:
            add_program(upload.path, artifact_dir)
        else:
            add(model, artifact_dir)
        return upload.beside

    return Outcome(
        manifest=manifest,
        verdict=proof.verdict,
        checks=proof.checks,
        candidates=candidates,
        notes=model.notes + proof.notes,
        package=package,
    )
