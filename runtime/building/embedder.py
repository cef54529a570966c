"""Builds an embedder from a sentence-transformers directory or a plain encoder's."""

from pathlib import Path

import msgspec

from runtime.building.outcome import Outcome
from runtime.building.reporter import Reporter
from runtime.compiling.packaging import add_directory, add_module_directories
from runtime.importing.archive import UnpackedUpload
from runtime.importing.embedder import load_embedder
from runtime.importing.embedder_layout import read_layout
from runtime.importing.program import ImportFailure
from runtime.protocol import Manifest
from runtime.proving.embedder import EmbedderProof, prove_embedder
from runtime.proving.embedder_speed import measure_embedder


def build_embedder(upload: UnpackedUpload, reporter: Reporter) -> Outcome:
    """Raises `ImportFailure`."""
    with reporter.phase("import") as report:
        report(0.0, "loading the model")
        layout = read_layout(upload.path)
        embedder = load_embedder(upload.path)
        parameters = [*embedder.module.parameters(), *embedder.head.parameters()]
        num_parameters = sum(parameter.numel() for parameter in parameters)
        info = embedder.info
        report(
            1.0,
            f"{info.architecture}: {num_parameters:,} parameters in {info.dtype}, "
            f"{info.dimensions} dimensions ({info.pooling}), texts of up to {info.max_tokens:,} "
            "tokens",
        )
    with reporter.phase("prove") as report:
        proof = prove_embedder(upload.path, embedder, report)
        _require_proof(proof)
        info = embedder.info = msgspec.structs.replace(info, batching=proof.batching)
    with reporter.phase("measure") as report:
        candidates = measure_embedder(embedder, report)
    manifest = Manifest(
        kind="embedder",
        format="huggingface",
        num_parameters=num_parameters,
        weight_bytes=sum(parameter.nbytes for parameter in parameters),
        embedder=info,
    )

    def package(artifact_dir: Path) -> list[str]:
        add_module_directories(upload.path, artifact_dir, layout.modules)
        left = add_directory(upload.path, artifact_dir)
        used = {module.relative_to(upload.path).parts[0] for module in layout.modules}
        return [name for name in left if name not in used]

    return Outcome(
        manifest=manifest,
        verdict=proof.verdict,
        checks=proof.checks,
        candidates=candidates,
        notes=[*embedder.notes, *proof.notes],
        package=package,
    )


def _require_proof(proof: EmbedderProof) -> None:
    """Raises `ImportFailure` when the served form is not the uploaded model."""
    if proof.verdict == "different":
        failed = "; ".join(
            f"{check.name}: {check.error} of {check.tolerance} allowed"
            for check in proof.checks
            if not check.is_equal
        )
        raise ImportFailure(
            "not_equal",
            f"The model is not served, because its served form does not compute what it does "
            f"({failed[:400]}). That is a limit of this release, not a fault of the upload.",
        )
