"""Paged attention in plain torch: slow, readable, right. The oracle for every other backend."""

import torch
from torch import Tensor

from runtime.execution.attention import AttentionBackend, AttentionMetadata, AttentionSpec


class ReferenceAttention(AttentionBackend):
    """Works on any device and dtype; one sequence at a time, its past gathered into one tensor."""

    name = "reference"
    takes_padding = True

    def write(
        self, keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
    ) -> None:
        block_size = key_cache.shape[2]
        is_real = slots >= 0
        slots = slots[is_real]
        blocks, offsets = slots // block_size, slots % block_size
        key_cache[blocks, :, offsets] = keys[is_real]
        value_cache[blocks, :, offsets] = values[is_real]

    def attend(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> Tensor:
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        starts = metadata.query_start.tolist()
        for i, context_len in enumerate(metadata.context_lens.tolist()):
            rows = slice(starts[i], starts[i + 1])
            if context_len == 0:  # padding
                output[rows] = 0
                continue
            blocks = metadata.block_tables[i].long()
            keys = gather(key_cache, blocks, context_len)
            values = gather(value_cache, blocks, context_len)
            output[rows] = attend_one(query[rows], keys, values, spec).to(query.dtype)
        return output


def gather(cache: Tensor, blocks: Tensor, context_len: int) -> Tensor:
    """The first `context_len` cached positions in order, as `[kv_heads, context_len, head_dim]`."""
    num_blocks = -(-context_len // cache.shape[2])
    return cache[blocks[:num_blocks]].transpose(0, 1).flatten(1, 2)[:, :context_len]


def attend_one(query: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec) -> Tensor:
    """Attention of one sequence's last tokens `[tokens, heads, head_dim]` over its whole past
    `[kv_heads, context_len, head_dim]`; computed in float32, or float64 if the query is."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, context_len, _ = keys.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    # [kv_heads, group, tokens, head_dim]: the query heads that share a kv head, side by side.
    grouped = query.to(dtype).view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    scores = grouped @ keys.to(dtype).unsqueeze(1).transpose(2, 3) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    key_at = torch.arange(context_len, device=query.device)
    query_at = torch.arange(context_len - num_tokens, context_len, device=query.device)[:, None]
    if spec.alibi_slopes is not None:
        scores = scores + _per_group(spec.alibi_slopes, scores) * (key_at - query_at)
    visible = key_at <= query_at
    if spec.sliding_window is not None:
        visible &= key_at > query_at - spec.sliding_window
    scores = scores.masked_fill(~visible, -torch.inf)
    if spec.sinks is not None:  # a column more, whose probability goes nowhere
        sinks = _per_group(spec.sinks, scores).expand(-1, -1, num_tokens, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    probabilities = scores.softmax(-1)[..., :context_len]
    attended = probabilities @ values.to(dtype).unsqueeze(1)
    return attended.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)


def _per_group(numbers: tuple[float, ...], scores: Tensor) -> Tensor:
    """One number per query head, shaped to meet scores `[kv_heads, group, tokens, keys]`."""
    tensor = torch.tensor(numbers, dtype=scores.dtype, device=scores.device)
    return tensor.view(*scores.shape[:2], 1, 1)
