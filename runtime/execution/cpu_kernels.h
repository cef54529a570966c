// One work item of paged attention: a tile of one sequence's query tokens, one kv head, a range of
// keys. The query heads that share a kv head are rows of the same tile, so each key and value is
// read once for all of them. Softmax is computed online, in float32. Two ways to do an item:
//   narrow  few rows (decoding): vectors run along head_dim, straight from the cache.
//   wide    many rows (prefill): vectors run along the rows, everything transposed, so that the
//           softmax needs no reduction across a vector and keys and values are mere broadcasts.

#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu_vectors.h"

namespace {

constexpr int kNarrowRows = 8;  // rows of a narrow item, at most

// What every item of a call shares. Strides are in elements.
template <typename T>
struct Call {
  const T* query;  // [tokens, heads, head_dim]
  int64_t query_token, query_head;
  const T* keys;  // [num_blocks, kv_heads, block_size, head_dim], the last two dense
  const T* values;
  int64_t cache_block, cache_head;
  const int32_t* block_tables;  // [sequences, max_blocks]
  int64_t max_blocks, block_size, head_dim, num_heads, num_kv_heads, group;
  float scale, soft_cap;
  int64_t window;
  const float* slopes;  // [heads] of ALiBi, or null
  const float* sinks;   // [heads] logits without a value, or null
  T* output;  // [tokens, heads, head_dim], dense

  const T* block(const T* cache, int64_t sequence, int64_t index, int64_t kv_head) const {
    return cache + block_tables[sequence * max_blocks + index] * cache_block + kv_head * cache_head;
  }
};

struct Item {
  int64_t sequence, kv_head;
  int64_t token, num_tokens;   // rows of the packed batch
  int64_t position;            // of the first of them
  int64_t first_key, end_key;  // the keys this item reads
  int64_t partial;             // where a split item leaves its part; -1 if it is whole
  bool is_narrow;
};

// Parts of split items: per row its maximum, its sum, and head_dim unnormalised outputs.
struct Partials {
  std::vector<float> data;
  int64_t row_size;
  float* row(int64_t partial, int64_t row) {
    return data.data() + (partial * kNarrowRows + row) * row_size;
  }
};

float* scratch(int64_t size) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  return memory.data();
}

template <typename T>
int64_t head_of(const Call<T>& call, const Item& item, int64_t row) {
  return item.kv_head * call.group + row % call.group;
}

// A row's maximum before its first key, to which its sum of 1 belongs: the sink. The parts of a
// split item have none; theirs joins when they are merged.
template <typename T>
float first_top(const Call<T>& call, const Item& item, int64_t row) {
  return call.sinks && item.partial < 0 ? call.sinks[head_of(call, item, row)] : -kInfinity;
}

template <typename T>
int64_t row_offset(const Call<T>& call, const Item& item, int64_t row) {
  const int64_t token = item.token + row / call.group;
  return (token * call.num_heads + head_of(call, item, row)) * call.head_dim;
}

template <typename T>
const T* query_row(const Call<T>& call, const Item& item, int64_t row) {
  return call.query + (item.token + row / call.group) * call.query_token +
         head_of(call, item, row) * call.query_head;
}

// What the narrow kernels read next, fetched ahead: blocks lie far apart, often a page each, and
// the hardware does not look past the end of a page.
template <typename T>
inline void prefetch_row(const T* row, int64_t dim) {
  if (!row) return;
  for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(row + d);
}

