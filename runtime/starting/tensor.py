"""Starts a tensor program: never imports transformers."""

from runtime.protocol import Manifest, Ready, Serve
from runtime.server.tensor import TensorServer
from runtime.starting.memory import settled_bytes
from runtime.starting.tensor_form import load_run


def load_tensor(config: Serve, manifest: Manifest) -> tuple[TensorServer, Ready]:
    """A tensor program that has run once. `Ready` says which form is in use."""
    run, schema, manifest = load_run(config, manifest)
    return TensorServer(run, schema, config), Ready(
        manifest=manifest, memory_bytes=settled_bytes()
    )
