"""The fused form of a paged decoder: the same graph with fewer operations and packed weights.

Whether it equals the original is `runtime.proving`'s question, whether it is faster the build's.
"""

import dataclasses

from runtime.compiling.fusions import FusionFailure, optimise
from runtime.compiling.fusions.straight import straight_function
from runtime.compiling.paging import PagedGraph

__all__ = ["FusionFailure", "fuse_decoder"]

SHOWN = ("linear layers", "norms", "residuals", "rotary embeddings", "gates")


def fuse_decoder(paged: PagedGraph) -> PagedGraph:
    """Rewrites `paged.module`, which must not be used afterwards except in the result: packed
    weights are dropped from it one by one. Raises `FusionFailure` if the result is not equal."""
    try:
        module, counts = optimise(paged.module, paged.vocab_size, paged.max_context_tokens)
    except FusionFailure:
        raise
    # Passes run the graph's own operators on small batches, which may raise anything.
    except Exception as error:
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise FusionFailure(f"the graph cannot be rewritten: {first[0]}") from error
    module.forward = straight_function(module)
    done = ", ".join(f"{counts[name]} {name}" for name in SHOWN if counts.get(name))
    notes = [*paged.notes, f"Fused: {done}."] if done else paged.notes
    return dataclasses.replace(paged, module=module, notes=notes)
