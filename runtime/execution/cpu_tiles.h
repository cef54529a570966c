// Paged attention in bfloat16 by matrix products, for CPUs with VDPBF16PS (see cpu_kernels.h for
// the others). A tile of keys is brought into the order of packed weights once, then every few rows
// of the item are multiplied with it as in a linear layer: scores = q . keys, softmax, out +=
// weights . values. Weights are rounded to bfloat16 for their product; scores, sums and outputs
// stay in float32.

#pragma once

#include "cpu_kernels.h"
#include "cpu_linear.h"

#if defined(__AVX512BF16__)

namespace {

using c10::BFloat16;

constexpr int kTileKeys = 64;
constexpr int kTileMaxDim = 512;
constexpr int kPairs = 32;  // bfloat16s of a register

inline bool fits_tiles(int64_t head_dim) {
  return head_dim % kPairs == 0 && head_dim <= kTileMaxDim;
}

inline __m512i load_pairs(const BFloat16* p) {
  return _mm512_loadu_si512(reinterpret_cast<const void*>(p));
}

// Where the rows of a tile lie; those behind its last key are a row of zeros.
struct TileRows {
  const BFloat16* keys[kTileKeys];
  const BFloat16* values[kTileKeys];
  int64_t first_key = 0, count = 0;
};

// 16 vectors of 16 words, transposed.
inline void transpose_words(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Keys as weights of `count` outputs and `dim` inputs: [blocks, dim / 2, 16, 2].
inline void pack_keys(const TileRows& rows, const TileRows& next, int64_t dim, BFloat16* packed) {
  for (int64_t first = 0; first < rows.count; first += kBlock)
    for (int64_t d = 0; d < dim; d += kPairs) {
      __m512i words[kBlock];
      for (int i = 0; i < kBlock; ++i) {
        words[i] = load_pairs(rows.keys[first + i] + d);
        if (first + i < next.count) __builtin_prefetch(next.keys[first + i] + d);
      }
      transpose_words(words);
      BFloat16* target = packed + (first * dim / 2 + d / 2 * kBlock) * 2;
      for (int i = 0; i < kBlock; ++i) _mm512_storeu_si512(target + i * kPairs, words[i]);
    }
}

// Values as weights of `dim` outputs and kTileKeys inputs: [dim / 16, kTileKeys / 2, 16, 2].
inline void pack_values(const TileRows& rows, const TileRows& next, int64_t dim,
                        BFloat16* packed) {
  alignas(64) static constexpr auto kOrder = [] {
    struct { int16_t low[kPairs], high[kPairs]; } order{};
    for (int i = 0; i < kPairs; ++i) {
      order.low[i] = i / 2 + i % 2 * kPairs;
      order.high[i] = order.low[i] + kPairs / 2;
    }
    return order;
  }();
  const __m512i low = _mm512_loadu_si512(kOrder.low), high = _mm512_loadu_si512(kOrder.high);
  for (int64_t j = 0; j < rows.count; j += 2)
    for (int64_t d = 0; d < dim; d += kPairs) {
      const __m512i a = load_pairs(rows.values[j] + d), b = load_pairs(rows.values[j + 1] + d);
      BFloat16* target = packed + (d * kTileKeys / 2 + j / 2 * kBlock) * 2;
      _mm512_storeu_si512(target, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(target + kTileKeys * kBlock, _mm512_permutex2var_epi16(a, high, b));
      for (int64_t i = j; i < j + 2 && i < next.count; ++i)
        __builtin_prefetch(next.values[i] + d);
    }
}

// What one row keeps between tiles. The sum is kept by lane, and added up at the end.
struct RowState {
  Vec sums;
  float top, slope;
  int64_t position;
};

// A row's softmax over a tile, online: its scores become weights. Returns the factor by which what
// was summed before must shrink.
inline float tile_softmax(const Call<BFloat16>& call, float* scores, const TileRows& tile,
                          RowState& row, BFloat16* weights) {
  const int64_t width = (tile.count + kLanes - 1) / kLanes * kLanes;
  const int64_t first = tile.first_key, position = row.position;
  const int64_t begin = std::max<int64_t>(position - call.window + 1 - first, 0);
  const int64_t end = std::min<int64_t>(position + 1 - first, tile.count);
  Vec tops = splat(-kInfinity), ramp;
  for (int i = 0; i < kLanes; ++i) ramp[i] = static_cast<float>(i);
  for (int64_t j = 0; j < width; j += kLanes) {
    Vec s = load(scores + j) * call.scale;
    if (call.soft_cap > 0) s = capped(s, call.soft_cap);
    if (call.slopes) s += row.slope * (ramp + static_cast<float>(first + j - position));
    if (j < begin || j + kLanes > end)
      s = (ramp >= static_cast<float>(begin - j)) & (ramp < static_cast<float>(end - j))
              ? s
              : splat(-kInfinity);
    store(scores + j, s);
    tops = maximum(s, tops);
  }
  const float top = std::max(row.top, _mm512_reduce_max_ps((__m512)tops));
  const float base = top == -kInfinity ? 0.0f : top;
  Vec total{};
  for (int64_t j = 0; j < width; j += kLanes) {
    const Vec w = exponential(load(scores + j) - base);
    store(weights + j, w);
    total += w;
  }
  // Most tiles do not raise the maximum.
  const float shrink = top == row.top ? 1.0f : exponential(splat(row.top - base))[0];
  row.top = top;
  row.sums = row.sums * shrink + total;
  return shrink;
}

// One item's buffers, in one piece of scratch memory.
struct TileBuffers {
  BFloat16 *query, *keys, *values;  // [rows, dim], and both packed
  float* out;                       // [rows, dim]
  RowState* states;

  TileBuffers(int64_t rows, int64_t dim) {
    const int64_t state_floats = rows * sizeof(RowState) / sizeof(float);
    float* at = scratch(rows * dim / 2 + kTileKeys * dim + rows * dim + state_floats + kLanes);
    states = reinterpret_cast<RowState*>((reinterpret_cast<uintptr_t>(at) + 63) / 64 * 64);
    out = reinterpret_cast<float*>(states + rows);
    query = reinterpret_cast<BFloat16*>(out + rows * dim);
    keys = query + rows * dim;
    values = keys + kTileKeys * dim;
  }
};

inline void find_rows(const Call<BFloat16>& call, const Item& item, int64_t key, TileRows& rows) {
  static constexpr uint16_t kZeros[kTileMaxDim] = {};
  const int64_t bs = call.block_size, dim = call.head_dim;
  rows.first_key = key;
  rows.count = std::min(item.end_key, (key / kTileKeys + 1) * kTileKeys) - key;
  for (int64_t i = 0; i < rows.count;) {
    const int64_t offset = (key + i) % bs, n = std::min(bs - offset, rows.count - i);
    const int64_t index = (key + i) / bs;
    const auto* keys = call.block(call.keys, item.sequence, index, item.kv_head) + offset * dim;
    const auto* values = call.block(call.values, item.sequence, index, item.kv_head) + offset * dim;
    for (int64_t j = 0; j < n; ++j, ++i) {
      rows.keys[i] = keys + j * dim;
      rows.values[i] = values + j * dim;
    }
  }
  const int64_t padded = (rows.count + kBlock - 1) / kBlock * kBlock;
  for (int64_t i = rows.count; i < padded; ++i)
    rows.keys[i] = rows.values[i] = reinterpret_cast<const BFloat16*>(kZeros);
}

// `count` rows from `first` on, against the packed tile.
inline void attend_tile(const Call<BFloat16>& call, const TileBuffers& buffers,
                        const TileRows& tile, int64_t first, int64_t count) {
  const int64_t dim = call.head_dim, blocks = (tile.count + kBlock - 1) / kBlock;
  alignas(64) float scores[kTileRowsMax * kTileKeys];
  alignas(64) BFloat16 weights[kTileRowsMax * kTileKeys];
  float shrink[kTileRowsMax];
  linear_blocks<BFloat16, 0>(buffers.query + first * dim, dim, count, buffers.keys, dim, blocks,
                             scores, kTileKeys);
  for (int64_t r = 0; r < count; ++r)
    shrink[r] = tile_softmax(call, scores + r * kTileKeys, tile, buffers.states[first + r],
                             weights + r * kTileKeys);
  const int64_t depth = (tile.count + 1) / 2 * 2;
  for (int64_t d = 0; d < dim; d += kTileBlocks * kBlock) {
    const int64_t width = std::min<int64_t>(kTileBlocks * kBlock, dim - d);
    linear_blocks<BFloat16, 0>(weights, kTileKeys, count, buffers.values + d * kTileKeys, depth,
                               width / kBlock, scores, kTileKeys, kTileKeys);
    for (int64_t r = 0; r < count; ++r) {
      float* out = buffers.out + (first + r) * dim + d;
      for (int64_t i = 0; i < width; i += kLanes)
        store(out + i, load(out + i) * shrink[r] + load(scores + r * kTileKeys + i));
    }
  }
}

// `next` is what this thread will probably do then: its first tile is fetched during the last.
inline void run_tiles(const Call<BFloat16>& call, const Item& item, const Item* next,
                      Partials& partials) {
  const int64_t dim = call.head_dim, rows = item.num_tokens * call.group;
  const TileBuffers buffers(rows, dim);
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(buffers.query + r * dim, query_row(call, item, r), dim * sizeof(BFloat16));
    const float top = first_top(call, item, r);
    Vec sums{};
    sums[0] = top == -kInfinity ? 0.0f : 1.0f;
    buffers.states[r] = {sums, top, call.slopes ? call.slopes[head_of(call, item, r)] : 0.0f,
                         item.position + r / call.group};
  }
  std::fill(buffers.out, buffers.out + rows * dim, 0.0f);
  TileRows tiles[2];
  find_rows(call, item, item.first_key, tiles[0]);
  for (int64_t key = item.first_key, i = 0; key < item.end_key; ++i) {
    const TileRows& tile = tiles[i & 1];
    TileRows& following = tiles[~i & 1];
    key += tile.count;
    following.count = 0;
    if (key < item.end_key)
      find_rows(call, item, key, following);
    else if (next)
      find_rows(call, *next, next->first_key, following);
    pack_keys(tile, following, dim, buffers.keys);
    pack_values(tile, following, dim, buffers.values);
    for (int64_t r = 0; r < rows; r += kTileRowsMax) {
      const int64_t count = std::min<int64_t>(kTileRowsMax, rows - r);
      if (buffers.states[r + count - 1].position >= tile.first_key)
        attend_tile(call, buffers, tile, r, count);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float* out = buffers.out + r * dim;
    const float sum = sum_lanes(buffers.states[r].sums);
    if (item.partial >= 0) {
      float* part = partials.row(item.partial, r);
      part[0] = buffers.states[r].top;
      part[1] = sum;
      std::copy(out, out + dim, part + 2);
    } else {
      BFloat16* target = call.output + row_offset(call, item, r);
      for (int64_t d = 0; d < dim; d += kLanes) store(target + d, load(out + d) / sum);
    }
  }
}

}  // namespace

#endif
