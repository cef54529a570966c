"""Makes decoders of what a build packaged, in the form that it chose.

The build uses the same functions for the forms that it proves, so that what is served is what
was proved. What a graph may be is `paging`'s to judge; how it gets faster, `fused.py`'s.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.export import ExportedProgram

from runtime.compiling.fused import fuse_decoder
from runtime.compiling.graph_decoder import GraphDecoder, UncachedGraph
from runtime.compiling.packaging import PROGRAM_NAME
from runtime.compiling.paging import PagedGraph, page
from runtime.compiling.paging.cast import cast
from runtime.compiling.plans.plan import PlanUnusable
from runtime.compiling.plans.reading import load_planned
from runtime.importing.exported import load_exported
from runtime.importing.program import Decoder
from runtime.protocol import DecoderInfo, Manifest

if TYPE_CHECKING:
    from runtime.importing.huggingface_uncached import UncachedHuggingFace

logger = logging.getLogger(__name__)


def load_paged(artifact_dir: Path, manifest: Manifest, device: str = "cpu") -> Decoder:
    """The decoder of an artifact, ready for a `Runner`."""
    assert manifest.decoder is not None, "a decoder's manifest describes it"
    if manifest.format == "huggingface":
        from runtime.importing.huggingface import load_decoder

        return load_decoder(artifact_dir, device, is_checked=True)
    info = manifest.decoder
    if device == "cpu":  # where plans are made
        try:
            return load_planned(artifact_dir, info, manifest.form)
        except PlanUnusable as error:
            logger.warning("the build's plan is not used (%s): deriving the graph anew", error)
    model = load_exported(artifact_dir / PROGRAM_NAME, device)
    # Fused operators are the CPU's own.
    form = manifest.form if device == "cpu" else "eager"
    return graph_decoder(page_in_form(model.program, info.max_context_tokens, form), info)


def load_whole(
    artifact_dir: Path, manifest: Manifest, device: str = "cpu"
) -> "UncachedHuggingFace | UncachedGraph":
    """The decoder of an artifact that keeps no cache, ready for a `WholeRunner`."""
    assert manifest.decoder is not None, "a decoder's manifest describes it"
    if manifest.format == "huggingface":
        from runtime.importing.huggingface_uncached import load_uncached

        return load_uncached(artifact_dir, device, is_checked=True)
    model = load_exported(artifact_dir / PROGRAM_NAME, device)
    info = manifest.decoder
    return UncachedGraph(model, info, tuple(info.eos_token_ids), [])


def page_in_form(
    program: ExportedProgram,
    max_context_tokens: int,
    form: str = "eager",
    dtype: torch.dtype | None = None,
) -> PagedGraph:
    """A fresh paged graph of `program`, eager or fused, in `dtype` or else its own. Raises
    `NotPageable`, and for a fused one `FusionFailure`."""
    if dtype is not None:
        program = cast(program, dtype)
    paged = page(program, max_context_tokens=max_context_tokens)
    return fuse_decoder(paged) if form == "fused" else paged


def graph_decoder(paged: PagedGraph, info: DecoderInfo) -> GraphDecoder:
    """A paged graph as `info` describes it."""
    return GraphDecoder(paged, info, tuple(info.eos_token_ids), [])
