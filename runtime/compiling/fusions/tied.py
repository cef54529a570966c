"""Reads an embedding from the packed output layer that it shares its weight with.

A tied embedding would else be the one weight that is kept twice.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from runtime.compiling.fusions.evaluated import EvaluatedGraph, op_name
from runtime.execution import ops


class PackedEmbedding(nn.Module):
    """Looks rows up in a layer packed for products."""

    def __init__(self, linear: ops.PackedLinear) -> None:
        super().__init__()
        self._linear = [linear]  # a list, so that its weights are not counted twice

    @property
    def linear(self) -> ops.PackedLinear:
        return self._linear[0]

    def forward(self, token_ids: Tensor) -> Tensor:
        return self._linear[0].weight_rows(token_ids)


def share_embeddings(graph: EvaluatedGraph, packed: dict[fx.Node, ops.PackedLinear]) -> int:
    """Returns how many lookups read a packed weight now. `packed` holds, by the node of its weight,
    each layer that stands alone."""
    num_shared = 0
    for node in list(graph.graph.nodes):
        if op_name(node) != "embedding" or len(node.args) < 2:
            continue
        weight: Any = node.args[0]
        if weight not in packed:
            continue
        name = f"packed_embedding_{num_shared}"
        embedding = PackedEmbedding(packed[weight])
        new = graph.call_module(node, name, embedding, node.args[1])
        exact = all(map(torch.equal, graph.values[node], graph.values[new]))
        if exact and graph.replace(node, new):
            graph.discard(node)
            num_shared += 1
    return num_shared
