"""Paged attention on GPUs: two Triton kernels, one that writes and one that attends.

`TRITON_INTERPRET=1` in the environment before import runs them on CPU tensors, for tests.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.execution.attention import (
    AttentionBackend,
    AttentionMetadata,
    AttentionSpec,
    per_head,
)

MIN_ROWS = 16  # tl.dot needs at least 16 rows
PREFILL_ROWS = 64
TILE_KEYS = 64


@triton.jit
def write_kernel(
    keys,
    values,
    key_cache,
    value_cache,
    slots,
    keys_token,
    keys_head,
    values_token,
    values_head,
    cache_block,
    cache_head,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
):
    """One program stores one token's key and value of one kv head."""
    token, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + token)
    dim = tl.arange(0, padded_dim)
    is_real = dim < head_dim
    target = slot // block_size * cache_block + head * cache_head
    target += slot % block_size * head_dim + dim
    key = tl.load(keys + token * keys_token + head * keys_head + dim, mask=is_real)
    value = tl.load(values + token * values_token + head * values_head + dim, mask=is_real)
    tl.store(key_cache + target, key, mask=is_real)
    tl.store(value_cache + target, value, mask=is_real)


@triton.jit
def attend_kernel(
    query,
    key_cache,
    value_cache,
    output,
    query_start,
    context_lens,
    block_tables,
    slopes,
    sinks,
    scale,
    soft_cap,
    query_token,
    query_head,
    cache_block,
    cache_head,
    output_token,
    max_blocks,
    window,
    group: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    tile_tokens: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_keys: tl.constexpr,
    has_window: tl.constexpr,
    has_soft_cap: tl.constexpr,
    has_slopes: tl.constexpr,
    has_sinks: tl.constexpr,
    precision: tl.constexpr,
):
    """One program attends for a tile of one sequence's tokens and the query heads of one kv head.

    Row r of the tile is token `r // group`, query head `r % group`, so that a key is loaded once
    for all heads that share it. Softmax is online, in float32.
    """
    tile, sequence, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row = tl.load(query_start + sequence)
    num_tokens = tl.load(query_start + sequence + 1) - first_row
    first_token = tile * tile_tokens
    if first_token >= num_tokens:
        return
    context_len = tl.load(context_lens + sequence)
    row = tl.arange(0, tile_rows)
    dim = tl.arange(0, padded_dim)
    token = first_token + row // group
    is_real = (row < tile_tokens * group) & (token < num_tokens)
    is_dim = dim < head_dim
    position = context_len - num_tokens + token  # [rows]
    head = kv_head * group + row % group
    # 64-bit offsets: caches and prompts can exceed 2^31 elements.
    packed = (first_row + token).to(tl.int64)
    query_at = packed[:, None] * query_token + head[:, None] * query_head + dim[None, :]
    mask = is_real[:, None] & is_dim[None, :]
    q = tl.load(query + query_at, mask=mask, other=0.0)

    if has_sinks:  # a logit without a value: it is in the sum before any key
        top = tl.load(sinks + head)
        total = tl.full([tile_rows], 1.0, tl.float32)
    else:
        top = tl.full([tile_rows], float("-inf"), tl.float32)
        total = tl.zeros([tile_rows], tl.float32)
    slope = tl.zeros([tile_rows], tl.float32)
    if has_slopes:
        slope = tl.load(slopes + head)
    attended = tl.zeros([tile_rows, padded_dim], tl.float32)
    first_position = context_len - num_tokens + first_token
    end = tl.minimum(context_len, first_position + tile_tokens)
    start = 0
    if has_window:
        start = tl.maximum(0, first_position - window + 1) // tile_keys * tile_keys
    for first_key in range(start, end, tile_keys):
        key_at = first_key + tl.arange(0, tile_keys)
        is_key = key_at < end
        block = tl.load(
            block_tables + sequence * max_blocks + key_at // block_size, mask=is_key, other=0
        ).to(tl.int64)
        at = block * cache_block + kv_head * cache_head + key_at % block_size * head_dim
        is_loaded = is_key[:, None] & is_dim[None, :]
        key = tl.load(key_cache + at[:, None] + dim[None, :], mask=is_loaded, other=0.0)
        scores = tl.dot(q, tl.trans(key), input_precision=precision) * scale
        if has_soft_cap:
            scores = soft_cap * (2 * tl.sigmoid(2 * scores / soft_cap) - 1)  # tanh
        if has_slopes:
            scores += slope[:, None] * (key_at[None, :] - position[:, None]).to(tl.float32)
        is_visible = is_key[None, :] & (key_at[None, :] <= position[:, None])
        if has_window:
            is_visible = is_visible & (key_at[None, :] > position[:, None] - window)
        scores = tl.where(is_visible, scores, float("-inf"))

        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that saw nothing yet
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(weights, 1)
        value = tl.load(value_cache + at[:, None] + dim[None, :], mask=is_loaded, other=0.0)
        attended = attended * shrink[:, None]
        attended += tl.dot(weights.to(value.dtype), value, input_precision=precision)
        top = new_top

    output_at = packed[:, None] * output_token + head[:, None] * head_dim + dim[None, :]
    attended = attended / total[:, None]
    tl.store(output + output_at, attended.to(output.dtype.element_ty), mask=mask)


class TritonAttention(AttentionBackend):
    """Prefill and decode by the same kernel; only the size of its tiles differs."""

    name = "triton"

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
        _, num_heads, head_dim = query.shape
        num_kv_heads, block_size = key_cache.shape[1:3]
        group = num_heads // num_kv_heads
        rows = PREFILL_ROWS if metadata.max_query_len > 1 else MIN_ROWS
        rows = max(rows, triton.next_power_of_2(group))
        tile_tokens = rows // group
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
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
            per_head(spec.alibi_slopes, query.device),
            per_head(spec.sinks, query.device),
            spec.scale,
            spec.soft_cap or 0.0,
            *query.stride()[:2],
            *key_cache.stride()[:2],
            output.stride(0),
            metadata.block_tables.shape[1],
            spec.sliding_window or 0,
            group=group,
            block_size=block_size,
            head_dim=head_dim,
            padded_dim=max(16, triton.next_power_of_2(head_dim)),
            tile_tokens=tile_tokens,
            tile_rows=rows,
            tile_keys=TILE_KEYS,
            has_window=spec.sliding_window is not None,
            has_soft_cap=spec.soft_cap is not None,
            has_slopes=spec.alibi_slopes is not None,
            has_sinks=spec.sinks is not None,
            # Without it float32 products lose 13 bits on tensor cores.
            precision="ieee" if query.dtype == torch.float32 else "tf32",
        )
        return output
