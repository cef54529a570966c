"""Builds a decoder from a Hugging Face directory."""

from pathlib import Path

from runtime.building.outcome import Outcome
from runtime.building.reporter import Reporter
from runtime.compiling.packaging import add_directory
from runtime.importing.archive import UnpackedUpload
from runtime.importing.huggingface import load_decoder
from runtime.importing.program import ImportFailure
from runtime.importing.text_support import check_text
from runtime.protocol import Check, Manifest, Verdict
from runtime.proving.decoder import DecoderProver
from runtime.proving.forms import paged_form
from runtime.proving.huggingface_original import HuggingFaceOriginal
from runtime.proving.speed import measure_decoders


def build_decoder(upload: UnpackedUpload, reporter: Reporter) -> Outcome:
    """Raises `ImportFailure`."""
    with reporter.phase("import") as report:
        report(0.0, "loading the model")
        decoder = load_decoder(upload.path)
        parameters = list(decoder.module.parameters())
        num_parameters = sum(parameter.numel() for parameter in parameters)
        info, text_notes = check_text(upload.path, decoder.info)
        report(
            1.0,
            f"{info.architecture}: {num_parameters:,} parameters in {info.dtype}, "
            f"{info.num_layers} layers, {info.max_context_tokens:,} tokens of context",
        )
    with reporter.phase("prove") as report:
        form = paged_form(decoder, lambda dtype: load_decoder(upload.path, dtype=dtype))
        prover = DecoderProver(HuggingFaceOriginal(upload.path))
        proof = prover.prove(form, lambda label, fraction: report(fraction, label))
        _require_proof(proof.verdict, proof.checks)
        report(1.0, f"{proof.verdict}: {len(proof.checks)} checks")
    with reporter.phase("measure") as report:
        candidates = measure_decoders({"eager": decoder}, report)
    manifest = Manifest(
        kind="decoder",
        format="huggingface",
        num_parameters=num_parameters,
        weight_bytes=sum(parameter.nbytes for parameter in parameters),
        decoder=info,
    )

    def package(artifact_dir: Path) -> list[str]:
        return add_directory(upload.path, artifact_dir)

    return Outcome(
        manifest=manifest,
        verdict=proof.verdict,
        checks=proof.checks,
        candidates=candidates,
        notes=[*decoder.notes, *text_notes, *proof.notes],
        package=package,
    )


def _require_proof(verdict: Verdict, checks: list[Check]) -> None:
    """Raises `ImportFailure` when the served form is not the uploaded model."""
    if verdict == "different":
        failed = "; ".join(
            f"{check.name}: {check.error} of {check.tolerance} allowed"
            for check in checks
            if not check.is_equal
        )
        raise ImportFailure(
            "not_equal",
            f"The model is not served, because its served form does not compute what it does "
            f"({failed[:400]}). That is a limit of this release, not a fault of the upload.",
        )
