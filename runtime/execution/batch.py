"""The plain arrays that one step needs, made from the scheduler's plan.

Owns their layout. Does not own the device: a runner copies what it needs there.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from runtime.scheduling.plan import StepPlan


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The tokens of all sequences laid end to end, without padding; CPU tensors."""

    token_ids: Tensor  # int64 [tokens]
    positions: Tensor  # int64 [tokens], within their sequence
    query_start: Tensor  # int32 [sequences + 1], where each sequence's tokens begin
    context_lens: Tensor  # int32 [sequences], tokens in the cache after this step
    block_tables: Tensor  # int32 [sequences, max_blocks], padded with 0; no blocks: [sequences, 0]
    slots: Tensor  # int64 [tokens], block * block_size + offset: where each token's K/V goes; or []
    sample_indices: Tensor  # int64 [sampled], the rows of tokens to sample from, in plan order

    @classmethod
    def from_plan(cls, plan: StepPlan, block_size: int) -> "StepBatch":
        """The arrays of a plan; `block_size` 0 is without blocks. Costs what is in the plan,
        whatever waits."""
        items = plan.items
        num_new = np.array([item.num_tokens for item in items], dtype=np.int64)
        num_computed = np.array([item.sequence.num_computed_tokens for item in items], np.int64)
        query_start = np.zeros(len(items) + 1, dtype=np.int64)
        np.cumsum(num_new, out=query_start[1:])

        token_ids: list[int] = []
        for item in items:
            start = item.sequence.num_computed_tokens
            token_ids += item.sequence.token_ids[start : start + item.num_tokens]

        rows = np.repeat(np.arange(len(items)), num_new)  # [tokens] -> sequence
        positions = np.arange(len(token_ids)) + (num_computed - query_start[:-1])[rows]
        block_tables = _block_tables(plan, num_computed + num_new, block_size)
        slots = np.zeros(0, dtype=np.int64)
        if block_size:
            blocks = block_tables[rows, positions // block_size].astype(np.int64)
            slots = blocks * block_size + positions % block_size
        is_sampled = np.array([item.is_sampled for item in items])
        return cls(
            token_ids=torch.tensor(token_ids, dtype=torch.int64),
            positions=torch.from_numpy(positions),
            query_start=torch.from_numpy(query_start.astype(np.int32)),
            context_lens=torch.from_numpy((num_computed + num_new).astype(np.int32)),
            block_tables=torch.from_numpy(block_tables),
            slots=torch.from_numpy(slots),
            sample_indices=torch.from_numpy(query_start[1:][is_sampled] - 1),
        )


def _block_tables(plan: StepPlan, num_tokens: np.ndarray, block_size: int) -> np.ndarray:
    """int32 [sequences, max_blocks] for `num_tokens` [sequences]."""
    if not block_size:
        return np.zeros((len(plan.items), 0), dtype=np.int32)
    num_blocks = -(-num_tokens // block_size)
    block_tables = np.zeros((len(plan.items), int(num_blocks.max())), dtype=np.int32)
    for row, item in enumerate(plan.items):
        block_tables[row, : num_blocks[row]] = item.sequence.block_table[: num_blocks[row]]
    return block_tables
