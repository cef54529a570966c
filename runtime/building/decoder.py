"""Builds a decoder of any origin: finds the way to serve it that is proved to be equal.

Owns the order of import, proof and measurement, and what is said of ways that did not do.
"""

import logging
from pathlib import Path

import msgspec

from runtime.building.fusing import Chosen, choose_form
from runtime.building.outcome import Outcome
from runtime.building.reporter import Reporter
from runtime.building.routes import NotThisWay, Route, Served, Source, alone
from runtime.compiling.graph_decoder import GraphDecoder
from runtime.compiling.packaging import add_directory, add_program, add_text
from runtime.compiling.plans.writing import add_plan
from runtime.execution.kernels import fastest_variant
from runtime.importing.program import ImportFailure
from runtime.importing.text_support import check_text
from runtime.protocol import Check, DecoderInfo, Manifest
from runtime.proving.decoder import DecoderProof, DecoderProver, available_bytes

logger = logging.getLogger("runtime.build")

NO_TEXT = (
    "Text is not served, only token ids: there is no tokenizer beside the program. Push it with "
    "--tokenizer DIR, where DIR holds tokenizer.json."
)


def build_decoder(source: Source, reporter: Reporter) -> Outcome:
    """Raises `ImportFailure`."""
    served, proof, notes = _find_route(source, reporter)
    chosen = choose_form(served, proof.verdict, source.prover, source.fuse, reporter)
    info, text_notes = _check_text(source.text_directory, chosen.served.info)
    manifest = Manifest(
        kind="decoder",
        format=chosen.served.format,
        num_parameters=served.num_parameters,
        weight_bytes=served.weight_bytes,
        form=chosen.served.form.name,
        kernels=variant.name if (variant := fastest_variant()) else "",
        decoder=info,
    )
    return Outcome(
        manifest=manifest,
        verdict=proof.verdict,
        checks=[*proof.checks, *chosen.checks],
        candidates=chosen.candidates,
        notes=[*notes, *served.notes, *text_notes, *proof.notes, *chosen.notes],
        route=chosen.served.route,
        package=lambda artifact_dir: _package(source, chosen, artifact_dir),
    )


# --- the route --------------------------------------------------------------------------


def _find_route(source: Source, reporter: Reporter) -> tuple[Served, DecoderProof, list[str]]:
    """The first route whose decoder is proved, its proof, and why not those before it."""
    notes: list[str] = []
    reason = ""  # of the first: the others often say less
    for route in source.routes:
        try:
            served = _load(route, reason, reporter)
        except NotThisWay as error:
            notes.append(f"Not served by {route.label}: {error}")
            reason = reason or str(error)
            continue
        try:
            served, proof = _judge(source.prover, served, reporter, notes)
        except ImportFailure:
            raise
        except Exception as error:  # of code of anyone's making: what cannot run is not equal
            logger.exception("the proof of a form failed")
            found = f"That form fails when it runs ({type(error).__name__}: {_line_of(error)})."
        else:
            if proof.verdict != "different":
                return served, proof, notes
            found = f"That form does not compute what the model does ({_failed(proof.checks)})."
        notes.append(f"Not served by {route.label}: {found}")
        reason = reason or found
    raise ImportFailure("not_servable", "The model is not served. " + " ".join(notes)[:2000])


def _judge(
    prover: DecoderProver, served: Served, reporter: Reporter, notes: list[str]
) -> tuple[Served, DecoderProof]:
    """With its proof, the form in which sequences run beside each other if they may."""
    proof = _prove(prover, served, reporter)
    if not _only_batching_differs(proof):
        return served, proof
    notes.append(
        "Sequences are computed one by one: side by side, their answers would change "
        f"({_failed(proof.checks)})."
    )
    served = alone(served)
    return served, _prove(prover, served, reporter)


def _load(route: Route, reason: str, reporter: Reporter) -> Served:
    with reporter.phase("import") as report:
        report(0.0, route.label)
        try:
            served = route.load(reason)
        except NotThisWay as error:
            report(0.5, f"not served by {route.label}: {error}")
            raise
        info = served.info
        report(
            1.0,
            f"{info.architecture}: {served.num_parameters:,} parameters in {info.dtype}, "
            f"{info.num_layers} layers, {info.max_context_tokens:,} tokens of context",
        )
        return served


def _prove(prover: DecoderProver, served: Served, reporter: Reporter) -> DecoderProof:
    with reporter.phase("prove") as report:
        proof = prover.prove(served.form, lambda label, fraction: report(fraction, label))
        report(1.0, f"{proof.verdict}: {len(proof.checks)} checks")
        return proof


def _only_batching_differs(proof: DecoderProof) -> bool:
    """Of an uncached form: a paged one has more checks than these."""
    failed = {check.name for check in proof.checks if not check.is_equal}
    names = {check.name for check in proof.checks}
    return failed == {"batched"} and names == {"whole", "batched"}


def _line_of(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


def _failed(checks: list[Check]) -> str:
    failed = [check for check in checks if not check.is_equal]
    shown = [f"{c.name}, {c.form}: {c.error:.3g} of {c.tolerance:.3g} allowed" for c in failed[:3]]
    return "; ".join(shown)


# --- text and files ---------------------------------------------------------------------


def _check_text(directory: Path | None, info: DecoderInfo) -> tuple[DecoderInfo, list[str]]:
    if directory is None:
        absent = msgspec.structs.replace(info, has_tokenizer=False, has_chat_template=False)
        return absent, [NO_TEXT]
    return check_text(directory, info)


def _package(source: Source, chosen: Chosen, artifact_dir: Path) -> list[str]:
    """Write what a worker loads. Returns the names of the upload's files that it does not."""
    upload, text = source.upload, source.text_directory
    if chosen.served.program_path is None:
        return add_directory(upload.path, artifact_dir)
    add_program(chosen.served.program_path, artifact_dir)
    _add_plan(chosen.served, artifact_dir)
    used = add_text(text, artifact_dir) if text else set[str]()
    if upload.kind == "huggingface":
        names = [path.name for path in sorted(upload.path.iterdir())]
        return [name for name in names if name not in used and not name.endswith(".safetensors")]
    if text is not None and text != upload.path.parent:
        used = {text.name}
    return [name for name in upload.beside if name not in used]


def _add_plan(served: Served, artifact_dir: Path) -> None:
    if not isinstance(served.decoder, GraphDecoder) or served.program is None:
        return
    if served.weight_bytes > available_bytes():
        lost = "there is too little memory to check it"
    else:
        program, form = served.program.program, served.form.name
        lost = add_plan(artifact_dir, served.decoder, program, form)
    if lost:
        logger.warning("no plan of the graph, so that starts take longer: %s", lost)
