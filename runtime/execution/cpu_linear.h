// The product of a few rows with packed weights, in register tiles.
//
// Weights lie in blocks of 16 outputs (see `pack` in linear.py): [blocks, depth, 16], and for
// bfloat16 [blocks, depth / 2, 16, 2], the order in which VDPBF16PS wants them. A tile holds R rows
// times V vectors of outputs in registers while it walks the whole depth, so each output is one
// chain of additions along the depth: its bits depend neither on the other rows nor on how many
// there are, nor on the tile it fell into.

#pragma once

#include "cpu_vectors.h"

namespace {

constexpr int kBlock = 16;                       // outputs of a block
constexpr int kBlockVectors = kBlock / kLanes;   // vectors that hold them
#if defined(__AVX512F__)
constexpr int kTileBlocks = 4;   // of 32 registers 6 x 4 accumulate
constexpr int kTileRowsMax = 6;
constexpr int kTallRows = 12;  // or 12 x 2
constexpr int kTallBlocks = 2;
#elif defined(__AVX2__)
constexpr int kTileBlocks = 1;   // of 16 registers 4 x 2 accumulate
constexpr int kTileRowsMax = 4;
#else
constexpr int kTileBlocks = 1;
constexpr int kTileRowsMax = 4;
#endif
constexpr int kAheadBytes = 2048;  // how far ahead each stream of weights in memory is fetched

// How weights and rows of a dtype meet. `Row` is what a row is converted to before it is used,
// `kStep` how many inputs are consumed at once.
template <typename T>
struct Meeting {
  using Row = float;
  static constexpr int kStep = 1;
  using Weights = Vec;
  static Weights weights(const T* p) { return load(p); }
  static Vec add(Vec sum, Weights w, const float* x) { return sum + w * *x; }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 multiplied and summed in float32 by one instruction.
template <>
struct Meeting<c10::BFloat16> {
  using Row = c10::BFloat16;
  static constexpr int kStep = 2;
  using Weights = __m512bh;
  static Weights weights(const c10::BFloat16* p) {
    return (__m512bh)_mm512_loadu_si512(reinterpret_cast<const void*>(p));
  }
  static Vec add(Vec sum, Weights w, const c10::BFloat16* x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return (Vec)_mm512_dpbf16_ps((__m512)sum, w, (__m512bh)_mm512_set1_epi32(pair));
  }
};
#else
// A pair's halves are the lower and upper 16 bits of a word; either is a float once in the upper.
template <>
struct Meeting<c10::BFloat16> {
  using Row = float;
  static constexpr int kStep = 2;
  struct Weights {
    Vec even, odd;
  };
  static Weights weights(const c10::BFloat16* p) {
    WordVec pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return {(Vec)(pairs << 16), (Vec)(pairs & 0xffff0000u)};
  }
  static Vec add(Vec sum, Weights w, const float* x) {
    return (sum + w.even * x[0]) + w.odd * x[1];
  }
};
#endif

// R rows by V blocks, which are `block_size` apart. `rows` are `row_stride` apart; `out` is float32
// [R, out_stride]. Weights are fetched kAhead bytes ahead unless it is 0.
template <typename T, int kAhead, int R, int V>
inline void linear_tile(const typename Meeting<T>::Row* rows, int64_t row_stride, const T* weights,
                        int64_t depth, float* out, int64_t out_stride, int64_t block_size) {
  using M = Meeting<T>;
  constexpr int kVectors = V * kBlockVectors;
  Vec sums[R][kVectors] = {};
  for (int64_t k = 0; k < depth; k += M::kStep) {
    typename M::Weights w[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const T* at = weights + v * block_size + k * kBlock;
      if constexpr (kAhead > 0) __builtin_prefetch(at + kAhead / sizeof(T));
#pragma GCC unroll 4
      for (int i = 0; i < kBlockVectors; ++i)
        w[v * kBlockVectors + i] = M::weights(at + i * kLanes * M::kStep);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] = M::add(sums[r][v], w[v], rows + r * row_stride + k);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kLanes, sums[r][v]);
}

template <typename T, int kAhead, int V>
inline void linear_rows(const typename Meeting<T>::Row* rows, int64_t row_stride, int64_t num_rows,
                        const T* weights, int64_t depth, float* out, int64_t out_stride,
                        int64_t block_size) {
  const auto tile = [&]<int R>() {
    linear_tile<T, kAhead, R, V>(rows, row_stride, weights, depth, out, out_stride, block_size);
  };
  switch (num_rows) {
    case 1: return tile.template operator()<1>();
    case 2: return tile.template operator()<2>();
    case 3: return tile.template operator()<3>();
    case 4: return tile.template operator()<4>();
#if defined(__AVX512F__)
    case 5: return tile.template operator()<5>();
    case 6: return tile.template operator()<6>();
#endif
  }
}

#if defined(__AVX512F__)
// 5 to kTallRows rows by one or two blocks. For weights that come from memory, fewer passes over
// them count for more than how often a register of them is used.
template <typename T, int kAhead, int R = 5>
void linear_tall(const typename Meeting<T>::Row* rows, int64_t row_stride, int64_t num_rows,
                 const T* weights, int64_t depth, int64_t num_blocks, float* out,
                 int64_t out_stride) {
  if constexpr (R <= kTallRows) {
    const int64_t block_size = depth * kBlock;
    if (num_rows != R)
      linear_tall<T, kAhead, R + 1>(rows, row_stride, num_rows, weights, depth, num_blocks, out,
                                    out_stride);
    else if (num_blocks == kTallBlocks)
      linear_tile<T, kAhead, R, kTallBlocks>(rows, row_stride, weights, depth, out, out_stride,
                                             block_size);
    else
      linear_tile<T, kAhead, R, 1>(rows, row_stride, weights, depth, out, out_stride, block_size);
  }
}
#endif

// Up to kTileRowsMax rows by up to kTileBlocks blocks. Blocks hold `pitch` inputs, of which the
// first `depth` are used; 0 means all.
template <typename T, int kAhead>
void linear_blocks(const typename Meeting<T>::Row* rows, int64_t row_stride, int64_t num_rows,
                   const T* weights, int64_t depth, int64_t num_blocks, float* out,
                   int64_t out_stride, int64_t pitch = 0) {
  const int64_t block_size = (pitch ? pitch : depth) * kBlock;
  if (num_blocks == kTileBlocks)
    return linear_rows<T, kAhead, kTileBlocks>(rows, row_stride, num_rows, weights, depth, out,
                                               out_stride, block_size);
  if constexpr (kTileBlocks > 2)
    if (num_blocks == 2)
      return linear_rows<T, kAhead, 2>(rows, row_stride, num_rows, weights, depth, out, out_stride,
                                       block_size);
  for (int64_t i = 0; i < num_blocks; ++i)
    linear_rows<T, kAhead, 1>(rows, row_stride, num_rows, weights + i * block_size, depth,
                              out + i * kBlock, out_stride, block_size);
}

}  // namespace
