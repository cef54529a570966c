"""Paged attention on GPUs, by the kernels of `triton_kernels.py`.

`TRITON_INTERPRET=1` in the environment before import runs them on CPU tensors, for tests.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from runtime.cache.transfer import send
from runtime.execution.attention import AttentionBackend, AttentionMetadata, AttentionSpec
from runtime.execution.triton_kernels import (
    attend_kernel,
    attend_split_kernel,
    merge_kernel,
    write_kernel,
)

MIN_ROWS = 16  # tl.dot needs at least 16 rows
PREFILL_ROWS = 64
TILE_KEYS = 64
# A decoding token's context is cut into parts of at least so many keys, and at most so many parts.
MIN_SPLIT_KEYS = 128
MAX_SPLITS = 64
PROGRAMS_PER_PROCESSOR = 2  # that hide each other's waits for memory


class TritonAttention(AttentionBackend):
    """Prompts, and steps with some, by one kernel; steps that only decode by one whose programs
    share each sequence's context, without which a long context is read by few processors.

    Nothing about a launch depends on how long contexts are: what was captured stays right.
    """

    name = "triton"
    takes_padding = True

    def __init__(self, num_processors: int, max_context_tokens: int | None = None) -> None:
        """`num_processors` are the device's, and `max_context_tokens` its models' longest."""
        self._num_programs = num_processors * PROGRAMS_PER_PROCESSOR
        self._max_splits = MAX_SPLITS
        if max_context_tokens is not None:
            self._max_splits = min(MAX_SPLITS, triton.cdiv(max_context_tokens, MIN_SPLIT_KEYS))
        # Slopes and sinks by layer stay where they are: captured launches point at them.
        self._numbers: dict[tuple[float, ...], Tensor] = {}

    def num_splits(self, num_kv_heads: int) -> int:
        """Parts a context may be cut into, so that one sequence alone occupies the device."""
        return max(1, min(triton.cdiv(self._num_programs, num_kv_heads), self._max_splits))

    def write(
        self, keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
    ) -> None:
        num_tokens, num_kv_heads, head_dim = keys.shape
        launch: Any = write_kernel[(num_tokens, num_kv_heads)]
        launch(
            keys,
            values,
            key_cache,
            value_cache,
            slots,
            *keys.stride()[:2],
            *values.stride()[:2],
            *key_cache.stride()[:2],
            block_size=key_cache.shape[2],
            head_dim=head_dim,
            padded_dim=triton.next_power_of_2(head_dim),
        )

    def attend(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> Tensor:
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        num_splits = self.num_splits(key_cache.shape[1])
        if metadata.max_query_len == 1 and num_splits > 1:
            self._attend_split(query, key_cache, value_cache, output, metadata, spec, num_splits)
        else:
            self._attend(query, key_cache, value_cache, output, metadata, spec)
        return output

    def _attend(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        output: Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> None:
        num_kv_heads = key_cache.shape[1]
        group = query.shape[1] // num_kv_heads
        rows = PREFILL_ROWS if metadata.max_query_len > 1 else MIN_ROWS
        rows = max(rows, triton.next_power_of_2(group))
        tile_tokens = rows // group
        num_tiles = triton.cdiv(metadata.max_query_len, tile_tokens)
        launch: Any = attend_kernel[(num_tiles, metadata.context_lens.numel(), num_kv_heads)]
        launch(
            query,
            key_cache,
            value_cache,
            output,
            metadata.query_start,
            metadata.context_lens,
            metadata.block_tables,
            self._per_head(spec.alibi_slopes, query.device),
            self._per_head(spec.sinks, query.device),
            spec.scale,
            spec.soft_cap or 0.0,
            *query.stride()[:2],
            *key_cache.stride()[:2],
            output.stride(0),
            metadata.block_tables.shape[1],
            spec.sliding_window or 0,
            tile_tokens=tile_tokens,
            tile_rows=rows,
            has_sinks=spec.sinks is not None,
            **_shape(query, key_cache),
            **_rules(query, spec),
        )

    def _attend_split(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        output: Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
        num_splits: int,
    ) -> None:
        num_sequences, num_heads, head_dim = query.shape
        num_kv_heads = key_cache.shape[1]
        shape = _shape(query, key_cache)
        split = {"num_splits": num_splits, "min_split_keys": MIN_SPLIT_KEYS}
        parts = num_sequences, num_heads, num_splits
        partial = query.new_empty((*parts, head_dim), dtype=torch.float32)
        tops = query.new_empty(parts, dtype=torch.float32)
        totals = query.new_empty(parts, dtype=torch.float32)
        launch: Any = attend_split_kernel[(num_splits, num_sequences, num_kv_heads)]
        launch(
            query,
            key_cache,
            value_cache,
            partial,
            tops,
            totals,
            metadata.context_lens,
            metadata.block_tables,
            self._per_head(spec.alibi_slopes, query.device),
            spec.scale,
            spec.soft_cap or 0.0,
            *query.stride()[:2],
            *key_cache.stride()[:2],
            metadata.block_tables.shape[1],
            spec.sliding_window or 0,
            num_heads,
            tile_rows=max(MIN_ROWS, triton.next_power_of_2(shape["group"])),
            **split,
            **shape,
            **_rules(query, spec),
        )
        merge: Any = merge_kernel[(num_sequences, num_heads)]
        merge(
            partial,
            tops,
            totals,
            output,
            metadata.context_lens,
            self._per_head(spec.sinks, query.device),
            spec.sliding_window or 0,
            output.stride(0),
            head_dim=head_dim,
            padded_dim=shape["padded_dim"],
            padded_splits=triton.next_power_of_2(num_splits),
            has_window=spec.sliding_window is not None,
            has_sinks=spec.sinks is not None,
            **split,
        )

    def _per_head(self, numbers: tuple[float, ...] | None, device: torch.device) -> Tensor | None:
        if numbers is None:
            return None
        if numbers not in self._numbers:
            self._numbers[numbers] = send(torch.tensor(numbers, dtype=torch.float32), device)
        return self._numbers[numbers]


def _shape(query: Tensor, key_cache: Tensor) -> dict[str, int]:
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = key_cache.shape[1:3]
    return {
        "group": num_heads // num_kv_heads,
        "block_size": block_size,
        "head_dim": head_dim,
        "padded_dim": max(16, triton.next_power_of_2(head_dim)),
    }


def _rules(query: Tensor, spec: AttentionSpec) -> dict[str, Any]:
    return {
        "tile_keys": TILE_KEYS,
        "has_window": spec.sliding_window is not None,
        "has_soft_cap": spec.soft_cap is not None,
        "has_slopes": spec.alibi_slopes is not None,
        # Without it float32 products lose 13 bits on tensor cores.
        "precision": "ieee" if query.dtype == torch.float32 else "tf32",
    }
