"""The Triton kernels of paged attention: one that writes, one that attends, and for decoding two
that attend in parts and merge them.

Owns what runs on the device. How it is launched is `triton_attention.py`'s.
"""

# Triton compiles these from their source; what pyright knows of Python's types does not apply.
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

import triton
import triton.language as tl


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
    if slot < 0:  # padding
        return
    dim = tl.arange(0, padded_dim)
    is_real = dim < head_dim
    target = slot // block_size * cache_block + head * cache_head
    target += slot % block_size * head_dim + dim
    key = tl.load(keys + token * keys_token + head * keys_head + dim, mask=is_real)
    value = tl.load(values + token * values_token + head * values_head + dim, mask=is_real)
    tl.store(key_cache + target, key, mask=is_real)
    tl.store(value_cache + target, value, mask=is_real)


@triton.jit
def attend_tile(
    q,
    key_cache,
    value_cache,
    table,
    cache_block,
    head_at,
    position,
    first_key,
    end,
    top,
    total,
    attended,
    slope,
    scale,
    soft_cap,
    window,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    tile_keys: tl.constexpr,
    has_window: tl.constexpr,
    has_soft_cap: tl.constexpr,
    has_slopes: tl.constexpr,
    precision: tl.constexpr,
):
    """Take a tile of keys into the online softmax (float32) of `q` [rows, padded_dim], whose rows
    are at `position` [rows]: the new top, total and attended."""
    dim = tl.arange(0, padded_dim)
    key_at = first_key + tl.arange(0, tile_keys)
    is_key = key_at < end
    block = tl.load(table + key_at // block_size, mask=is_key, other=0).to(tl.int64)
    at = block * cache_block + head_at + key_at % block_size * head_dim
    is_loaded = is_key[:, None] & (dim < head_dim)[None, :]
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
    return new_top, total, attended


@triton.jit(do_not_specialize=["max_blocks"])  # it differs from step to step
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
    table = block_tables + sequence * max_blocks
    for first_key in range(start, end, tile_keys):
        top, total, attended = attend_tile(
            q,
            key_cache,
            value_cache,
            table,
            cache_block,
            kv_head * cache_head,
            position,
            first_key,
            end,
            top,
            total,
            attended,
            slope,
            scale,
            soft_cap,
            window,
            block_size,
            head_dim,
            padded_dim,
            tile_keys,
            has_window,
            has_soft_cap,
            has_slopes,
            precision,
        )

    output_at = packed[:, None] * output_token + head[:, None] * head_dim + dim[None, :]
    # Padding saw nothing; NaN stays NaN.
    attended = tl.where(total[:, None] == 0.0, 0.0, attended / total[:, None])
    tl.store(output + output_at, attended.to(output.dtype.element_ty), mask=mask)


@triton.jit
def split_of(
    context_len,
    window,
    has_window: tl.constexpr,
    num_splits: tl.constexpr,
    min_split_keys: tl.constexpr,
):
    """How the last token's context is cut: the first key it sees, and the keys of each part.
    A function of the sequence alone, so that its result does not depend on its neighbours."""
    start = 0
    if has_window:
        start = tl.maximum(0, context_len - window)
    share = (context_len - start + num_splits - 1) // num_splits
    num_units = tl.maximum(1, (share + min_split_keys - 1) // min_split_keys)
    return start, num_units * min_split_keys


@triton.jit(do_not_specialize=["max_blocks"])
def attend_split_kernel(
    query,
    key_cache,
    value_cache,
    partial,
    tops,
    totals,
    context_lens,
    block_tables,
    slopes,
    scale,
    soft_cap,
    query_token,
    query_head,
    cache_block,
    cache_head,
    max_blocks,
    window,
    num_heads,
    group: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_keys: tl.constexpr,
    num_splits: tl.constexpr,
    min_split_keys: tl.constexpr,
    has_window: tl.constexpr,
    has_soft_cap: tl.constexpr,
    has_slopes: tl.constexpr,
    precision: tl.constexpr,
):
    """One program attends from one sequence's only token over one part of its context, for the
    query heads of one kv head.

    `partial` [sequences, heads, splits, head_dim] gets the weighted values, `totals` the sum of
    the weights and `tops` the score they are relative to [sequences, heads, splits]; all float32.
    Parts that a context does not reach are left as they are.
    """
    split, sequence, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context_len = tl.load(context_lens + sequence)
    start, split_keys = split_of(context_len, window, has_window, num_splits, min_split_keys)
    first = start + split * split_keys
    if first >= context_len:
        return
    end = tl.minimum(context_len, first + split_keys)
    row = tl.arange(0, tile_rows)
    dim = tl.arange(0, padded_dim)
    head = kv_head * group + row
    is_real = row < group
    mask = is_real[:, None] & (dim < head_dim)[None, :]
    query_at = sequence.to(tl.int64) * query_token + head[:, None] * query_head + dim[None, :]
    q = tl.load(query + query_at, mask=mask, other=0.0)
    position = tl.zeros([tile_rows], tl.int32) + context_len - 1
    top = tl.full([tile_rows], float("-inf"), tl.float32)
    total = tl.zeros([tile_rows], tl.float32)
    slope = tl.zeros([tile_rows], tl.float32)
    if has_slopes:
        slope = tl.load(slopes + head, mask=is_real, other=0.0)
    attended = tl.zeros([tile_rows, padded_dim], tl.float32)
    table = block_tables + sequence * max_blocks
    for first_key in range(first, end, tile_keys):
        top, total, attended = attend_tile(
            q,
            key_cache,
            value_cache,
            table,
            cache_block,
            kv_head * cache_head,
            position,
            first_key,
            end,
            top,
            total,
            attended,
            slope,
            scale,
            soft_cap,
            window,
            block_size,
            head_dim,
            padded_dim,
            tile_keys,
            has_window,
            has_soft_cap,
            has_slopes,
            precision,
        )
    at = (sequence.to(tl.int64) * num_heads + head) * num_splits + split  # [rows]
    tl.store(tops + at, top, mask=is_real)
    tl.store(totals + at, total, mask=is_real)
    tl.store(partial + at[:, None] * head_dim + dim[None, :], attended, mask=mask)


@triton.jit
def merge_kernel(
    partial,
    tops,
    totals,
    output,
    context_lens,
    sinks,
    window,
    output_token,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    num_splits: tl.constexpr,
    padded_splits: tl.constexpr,
    min_split_keys: tl.constexpr,
    has_window: tl.constexpr,
    has_sinks: tl.constexpr,
):
    """One program merges the parts of one sequence and query head: see `attend_split_kernel`."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    num_heads = tl.num_programs(1)
    context_len = tl.load(context_lens + sequence)
    start, split_keys = split_of(context_len, window, has_window, num_splits, min_split_keys)
    split = tl.arange(0, padded_splits)
    is_part = start + split * split_keys < context_len
    dim = tl.arange(0, padded_dim)
    is_dim = dim < head_dim
    at = (sequence.to(tl.int64) * num_heads + head) * num_splits + split
    part_tops = tl.load(tops + at, mask=is_part, other=float("-inf"))
    part_totals = tl.load(totals + at, mask=is_part, other=0.0)
    parts = tl.load(
        partial + at[:, None] * head_dim + dim[None, :],
        mask=is_part[:, None] & is_dim[None, :],
        other=0.0,
    )
    top = tl.max(part_tops, 0)
    if has_sinks:
        sink = tl.load(sinks + head)
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)  # padding, which saw nothing
    weights = tl.exp(part_tops - base)
    total = tl.sum(part_totals * weights, 0)
    if has_sinks:  # a logit without a value
        total += tl.exp(sink - base)
    attended = tl.sum(parts * weights[:, None], 0)
    attended = tl.where(total == 0.0, 0.0, attended / total)
    output_at = sequence.to(tl.int64) * output_token + head * head_dim + dim
    tl.store(output + output_at, attended.to(output.dtype.element_ty), mask=is_dim)