// scores[r][j] = q[r] . keys[j] for kLanes keys at a time, four together so that each row of q is
// read once for them. Rows past num_keys are not read; their scores repeat the last key's.
template <typename T, int R>
void narrow_scores(const T* keys, const T* next, int64_t num_keys, int64_t dim, const float* q,
                   float* scores, int64_t width) {
  for (int64_t first = 0; first < num_keys; first += kLanes) {
    Vec parts[R][kLanes / 4];
    for (int64_t g = 0; g < kLanes / 4; ++g) {
      const T* row[4];
      for (int64_t k = 0; k < 4; ++k) {
        const int64_t j = std::min(first + 4 * g + k, num_keys - 1);
        row[k] = keys + j * dim;
        prefetch_row(next ? next + j * dim : next, dim);
      }
      Vec sums[4][R] = {};
      for (int64_t d = 0; d < dim; d += kLanes)
        for (int k = 0; k < 4; ++k) {
          const Vec key = load(row[k] + d);
          for (int r = 0; r < R; ++r) sums[k][r] += key * load(q + r * dim + d);
        }
      for (int r = 0; r < R; ++r)
        parts[r][g] = fold<2>(fold<1>(sums[0][r], sums[1][r]), fold<1>(sums[2][r], sums[3][r]));
    }
    for (int r = 0; r < R; ++r) store(scores + r * width + first, fold_all(parts[r]));
  }
}

