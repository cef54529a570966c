"""Rewrites a paged decoder's graph into fewer and faster operations.

Passes match what the data flow computes, not one library's sequence of nodes, and each site is
replaced only if it gives the same values on small batches. What no pass knows stays as it is.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, fx

from runtime.compiling.fusions.activations import name_activations
from runtime.compiling.fusions.cleaning import clean
from runtime.compiling.fusions.constants import fold_constants
from runtime.compiling.fusions.evaluated import TOLERANCES, EvaluatedGraph
from runtime.compiling.fusions.flattening import flatten
from runtime.compiling.fusions.gates import fuse_gates
from runtime.compiling.fusions.linears import pack_linears, release_unused
from runtime.compiling.fusions.norms import fuse_norms, fuse_residuals
from runtime.compiling.fusions.rotary import fuse_rotary
from runtime.compiling.fusions.rotations import join_rotations
from runtime.compiling.fusions.views import fold_views

logger = logging.getLogger(__name__)

OUTPUT_SLACK = 4  # how many times one site's tolerance the whole graph may be off


class FusionFailure(Exception):
    """The rewritten graph does not give what the graph gave, or does not run."""


def optimise(
    module: fx.GraphModule, vocab_size: int, num_positions: int
) -> tuple[fx.GraphModule, dict[str, int]]:
    """Rewrites a paged graph (see `paging`) in place; returns it and how many sites each pass
    changed. Weights that were packed are dropped from it. Raises `FusionFailure`, after which the
    module must not be used."""
    graph = EvaluatedGraph(module, vocab_size)
    counts = {"nodes before": len(graph.graph.nodes)}
    if mutating := [node.name for node in graph.graph.nodes if _is_mutating(node)]:
        logger.warning("graph left as it is: %s change their inputs", ", ".join(mutating[:3]))
        return module, counts
    expected = _output_values(graph)
    passes: list[tuple[str, Callable[[], int]]] = [
        ("no-ops", lambda: clean(graph)),
        ("constants", lambda: fold_constants(graph)),
        ("activations", lambda: name_activations(graph)),
        ("rotary embeddings", lambda: fuse_rotary(graph, num_positions)),
        ("flattened operations", lambda: flatten(graph)),
        ("views", lambda: fold_views(graph) + clean(graph)),
        ("norms", lambda: fuse_norms(graph)),
        ("residuals", lambda: fuse_residuals(graph)),
        ("linear layers", lambda: pack_linears(graph)),
        ("gates", lambda: fuse_gates(graph)),
        ("no-ops", lambda: clean(graph)),
        ("joined rotations", lambda: join_rotations(graph)),
        ("views", lambda: fold_views(graph)),
    ]
    for name, run in passes:
        counts[name] = counts.get(name, 0) + run()
        graph.refresh()  # values stay, but strides follow the rewriting
    release_unused(graph)
    _check(expected, _output_values(graph))
    module.delete_all_unused_submodules()
    graph.graph.lint()
    module.recompile()
    counts["nodes after"] = len(graph.graph.nodes)
    logger.info("optimised: %s", ", ".join(f"{count} {name}" for name, count in counts.items()))
    return module, counts


def _is_mutating(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _output_values(graph: EvaluatedGraph) -> list[Tensor]:
    output = next(iter(reversed(graph.graph.nodes)))
    logits = output.args[0]
    assert isinstance(logits, fx.Node), "a paged graph gives one tensor"
    return [value.clone() for value in graph.values[logits]]


def _check(expected: list[Tensor], found: list[Tensor]) -> None:
    for before, after in zip(expected, found, strict=True):
        limit = OUTPUT_SLACK * TOLERANCES[before.dtype] * before.abs().max().item()
        error = (before.double() - after.double()).abs().max().item()
        if not error <= limit:
            raise FusionFailure(f"the optimised graph's logits are off by {error:.3g}")
        if torch.equal(before, torch.zeros_like(before)):
            raise FusionFailure("the graph's logits are all zero, so nothing could be compared")
