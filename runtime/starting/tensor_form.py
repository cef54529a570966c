"""Which form of a tensor program a worker runs: the one that the build chose, or eager."""

import logging
from pathlib import Path

import msgspec
import torch

from runtime.batching.batcher import Run
from runtime.compiling.forms import (
    FormFailure,
    check_witness,
    environment,
    form_directory,
    load_form,
)
from runtime.compiling.programs import load_program
from runtime.protocol import Manifest, Schema, Serve, TensorSpec

logger = logging.getLogger("runtime.worker")


def load_run(config: Serve, manifest: Manifest) -> tuple[Run, Schema, Manifest]:
    """A form that has run once, the schema that it serves, and the manifest with the form in use:
    eager where the chosen one was made for another machine or does not answer as it did there."""
    if manifest.form != "eager":
        assert manifest.schema is not None, "forms are of tensor programs"
        try:
            return _load_chosen(config, manifest), manifest.schema, manifest
        except FormFailure as failure:
            logger.warning("serving eager instead of %s. %s", manifest.form, failure)
    model = load_program(Path(config.artifact_dir), manifest, config.device)
    # The manifest's: the build may have found that rows must not share a run.
    schema = manifest.schema or model.schema
    _warm_up(model.run, schema)
    return model.run, schema, msgspec.structs.replace(manifest, form="eager")


def _load_chosen(config: Serve, manifest: Manifest) -> Run:
    """Raises `FormFailure`."""
    present = environment(config.device, config.num_threads)
    if manifest.environment != present:
        raise FormFailure(f"It was made for {manifest.environment!r}; this is {present!r}.")
    directory = form_directory(Path(config.artifact_dir), manifest.form)
    run = load_form(
        manifest.form, None, directory, device=config.device, num_threads=config.num_threads
    )
    check_witness(run, directory)
    return run


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
