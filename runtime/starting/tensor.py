"""Starts a tensor program: never imports transformers."""

from pathlib import Path

from runtime.batching.text_rows import TextRows
from runtime.protocol import Manifest, Ready, Serve
from runtime.server.tensor import TensorServer
from runtime.starting.memory import settled_bytes
from runtime.starting.tensor_form import load_run


def load_tensor(config: Serve, manifest: Manifest) -> tuple[TensorServer, Ready]:
    """A tensor program that has run once. `Ready` says which form is in use."""
    run, schema, manifest = load_run(config, manifest)
    text_rows = None
    if manifest.text is not None:
        text_rows = TextRows.load(Path(config.artifact_dir), manifest.text, schema)
    return TensorServer(run, schema, config, text_rows), Ready(
        manifest=manifest, memory_bytes=settled_bytes()
    )
