"""The attention seam: what a step tells every layer, and what a backend must do with it.

Owns the interface and the choice of a backend. The backends are `reference.py` (the oracle),
`cpu.py` (C++) and `triton_attention.py` (CUDA).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from runtime.cache.pool import KvShape
from runtime.cache.transfer import send


@dataclass(frozen=True)
class AttentionSpec:
    """How one layer attends, beside being causal.

    `sliding_window` w lets the token at position p see positions p-w+1 to p. `soft_cap` c turns a
    scaled score s into `c * tanh(s / c)`. `alibi_slopes`, one per query head, then add
    `slope * (key position - query position)` to the score (ALiBi, arXiv:2108.12409). `sinks`, one
    logit per query head, take part in the softmax's sum without a value of their own.
    """

    scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None
    alibi_slopes: tuple[float, ...] | None = None
    sinks: tuple[float, ...] | None = None


@lru_cache(maxsize=4096)  # a layer's numbers are the same in every step
def per_head(numbers: tuple[float, ...] | None, device: torch.device) -> Tensor | None:
    """A spec's slopes or sinks as a float32 tensor `[heads]` for a compiled backend."""
    return None if numbers is None else send(torch.tensor(numbers, dtype=torch.float32), device)


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer of a model: its shape and how it attends."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention: AttentionSpec

    @property
    def kv_shape(self) -> KvShape:
        return KvShape(self.num_kv_heads, self.head_dim)


class Batch(Protocol):
    """The part of a step's batch that attention needs, as CPU tensors (see `StepBatch`)."""

    @property
    def query_start(self) -> Tensor: ...
    @property
    def context_lens(self) -> Tensor: ...
    @property
    def block_tables(self) -> Tensor: ...
    @property
    def slots(self) -> Tensor: ...


@dataclass(frozen=True)
class AttentionMetadata:
    """Where a step's packed tokens and their cached past lie. One per step, for all layers.

    Tokens of sequence i are rows `query_start[i]` to `query_start[i+1]` of the packed batch and
    the last of its `context_lens[i]` positions. Position p of it is cached in block
    `block_tables[i, p // block_size]` at offset `p % block_size`.
    """

    query_start: Tensor  # int32 [sequences + 1]
    context_lens: Tensor  # int32 [sequences]; tokens in the cache after this step
    block_tables: Tensor  # int32 [sequences, max_blocks]; entries past the context are arbitrary
    slots: Tensor  # int64 [tokens]; block * block_size + offset of each new token
    block_size: int
    max_query_len: int
    max_context_len: int

    @classmethod
    def from_batch(
        cls, batch: Batch, block_size: int, device: torch.device | str = "cpu"
    ) -> "AttentionMetadata":
        """Move a batch's CPU tensors to `device`; the two maxima are taken before, on the CPU."""
        device = torch.device(device)
        query_lens = batch.query_start[1:] - batch.query_start[:-1]
        return cls(
            query_start=send(batch.query_start, device),
            context_lens=send(batch.context_lens, device),
            block_tables=send(batch.block_tables, device),
            slots=send(batch.slots, device),
            block_size=block_size,
            max_query_len=int(query_lens.max()),
            max_context_len=int(batch.context_lens.max()),
        )


class AttentionBackend(ABC):
    """Writes keys and values into blocks and attends over them.

    Contract:
    - `write` of a layer comes before its `attend` in the same step, so that a token sees itself.
    - Rows of different sequences never influence each other, whatever lies in their blocks.
    - Nothing outside a sequence's first `context_lens[i]` positions is used, not even times zero:
      blocks past it, and slots past it in the last block, may hold NaN.
    - Scores and sums are accumulated in float32 at least; outputs have the query's dtype.
    - Tensors may be strided in all but their last dimension.
    - Neither call changes its arguments, save `write` the caches.
    - With `takes_padding`: a token whose slot is -1 is stored nowhere, and the one token of a
      sequence whose context is 0 sees nothing and gets zeros, whatever its block table holds.
    """

    name: str
    takes_padding = False

    @abstractmethod
    def write(
        self, keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
    ) -> None:
        """Store `keys` and `values` `[tokens, kv_heads, head_dim]` at `slots`, in place."""

    @abstractmethod
    def attend(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> Tensor:
        """Causal attention of `query` `[tokens, heads, head_dim]` over the cached past.

        The caches are `[num_blocks, kv_heads, block_size, head_dim]`; query head h reads
        kv head `h // (heads // kv_heads)`. Returns `[tokens, heads, head_dim]`, contiguous.
        """


def choose_backend(
    device: torch.device | str, max_context_tokens: int | None = None
) -> AttentionBackend:
    """The fastest backend that works here: Triton on CUDA, the C++ op on CPU if it was compiled
    for this machine, else the reference. No context will be longer than `max_context_tokens`."""
    from runtime.execution.reference import ReferenceAttention

    if torch.device(device).type == "cuda":
        from runtime.execution.triton_attention import TritonAttention

        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return TritonAttention(processors, max_context_tokens)
    if torch.device(device).type == "cpu":
        from runtime.execution.cpu import load_cpu_attention

        cpu = load_cpu_attention()
        if cpu is not None:
            return cpu
    return ReferenceAttention()
