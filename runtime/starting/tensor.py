"""Starts a tensor program: never imports transformers."""

import logging
from pathlib import Path

import torch

from runtime.compiling.programs import load_program
from runtime.protocol import Manifest, Ready, Serve, TensorSpec
from runtime.server.tensor import TensorServer
from runtime.starting.memory import settled_bytes

logger = logging.getLogger("runtime.worker")


def load_tensor(config: Serve, manifest: Manifest) -> tuple[TensorServer, Ready]:
    """A tensor program, after one run on zeros."""
    model = load_program(Path(config.artifact_dir), manifest, config.device)
    # The manifest's: the build may have found that rows must not share a run.
    schema = manifest.schema or model.schema

    def zeros(spec: TensorSpec) -> torch.Tensor:
        shape = spec.min_shape or [size or 1 for size in spec.shape]
        return torch.zeros(shape, dtype=getattr(torch, spec.dtype))

    try:
        model.run([zeros(spec) for spec in schema.inputs])
    except torch.AcceleratorError:
        raise
    except Exception:  # some graphs refuse zeros; the build has seen this one run
        logger.warning("the warm-up run failed", exc_info=True)
    return TensorServer(model.run, schema, config), Ready(
        manifest=manifest, memory_bytes=settled_bytes()
    )
