"""Runs one step of a decoder: token ids in, next-token logits out, keys and values in the pool.

Owns how a model, a pool and an attention backend meet. Does not decide what is in a step
(`runtime.scheduling`) nor which token is next (`sampler.py`).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from runtime.cache.pool import KvPool
from runtime.cache.transfer import send
from runtime.execution.attention import AttentionBackend, AttentionMetadata, Batch, LayerSpec
from runtime.scheduling.plan import BlockMoves

# (layer index, query, keys, values) -> attended, all [tokens, heads or kv_heads, head_dim].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class PagedModel(Protocol):
    """A decoder whose attention is left to the caller, over packed tokens of many sequences."""

    @property
    def layers(self) -> list[LayerSpec]: ...

    def forward(
        self, token_ids: Tensor, positions: Tensor, sample_indices: Tensor, attend: Attend
    ) -> Tensor:
        """Logits `[sampled, vocab]` of the rows `sample_indices` of `token_ids` `[tokens]`.

        Calls `attend` exactly once per layer, in any order.
        """
        ...


class PackedBatch(Batch, Protocol):
    """A step's packed batch on the CPU (see `batch.StepBatch`)."""

    @property
    def token_ids(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def sample_indices(self) -> Tensor: ...


class Runner:
    """Holds a model, the pools its keys and values live in, and the backend that attends."""

    def __init__(
        self,
        model: PagedModel,
        pool: KvPool,
        backend: AttentionBackend,
        swap: KvPool | None = None,
    ) -> None:
        """`swap` holds the blocks of preempted sequences, in host memory."""
        shapes = tuple(layer.kv_shape for layer in model.layers)
        assert shapes == pool.shapes, "the pool was made for other layers"
        self.model = model
        self.pool = pool
        self.backend = backend
        self.swap = swap

    @torch.inference_mode()
    def move(self, moves: BlockMoves) -> None:
        """Move whole blocks, in the order that `BlockMoves` gives."""
        if moves.swap_outs or moves.swap_ins:
            assert self.swap is not None, "there is nowhere to swap to"
            self.pool.copy_blocks_to(self.swap, moves.swap_outs)
        self.pool.poison(moves.poisons)
        if self.swap is not None:
            self.swap.copy_blocks_to(self.pool, moves.swap_ins)
        self.pool.copy_blocks(moves.copies)

    @torch.inference_mode()
    def run(self, batch: PackedBatch) -> Tensor:
        """float32 logits `[sampled, vocab]` on the pool's device; every token's K/V is written."""
        device = self.pool.device
        return self.compute(
            send(batch.token_ids, device),
            send(batch.positions, device),
            send(batch.sample_indices, device),
            AttentionMetadata.from_batch(batch, self.pool.block_size, device),
        )

    @torch.inference_mode()
    def compute(
        self,
        token_ids: Tensor,
        positions: Tensor,
        sample_indices: Tensor,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """`run` on tensors that lie on the pool's device: nothing here waits for it."""
        num_attended = 0

        def attend(layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            nonlocal num_attended
            num_attended += 1
            key_cache, value_cache = self.pool.keys(layer), self.pool.values(layer)
            self.backend.write(keys, values, key_cache, value_cache, metadata.slots)
            spec = self.model.layers[layer].attention
            return self.backend.attend(query, key_cache, value_cache, metadata, spec)

        logits = self.model.forward(token_ids, positions, sample_indices, attend)
        assert num_attended == len(self.model.layers), "a layer kept its keys to itself"
        return logits.float()
