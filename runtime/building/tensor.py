"""Builds a tensor program: any graph that is no decoder, whatever its format."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from runtime.building.outcome import Outcome
from runtime.building.reporter import Reporter
from runtime.compiling.packaging import add_program
from runtime.importing.archive import UnpackedUpload
from runtime.importing.examples import Arrays, keep_examples, read_examples
from runtime.importing.exported import first_line
from runtime.importing.image_inputs import with_image
from runtime.importing.knowledge import inform
from runtime.importing.program import ImportFailure
from runtime.importing.signature import describe_schema
from runtime.importing.soundness import check_outputs, check_weights, unread_inputs
from runtime.importing.tensor_program import TensorProgram
from runtime.protocol import BuildHints, Format, Manifest
from runtime.proving.tensor import prove_tensor
from runtime.proving.tensor_speed import measure_rows, measure_tensor

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
    examples = read_examples(upload.examples) if upload.examples else None
    with reporter.phase("import") as report:
        structure = _examine(model, hints, examples)
        schema = describe_schema(model.schema)
        report(1.0, f"{model.num_parameters:,} parameters; {schema}")
    with reporter.phase("prove") as report:
        own_inputs = model.example_inputs if examples else None
        proof = prove_tensor(model, MAX_BATCH_ROWS, report, own_inputs)
        if otherwise is not None and not proof.is_batched:
            model = otherwise()
            structure = _examine(model, hints, examples)
            proof = prove_tensor(model, MAX_BATCH_ROWS, report, own_inputs)
    with reporter.phase("measure") as report:
        make_inputs = proof.makers[0].make
        (eager,) = measure_tensor(model.run, make_inputs, proof.max_rows, report)
        report(1.0, "eager, one row of growing size")
        row_ms = measure_rows(model.run, proof.makers[0], proof.schema)
        candidates = [msgspec.structs.replace(eager, row_ms_by_size=row_ms)]
    signature = model.signature
    batch_warning = signature.batch_note if signature.is_batch_fixed else ""
    manifest = Manifest(
        kind="tensor",
        format=format,
        num_parameters=model.num_parameters,
        weight_bytes=model.weight_bytes,
        schema=with_image(proof.schema),
        accepts_loss=hints.accepts_loss,
    )

    def package(artifact_dir: Path) -> list[str]:
        if add is None:
            add_program(upload.path, artifact_dir)
        else:
            add(model, artifact_dir)
        if own_inputs is not None:
            keep_examples(own_inputs, model.schema, artifact_dir)
        return upload.beside

    return Outcome(
        manifest=manifest,
        verdict=proof.verdict,
        checks=proof.checks,
        candidates=candidates,
        notes=[note for note in model.notes if note != batch_warning] + proof.notes,
        warnings=[
            *([batch_warning] if batch_warning else []),
            *structure.values(),
            *(text for name, text in proof.warnings.items() if name not in structure),
        ],
        package=package,
    )


def _examine(model: TensorProgram, hints: BuildHints, examples: Arrays | None) -> dict[str, str]:
    """Puts what is known of the inputs into `model`, and refuses one that cannot be meant. Gives
    warnings by the names of outputs, and of inputs, that lead nowhere."""
    inform(model, hints, examples)
    check_weights(model.state)
    if examples is not None and model.example_inputs is not None:
        try:
            model.run(model.example_inputs)
        except Exception as error:  # a stranger's graph may raise anything
            raise ImportFailure(
                "examples", f"The model does not run on examples.npz: {first_line(error)}."
            ) from error
    if model.program is None:
        return {}
    inputs = [spec.name for spec in model.schema.inputs]
    outputs = [spec.name for spec in model.schema.outputs]
    warnings = {
        name: f"The output {name!r} is the same in every answer: no input reaches it."
        for name in check_outputs(model.program, outputs)
    }
    for name in unread_inputs(model.program, inputs):
        warnings[f"input {name}"] = (
            f"The input {name!r} has no effect: the program never reads it. If the export's "
            "example gave one tensor for several inputs, torch took them for one: give each its "
            "own."
        )
    return warnings
