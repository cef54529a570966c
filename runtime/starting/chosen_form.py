"""Loads the form that a build chose, where it may be used."""

import logging
from pathlib import Path

from runtime.compiling.forms import (
    FormFailure,
    Run,
    check_witness,
    environment,
    form_directory,
    load_form,
)
from runtime.protocol import Manifest, Serve

logger = logging.getLogger("runtime.worker")


def load_chosen(config: Serve, manifest: Manifest) -> Run | None:
    """The manifest's form after its first run. None means eager: it was chosen, or the form was
    made for another machine or does not answer here as it did there, which is logged."""
    if manifest.form == "eager":
        return None
    try:
        return _load(config, manifest)
    except FormFailure as failure:
        logger.warning("serving eager instead of %s. %s", manifest.form, failure)
        return None


def _load(config: Serve, manifest: Manifest) -> Run:
    present = environment(config.device, config.num_threads)
    if manifest.environment != present:
        raise FormFailure(f"It was made for {manifest.environment!r}; this is {present!r}.")
    directory = form_directory(Path(config.artifact_dir), manifest.form)
    run = load_form(
        manifest.form, None, directory, device=config.device, num_threads=config.num_threads
    )
    check_witness(run, directory)
    return run
