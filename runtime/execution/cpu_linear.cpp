// Linear layers over packed weights as a torch operator. The arithmetic is in cpu_linear.h.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu_linear.h"
#include "cpu_threads.h"

namespace {

constexpr int64_t kSerialBytes = 1 << 15;  // of weights, below which threads cost more
constexpr int64_t kTallTotal = 64;         // rows up to which tall tiles are the faster ones,
constexpr int64_t kTallMaxBlocks = 1024;   // unless there are very many outputs
constexpr int64_t kChunkRows = 192;        // rows that stay in the second-level cache

// The rows as the kernels want them: dense, of `depth` inputs (zeros behind the last).
template <typename T>
struct Rows {
  using Row = typename Meeting<T>::Row;
  const Row* data;
  int64_t stride;
  std::vector<Row> copy;

  Rows(const at::Tensor& x, int64_t depth) {
    const T* source = x.const_data_ptr<T>();
    if constexpr (std::is_same_v<T, Row>) {
      if (x.size(1) == depth) {
        data = source;
        stride = x.stride(0);
        return;
      }
    }
    copy.resize(x.size(0) * depth);
    for (int64_t r = 0; r < x.size(0); ++r)
      for (int64_t k = 0; k < x.size(1); ++k)
        copy[r * depth + k] = static_cast<Row>(source[r * x.stride(0) + k]);
    data = copy.data();
    stride = depth;
  }
};

// Rounds a tile's sums, with their bias, to the output.
template <typename T>
void finish(const float* sums, int64_t num_rows, int64_t width, const float* bias, T* out,
            int64_t out_stride, int64_t num_outputs) {
  for (int64_t r = 0; r < num_rows; ++r) {
    const float* from = sums + r * width;
    T* to = out + r * out_stride;
    if (bias)
      for (int64_t j = 0; j < num_outputs; ++j) to[j] = static_cast<T>(from[j] + bias[j]);
    else
      for (int64_t j = 0; j < num_outputs; ++j) to[j] = static_cast<T>(from[j]);
  }
}

template <typename T>
void linear_as(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& bias, int64_t outputs,
               at::Tensor& output) {
  const int64_t num_rows = x.size(0), num_blocks = packed.size(0);
  const int64_t depth = packed.numel() / std::max<int64_t>(1, num_blocks * kBlock);
  const Rows<T> rows(x, depth);
  const T* weights = packed.const_data_ptr<T>();
  const float* biases = bias.numel() ? bias.const_data_ptr<float>() : nullptr;
  T* out = output.mutable_data_ptr<T>();
  // `n` rows from `row` on, `count` blocks from `block` on.
  const auto finish_tile = [&](const float* sums, int64_t width, int64_t row, int64_t n,
                               int64_t block, int64_t count) {
    const int64_t first = block * kBlock, real = std::min(count * kBlock, outputs - first);
    finish(sums, n, width, biases ? biases + first : nullptr, out + row * outputs + first, outputs,
           real);
  };
  const auto run_wide = [&](int64_t block, int64_t count, int64_t begin, int64_t end) {
    constexpr int kWidth = kTileBlocks * kBlock;
    alignas(64) float sums[kTileRowsMax * kWidth];
    for (int64_t row = begin; row < end; row += kTileRowsMax) {
      const int64_t n = std::min<int64_t>(kTileRowsMax, end - row);
      linear_blocks<T, kAheadBytes>(rows.data + row * rows.stride, rows.stride, n,
                                    weights + block * kBlock * depth, depth, count, sums, kWidth);
      finish_tile(sums, kWidth, row, n, block, count);
    }
  };
#if defined(__AVX512F__)
  const bool is_tall =
      num_rows > kTileRowsMax && num_rows <= kTallTotal && num_blocks <= kTallMaxBlocks;
  const auto run_tall = [&](int64_t block, int64_t count) {
    constexpr int kWidth = kTallBlocks * kBlock;
    alignas(64) float sums[kTallRows * kWidth];
    const int64_t passes = (num_rows + kTallRows - 1) / kTallRows;
    for (int64_t b = block; b < block + count; b += kTallBlocks) {
      const int64_t blocks = std::min<int64_t>(kTallBlocks, block + count - b);
      for (int64_t pass = 0; pass < passes; ++pass) {  // of nearly equal height
        const int64_t row = num_rows * pass / passes;
        const int64_t n = num_rows * (pass + 1) / passes - row;
        linear_tall<T, kAheadBytes>(rows.data + row * rows.stride, rows.stride, n,
                                    weights + b * kBlock * depth, depth, blocks, sums, kWidth);
        finish_tile(sums, kWidth, row, n, b, blocks);
      }
    }
  };
#endif
  const auto run_blocks = [&](int64_t block, int64_t count, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
    if (is_tall) return run_tall(block, count);
#endif
    run_wide(block, count, begin, end);
  };
  const int64_t bytes = packed.numel() * static_cast<int64_t>(sizeof(T));
  const int64_t num_threads =
      bytes * std::max<int64_t>(1, num_rows / 8) < kSerialBytes ? 1 : at::get_num_threads();
  // Smaller chunks where there are few, so that all threads finish together.
  const bool has_few = num_blocks < 8 * kTileBlocks * num_threads;
  const int64_t size = has_few ? (kTileBlocks + 1) / 2 : kTileBlocks;
  const int64_t num_groups = (num_blocks + size - 1) / size;
  const int64_t num_spans = (num_rows + kChunkRows - 1) / kChunkRows;
  tapeout::for_chunks(num_groups * num_spans, num_threads, [&](int64_t chunk) {
    const int64_t block = chunk % num_groups * size, begin = chunk / num_groups * kChunkRows;
    run_blocks(block, std::min(size, num_blocks - block), begin,
               std::min(num_rows, begin + kChunkRows));
  });
}

// x [rows, inputs], its last dimension dense; packed [blocks, ...]; bias float32 [outputs] or empty.
at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& bias,
                  int64_t outputs) {
  TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1),
              "rows must be dense in their last dimension");
  TORCH_CHECK(packed.is_contiguous() && packed.scalar_type() == x.scalar_type() &&
                  packed.size(0) == (outputs + kBlock - 1) / kBlock,
              "the weights must be packed, in the rows' dtype");
  // A step of two inputs may be filled up with a zero; PackedLinear knows the exact number.
  const int64_t step = x.scalar_type() == at::kBFloat16 ? 2 : 1;
  const int64_t missing = packed.numel() / std::max<int64_t>(1, packed.size(0) * kBlock) - x.size(1);
  TORCH_CHECK(outputs == 0 || (missing >= 0 && missing < step),
              "rows of ", x.size(1), " inputs do not fit the packed weights");
  TORCH_CHECK(bias.numel() == 0 || (bias.numel() == outputs && bias.is_contiguous()),
              "one bias per output");
  at::Tensor output = at::empty({x.size(0), outputs}, x.options());
  if (output.numel() == 0) return output;
  switch (x.scalar_type()) {
    case at::kFloat: linear_as<float>(x, packed, bias, outputs, output); break;
    case at::kBFloat16: linear_as<c10::BFloat16>(x, packed, bias, outputs, output); break;
    case at::kHalf: linear_as<c10::Half>(x, packed, bias, outputs, output); break;
    default: TORCH_CHECK(false, "linear layers in ", x.scalar_type(), " are not supported");
  }
  return output;
}

}  // namespace

#define TAPEOUT_DEFINE_LINEAR(name)                                                   \
  TORCH_LIBRARY_FRAGMENT(name, library) {                                             \
    library.def("linear(Tensor x, Tensor packed, Tensor bias, int outputs) -> Tensor"); \
  }                                                                                   \
  TORCH_LIBRARY_IMPL(name, CPU, library) { library.impl("linear", linear); }

TAPEOUT_DEFINE_LINEAR(TAPEOUT_LIBRARY)
