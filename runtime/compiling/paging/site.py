"""The place in a paged graph where a layer attends, and how a pass reaches it.

Owns the seam between a graph and whoever holds the keys and values; computes nothing itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

from runtime.execution.runner import Attend

# Graphs are called from many threads; where a pass sends its keys and values travels with it.
_attend: ContextVar[Attend] = ContextVar("graph_attend")


class AttentionSite(nn.Module):
    """One attention layer of a paged graph, `[tokens, heads | kv_heads, head_dim]` in and out."""

    def __init__(self, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return _attend.get()(self.layer_index, query, keys, values)


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Every `AttentionSite` called inside goes to `attend`."""
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)
