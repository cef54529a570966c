"""Which form of a tensor program a worker runs: the one that the build chose, or eager."""

import logging
from pathlib import Path

import msgspec
import torch

from runtime.compiling.forms import Run
from runtime.compiling.programs import load_program
from runtime.protocol import Manifest, Schema, Serve, TensorSpec
from runtime.starting.chosen_form import load_chosen

logger = logging.getLogger("runtime.worker")


def load_run(config: Serve, manifest: Manifest) -> tuple[Run, Schema, Manifest]:
    """A form that has run once, the schema that it serves, and the manifest naming the form."""
    run = load_chosen(config, manifest)
    if run is not None and manifest.schema is not None:
        return run, manifest.schema, manifest
    model = load_program(Path(config.artifact_dir), manifest, config.device)
    # The manifest's: the build may have found that rows must not share a run.
    schema = manifest.schema or model.schema
    _warm_up(model.run, schema)
    return model.run, schema, msgspec.structs.replace(manifest, form="eager")


def _warm_up(run: Run, schema: Schema) -> None:
    def zeros(spec: TensorSpec) -> torch.Tensor:
        shape = spec.min_shape or [size or 1 for size in spec.shape]
        return torch.zeros(shape, dtype=getattr(torch, spec.dtype))

    try:
        run([zeros(spec) for spec in schema.inputs])
    except torch.AcceleratorError:
        raise
    except Exception:  # some graphs refuse zeros; the build has seen this one run
        logger.warning("the warm-up run failed", exc_info=True)