template <typename T, int R, int C>
inline int64_t narrow_columns(const T* values, const T* next, int64_t num_keys, int64_t dim,
                              const float* p, int64_t width, const float* alpha, float* out,
                              int64_t d) {
  for (; d + C * kLanes <= dim; d += C * kLanes) {
    Vec sums[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sums[r][c] = load(out + r * dim + d + c * kLanes) * alpha[r];
    for (int64_t j = 0; j < num_keys; ++j) {
      prefetch_row(next ? next + j * dim + d : next, C * kLanes);
      for (int c = 0; c < C; ++c) {
        const Vec value = load(values + j * dim + d + c * kLanes);
        for (int r = 0; r < R; ++r) sums[r][c] += value * p[r * width + j];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) store(out + r * dim + d + c * kLanes, sums[r][c]);
  }
  return d;
}

// out[r] = alpha[r] * out[r] + sum over j of p[r][j] * values[j].
template <typename T, int R>
void narrow_values(const T* values, const T* next, int64_t num_keys, int64_t dim, const float* p,
                   int64_t width, const float* alpha, float* out) {
  constexpr int kColumns = R > 4 ? kPanel / 2 : kPanel;
  int64_t d = 0;
  d = narrow_columns<T, R, kColumns>(values, next, num_keys, dim, p, width, alpha, out, d);
  narrow_columns<T, R, 1>(values, next, num_keys, dim, p, width, alpha, out, d);
}

// One row's softmax over a block, online: scores become weights. Returns the factor by which what
// was summed before must shrink.
template <typename T>
float narrow_softmax(const Call<T>& call, float* scores, int64_t width, int64_t first_key,
                     int64_t num_keys, int64_t position, float slope, float* maximum_so_far,
                     float* sum) {
  if (call.soft_cap > 0)
    for (int64_t j = 0; j < width; j += kLanes)
      store(scores + j, capped(load(scores + j), call.soft_cap));
  if (call.slopes)
    for (int64_t j = 0; j < width; ++j)
      scores[j] += slope * static_cast<float>(first_key + j - position);
  const int64_t begin = std::clamp<int64_t>(position - call.window + 1 - first_key, 0, num_keys);
  const int64_t end = std::clamp<int64_t>(position + 1 - first_key, begin, num_keys);
  std::fill(scores, scores + begin, -kInfinity);
  std::fill(scores + end, scores + width, -kInfinity);
  Vec tops = splat(*maximum_so_far);
  for (int64_t j = 0; j < width; j += kLanes) tops = maximum(load(scores + j), tops);
  float top = tops[0];
  for (int i = 1; i < kLanes; ++i) top = tops[i] > top ? tops[i] : top;
  const float base = top == -kInfinity ? 0.0f : top;
  Vec total{};
  for (int64_t j = 0; j < width; j += kLanes) {
    const Vec weights = exponential(load(scores + j) - base);
    store(scores + j, weights);
    total += weights;
  }
  const float alpha = *maximum_so_far == -kInfinity ? 0.0f : std::exp(*maximum_so_far - base);
  *maximum_so_far = top;
  *sum = *sum * alpha + sum_lanes(total);
  return alpha;
}

template <typename T, int R>
void run_narrow(const Call<T>& call, const Item& item, Partials& partials) {
  const int64_t dim = call.head_dim, bs = call.block_size;
  const int64_t width = (bs + kLanes - 1) / kLanes * kLanes;
  float* q = scratch(R * (2 * dim + width));
  float* out = q + R * dim;
  float* scores = out + R * dim;
  float tops[R], sums[R], alpha[R];
  for (int r = 0; r < R; ++r) {
    const T* source = query_row(call, item, r);
    for (int64_t d = 0; d < dim; ++d) q[r * dim + d] = static_cast<float>(source[d]) * call.scale;
    tops[r] = first_top(call, item, r);
    sums[r] = tops[r] == -kInfinity ? 0.0f : 1.0f;
  }
  std::fill(out, out + R * dim, 0.0f);
  for (int64_t key = item.first_key; key < item.end_key;) {
    const int64_t offset = key % bs, n = std::min(bs - offset, item.end_key - key);
    const int64_t index = key / bs;
    const T* keys = call.block(call.keys, item.sequence, index, item.kv_head) + offset * dim;
    const T* values = call.block(call.values, item.sequence, index, item.kv_head) + offset * dim;
    // Nothing is fetched ahead of the last block.
    const bool has_next = key + n < item.end_key;
    const T* next_keys =
        has_next ? call.block(call.keys, item.sequence, index + 1, item.kv_head) : nullptr;
    const T* next_values =
        has_next ? call.block(call.values, item.sequence, index + 1, item.kv_head) : nullptr;
    constexpr int kFirst = std::min(R, 4);
    narrow_scores<T, kFirst>(keys, next_keys, n, dim, q, scores, width);
    if constexpr (R > 4)
      narrow_scores<T, R - 4>(keys, nullptr, n, dim, q + 4 * dim, scores + 4 * width, width);
    for (int r = 0; r < R; ++r)
      alpha[r] = narrow_softmax(call, scores + r * width, width, key, n,
                                item.position + r / call.group,
                                call.slopes ? call.slopes[head_of(call, item, r)] : 0.0f, &tops[r],
                                &sums[r]);
    narrow_values<T, R>(values, next_values, n, dim, scores, width, alpha, out);
    key += n;
  }
  for (int r = 0; r < R; ++r) {
    if (item.partial >= 0) {
      float* part = partials.row(item.partial, r);
      part[0] = tops[r];
      part[1] = sums[r];
      std::copy(out + r * dim, out + (r + 1) * dim, part + 2);
    } else {
      T* target = call.output + row_offset(call, item, r);
      for (int64_t d = 0; d < dim; ++d) target[d] = static_cast<T>(out[r * dim + d] / sums[r]);
    }
  }
}

// Converts a block's rows to float; a float cache is used where it lies.
template <typename T>
const float* as_float(const T* source, int64_t size, float* target) {
  if constexpr (std::is_same_v<T, float>) {
    return source;
  } else {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(target + i, load(source + i));
    for (; i < size; ++i) target[i] = static_cast<float>(source[i]);
    return target;
  }
}

// The same online softmax for kLanes rows at once; `scores` is [num_keys, rows] at the first lane.
template <typename T>
void wide_softmax(const Call<T>& call, float* scores, int64_t rows, int64_t first_key,
                  int64_t num_keys, IntVec position, bool is_masked, const float* slopes,
                  float* top, float* sum, float* alpha) {
  const int32_t window = static_cast<int32_t>(call.window);
  Vec highest = load(top);
  for (int64_t j = 0; j < num_keys; ++j) {
    Vec s = load(scores + j * rows);
    if (call.soft_cap > 0) s = capped(s, call.soft_cap);
    const IntVec behind = position - static_cast<int32_t>(first_key + j);
    if (call.slopes) s -= load(slopes) * __builtin_convertvector(behind, Vec);
    if (is_masked) {
      s = (behind >= 0) & (behind < window) ? s : splat(-kInfinity);
    }
    store(scores + j * rows, s);
    highest = maximum(s, highest);
  }
  const Vec base = highest == -kInfinity ? Vec{} : highest;
  const Vec shrink = exponential(load(top) - base);
  Vec total = load(sum) * shrink;
  for (int64_t j = 0; j < num_keys; ++j) {
    const Vec weights = exponential(load(scores + j * rows) - base);
    store(scores + j * rows, weights);
    total += weights;
  }
  store(top, highest);
  store(sum, total);
  store(alpha, shrink);
}

template <typename T>
void run_wide(const Call<T>& call, const Item& item) {
  const int64_t dim = call.head_dim, bs = call.block_size, real = item.num_tokens * call.group;
  const int64_t rows = (real + kLanes - 1) / kLanes * kLanes;
  float* q = scratch(rows * (2 * dim + bs + 5) + 2 * bs * dim);  // [dim, rows]
  float* out = q + dim * rows;                                   // [dim, rows]
  float* scores = out + dim * rows;                              // [block_size, rows]
  float *top = scores + bs * rows, *sum = top + rows, *alpha = sum + rows;
  float* slopes = alpha + rows;
  int32_t* positions = reinterpret_cast<int32_t*>(slopes + rows);
  float *key_floats = slopes + 2 * rows, *value_floats = key_floats + bs * dim;
  for (int64_t m = 0; m < rows; ++m) {
    // Rows that only fill a vector repeat the last one; nothing reads what they become.
    const int64_t row = std::min(m, real - 1);
    const T* source = query_row(call, item, row);
    for (int64_t d = 0; d < dim; ++d) q[d * rows + m] = static_cast<float>(source[d]) * call.scale;
    positions[m] = static_cast<int32_t>(item.position + row / call.group);
    slopes[m] = call.slopes ? call.slopes[head_of(call, item, row)] : 0.0f;
    top[m] = first_top(call, item, row);
    sum[m] = top[m] == -kInfinity ? 0.0f : 1.0f;
  }
  std::fill(out, out + dim * rows, 0.0f);
  const int64_t last_position = item.position + item.num_tokens - 1;
  for (int64_t key = item.first_key; key < item.end_key;) {
    const int64_t offset = key % bs, n = std::min(bs - offset, item.end_key - key);
    const T* key_block = call.block(call.keys, item.sequence, key / bs, item.kv_head);
    const T* value_block = call.block(call.values, item.sequence, key / bs, item.kv_head);
    const float* keys = as_float(key_block + offset * dim, n * dim, key_floats);
    const float* values = as_float(value_block + offset * dim, n * dim, value_floats);
    multiply(keys, dim, 1, q, rows, scores, n, dim, nullptr);
    const bool is_masked = key + n - 1 > item.position || key <= last_position - call.window;
    for (int64_t m = 0; m < rows; m += kLanes) {
      IntVec position;
      std::memcpy(&position, positions + m, sizeof position);
      wide_softmax(call, scores + m, rows, key, n, position, is_masked, slopes + m, top + m,
                   sum + m, alpha + m);
    }
    multiply(values, 1, dim, scores, rows, out, dim, n, alpha);
    key += n;
  }
  for (int64_t m = 0; m < real; ++m) {
    T* target = call.output + row_offset(call, item, m);
    for (int64_t d = 0; d < dim; ++d) target[d] = static_cast<T>(out[d * rows + m] / sum[m]);
  }
}

template <typename T>
void run_few(const Call<T>& call, const Item& item, Partials& partials) {
  switch (item.num_tokens * call.group) {
    case 1: return run_narrow<T, 1>(call, item, partials);
    case 2: return run_narrow<T, 2>(call, item, partials);
    case 3: return run_narrow<T, 3>(call, item, partials);
    case 4: return run_narrow<T, 4>(call, item, partials);
    case 5: return run_narrow<T, 5>(call, item, partials);
    case 6: return run_narrow<T, 6>(call, item, partials);
    case 7: return run_narrow<T, 7>(call, item, partials);
    case 8: return run_narrow<T, 8>(call, item, partials);
  }
}

}  // namespace
