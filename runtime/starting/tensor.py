"""Starts a tensor program: never imports transformers, nor tokenizers without need."""

import logging
from pathlib import Path

from runtime.compiling.packaging import ArtifactError, read_receipt
from runtime.protocol import Manifest, Ready, Serve
from runtime.server.tensor import TensorServer
from runtime.starting.memory import settled_bytes
from runtime.starting.tensor_form import load_run

logger = logging.getLogger("runtime.worker")


def load_tensor(config: Serve, manifest: Manifest) -> tuple[TensorServer, Ready]:
    """A tensor program that has run once. `Ready` says which form is in use."""
    run, schema, manifest = load_run(config, manifest)
    text_rows = None
    if manifest.text is not None:
        from runtime.batching.text_rows import TextRows

        text_rows = TextRows.load(Path(config.artifact_dir), manifest.text, schema)
    measured = _measured_ms(Path(config.artifact_dir), manifest.form)
    return TensorServer(run, schema, config, text_rows, measured=measured), Ready(
        manifest=manifest, memory_bytes=settled_bytes()
    )


def _measured_ms(artifact_dir: Path, form: str) -> dict[int, float]:
    """Milliseconds of a run by rows, as the build measured the form in use; without a receipt
    they are learnt from the first runs."""
    try:
        receipt = read_receipt(artifact_dir)
    except ArtifactError as error:
        logger.warning("what the build measured is not known: %s", error)
        return {}
    return next((each.p50_ms for each in receipt.candidates if each.name == form), {})
