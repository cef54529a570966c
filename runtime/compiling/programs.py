"""Loads an artifact's tensor program in its uploaded form, whatever its format; an embedder is one
as well.

The one table of formats on the worker's side; each format's loader lies with its importing.
"""

from pathlib import Path

from runtime.compiling.packaging import ONNX_NAME, PROGRAM_NAME
from runtime.importing.examples import EXAMPLES_NAME, match_examples, read_examples
from runtime.importing.knowledge import set_schema
from runtime.importing.program import ImportFailure
from runtime.importing.tensor_program import TensorProgram
from runtime.protocol import Manifest


def load_program(artifact_dir: Path, manifest: Manifest, device: str = "cpu") -> TensorProgram:
    """The program that a build packaged, knowing of its inputs what the build knew. Raises
    `ImportFailure` when it cannot be loaded."""
    program = _load(artifact_dir, manifest, device)
    if manifest.schema is not None:
        set_schema(program, manifest.schema)
    if (artifact_dir / EXAMPLES_NAME).exists():
        examples = read_examples(artifact_dir / EXAMPLES_NAME)
        program.example_inputs = match_examples(examples, program.schema.inputs)
    return program


def _load(artifact_dir: Path, manifest: Manifest, device: str) -> TensorProgram:
    # Imported late: a worker needs one format's libraries.
    if manifest.kind == "embedder":
        from runtime.compiling.embedder_program import load_embedder_program

        return load_embedder_program(artifact_dir, manifest, device)
    if manifest.format == "pt2":
        from runtime.importing.exported import load_exported

        return load_exported(artifact_dir / PROGRAM_NAME, device)
    if manifest.format == "onnx":
        from runtime.importing.onnx.model import load_onnx

        return load_onnx(artifact_dir / ONNX_NAME, device=device)
    if manifest.format == "torchscript":
        from runtime.importing.torchscript.program import load_torchscript

        return load_torchscript(artifact_dir, device)
    raise ImportFailure(
        "format", f"The artifact's format, {manifest.format!r}, is none of a tensor program."
    )
