"""Makes a decoder of an exported graph, in the form that a build chose.

Used alike by the build, which proves the form, and by the worker, which serves it from the
artifact. What a graph may be is `paging`'s to judge; how it gets faster, `fused.py`'s.
"""

import torch
from torch.export import ExportedProgram

from runtime.compiling.graph_decoder import GraphDecoder
from runtime.compiling.paging import PagedGraph, page
from runtime.compiling.paging.cast import cast
from runtime.protocol import DecoderInfo


def page_in_form(
    program: ExportedProgram,
    max_context_tokens: int,
    form: str = "eager",
    dtype: torch.dtype | None = None,
) -> PagedGraph:
    """A fresh paged graph of `program`, eager or fused, in `dtype` or else its own. Raises
    `NotPageable`, and for a fused one whatever stops the fusing."""
    if dtype is not None:
        program = cast(program, dtype)
    paged = page(program, max_context_tokens=max_context_tokens)
    if form == "fused":
        from runtime.compiling.fused import fuse_decoder

        return fuse_decoder(paged)
    return paged


def graph_decoder(paged: PagedGraph, info: DecoderInfo) -> GraphDecoder:
    """A paged graph as `info` describes it."""
    return GraphDecoder(paged, info, tuple(info.eos_token_ids), [])
