// What happens to rows between the matrix products, as torch operators: norms with their residual
// sum, gated activations, rotary embedding. One pass over memory each, in float32 inside, rounded
// once. Rows never influence each other.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string_view>
#include <tuple>

#include "cpu_threads.h"
#include "cpu_vectors.h"

namespace {

constexpr int64_t kSerialElements = 1 << 14;  // of a chunk; fewer are not worth a thread

template <typename F>
void for_rows(int64_t num_rows, int64_t row_size, const F& run) {
  const int64_t grain = std::max<int64_t>(1, kSerialElements / std::max<int64_t>(1, row_size));
  if (num_rows <= grain) return run(0, num_rows);
  const int64_t num_chunks = (num_rows + grain - 1) / grain;
  tapeout::for_chunks(num_chunks, at::get_num_threads(), [&](int64_t chunk) {
    run(chunk * grain, std::min(num_rows, (chunk + 1) * grain));
  });
}

template <typename F>
void with_dtype(at::ScalarType dtype, const F& run) {
  switch (dtype) {
    case at::kFloat: return run(float{});
    case at::kBFloat16: return run(c10::BFloat16{});
    case at::kHalf: return run(c10::Half{});
    default: TORCH_CHECK(false, "rows in ", dtype, " are not supported");
  }
}

// Calls with `first` and, as second, float if `other` is float32, else the first's type: weights
// and angles come in the rows' dtype or in float32.
template <typename F>
void with_dtypes(at::ScalarType first, at::ScalarType other, const F& run) {
  TORCH_CHECK(other == first || other == at::kFloat, "weights must be in the rows' dtype or float32");
  with_dtype(first, [&](auto a) {
    if (other == at::kFloat)
      run(a, float{});
    else
      run(a, a);
  });
}

// Rows of a [..., n] tensor of two or three dimensions, of which only the last must be dense.
template <typename T>
struct RowsOf {
  T* data;
  int64_t inner, outer_stride, inner_stride;
  T* operator[](int64_t row) const {
    return data + row / inner * outer_stride + row % inner * inner_stride;
  }
};

template <typename T>
RowsOf<const T> rows_of(const at::Tensor& x) {
  const bool is_flat = x.dim() == 2;
  return {x.const_data_ptr<T>(), is_flat ? 1 : std::max<int64_t>(1, x.size(1)), x.stride(0),
          is_flat ? 0 : x.stride(1)};
}

void check_rows(const at::Tensor& x) {
  TORCH_CHECK((x.dim() == 2 || x.dim() == 3) && (x.stride(-1) == 1 || x.size(-1) <= 1),
              "rows must be [rows, n] or [rows, heads, n], the last dimension dense");
}

void check_vector(const at::Tensor& vector, const at::Tensor& x) {
  TORCH_CHECK(vector.numel() == 0 ||
                  (vector.dim() == 1 && vector.size(0) == x.size(-1) && vector.is_contiguous()),
              "a norm's weights and biases must be dense, one per column");
}

float sum_of(Vec a, Vec b) { return sum_lanes(a + b); }

// h = x + residual, rounded as the sum of two tensors is; without a residual, x where it lies.
template <typename T>
const T* add_residual(const T* x, const T* residual, T* sum, int64_t n) {
  if (!residual) return x;
  for (int64_t d = 0; d < n; d += kLanes)
    store(sum + d, load(x + d, n - d) + load(residual + d, n - d), n - d);
  return sum;
}

template <typename T, typename W>
void rms_row(const T* h, const W* weight, float eps, float offset, T* out, int64_t n) {
  Vec squares[2] = {};
  for (int64_t d = 0, i = 0; d < n; d += kLanes, ++i) {
    const Vec v = load(h + d, n - d);
    squares[i & 1] += v * v;
  }
  const float scale = 1.0f / std::sqrt(sum_of(squares[0], squares[1]) / n + eps);
  for (int64_t d = 0; d < n; d += kLanes) {
    Vec v = load(h + d, n - d) * scale;
    if (weight) v = v * (load(weight + d, n - d) + offset);
    store(out + d, v, n - d);
  }
}

template <typename T, typename W>
void layer_norm_row(const T* h, const W* weight, const W* bias, float eps, T* out, int64_t n) {
  Vec sums[2] = {}, squares[2] = {};
  for (int64_t d = 0, i = 0; d < n; d += kLanes, ++i) sums[i & 1] += load(h + d, n - d);
  const float mean = sum_of(sums[0], sums[1]) / n;
  for (int64_t d = 0, i = 0; d < n; d += kLanes, ++i) {
    Vec v = load(h + d, n - d) - mean;
    if (n - d < kLanes)  // the lanes behind the end are 0 there, and -mean here
      for (int64_t lane = n - d; lane < kLanes; ++lane) v[lane] = 0;
    squares[i & 1] += v * v;
  }
  const float scale = 1.0f / std::sqrt(sum_of(squares[0], squares[1]) / n + eps);
  for (int64_t d = 0; d < n; d += kLanes) {
    Vec v = (load(h + d, n - d) - mean) * scale;
    if (weight) v = v * load(weight + d, n - d);
    if (bias) v = v + load(bias + d, n - d);
    store(out + d, v, n - d);
  }
}

// Adds the residual, if there is one, to every row and hands it to `norm(h, out)`.
template <typename T, typename F>
std::tuple<at::Tensor, at::Tensor> norm_rows(const at::Tensor& x, const at::Tensor& residual,
                                             const F& norm) {
  const int64_t n = x.size(-1), num_rows = n ? x.numel() / n : 0;
  const bool has_residual = residual.defined();
  at::Tensor output = at::empty(x.sizes(), x.options());
  at::Tensor sum = has_residual ? at::empty(x.sizes(), x.options()) : at::Tensor();
  const auto rows = rows_of<T>(x), others = rows_of<T>(has_residual ? residual : x);
  T* out = output.mutable_data_ptr<T>();
  T* sums = has_residual ? sum.mutable_data_ptr<T>() : nullptr;
  for_rows(num_rows, n, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      norm(add_residual(rows[r], has_residual ? others[r] : nullptr, sums + r * n, n),
           out + r * n);
  });
  return {output, sum};
}

void check_residual(const at::Tensor& x, const at::Tensor& residual) {
  check_rows(residual);
  TORCH_CHECK(residual.sizes() == x.sizes() && residual.scalar_type() == x.scalar_type(),
              "a residual must be like the rows");
}

// An empty weight or bias means none; an undefined residual too.
std::tuple<at::Tensor, at::Tensor> rms(const at::Tensor& x, const at::Tensor& residual,
                                       const at::Tensor& weight, double eps, double offset) {
  check_rows(x);
  check_vector(weight, x);
  std::tuple<at::Tensor, at::Tensor> result;
  const auto weight_dtype = weight.numel() ? weight.scalar_type() : x.scalar_type();
  with_dtypes(x.scalar_type(), weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    const W* weights = weight.numel() ? weight.const_data_ptr<W>() : nullptr;
    result = norm_rows<T>(x, residual, [&](const T* h, T* out) {
      rms_row(h, weights, static_cast<float>(eps), static_cast<float>(offset), out, x.size(-1));
    });
  });
  return result;
}

std::tuple<at::Tensor, at::Tensor> layer(const at::Tensor& x, const at::Tensor& residual,
                                         const at::Tensor& weight, const at::Tensor& bias,
                                         double eps) {
  check_rows(x);
  check_vector(weight, x);
  check_vector(bias, x);
  TORCH_CHECK(!weight.numel() || !bias.numel() || weight.scalar_type() == bias.scalar_type(),
              "weight and bias must be of one dtype");
  std::tuple<at::Tensor, at::Tensor> result;
  const at::Tensor& either = weight.numel() ? weight : bias;
  const auto weight_dtype = either.numel() ? either.scalar_type() : x.scalar_type();
  with_dtypes(x.scalar_type(), weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    const W* weights = weight.numel() ? weight.const_data_ptr<W>() : nullptr;
    const W* biases = bias.numel() ? bias.const_data_ptr<W>() : nullptr;
    result = norm_rows<T>(x, residual, [&](const T* h, T* out) {
      layer_norm_row(h, weights, biases, static_cast<float>(eps), out, x.size(-1));
    });
  });
  return result;
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, double offset) {
  return std::get<0>(rms(x, at::Tensor(), weight, eps, offset));
}

std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                                const at::Tensor& weight, double eps,
                                                double offset) {
  check_residual(x, residual);
  return rms(x, residual, weight, eps, offset);
}

at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                      double eps) {
  return std::get<0>(layer(x, at::Tensor(), weight, bias, eps));
}

std::tuple<at::Tensor, at::Tensor> add_layer_norm(const at::Tensor& x, const at::Tensor& residual,
                                                  const at::Tensor& weight, const at::Tensor& bias,
                                                  double eps) {
  check_residual(x, residual);
  return layer(x, residual, weight, bias, eps);
}

inline Vec sigmoid(Vec x) {
  const Vec e = exponential(x > 0 ? -x : x), whole = 1.0f / (1.0f + e);
  return x > 0 ? whole : e * whole;
}

// erf to within 1.5e-7 (Abramowitz and Stegun, 7.1.26).
inline Vec error_function(Vec x) {
  const Vec size = x > 0 ? x : -x, t = 1.0f / (1.0f + 0.3275911f * size);
  Vec y = 1.061405429f * t - 1.453152027f;
  y = y * t + 1.421413741f;
  y = y * t - 0.284496736f;
  y = y * t + 0.254829592f;
  y = 1.0f - y * t * exponential(-size * size);
  return x > 0 ? y : -y;
}

struct Silu {
  static Vec of(Vec x) { return x * sigmoid(x); }
};
struct Gelu {
  static Vec of(Vec x) { return 0.5f * x * (1.0f + error_function(x * 0.70710678f)); }
};
struct GeluTanh {  // (1 + tanh(u)) / 2 is sigmoid(2u)
  static Vec of(Vec x) { return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); }
};
struct Relu {
  static Vec of(Vec x) { return x < 0 ? Vec{} : x; }  // NaN stays NaN
};

template <typename Activation>
void gated_as(const at::Tensor& x, at::Tensor& output) {
  const int64_t n = output.size(1);
  with_dtype(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* source = x.const_data_ptr<T>();
    T* target = output.mutable_data_ptr<T>();
    for_rows(x.size(0), 2 * n, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const T *gate = source + r * x.stride(0), *up = gate + n;
        for (int64_t d = 0; d < n; d += kLanes)
          store(target + r * n + d, Activation::of(load(gate + d, n - d)) * load(up + d, n - d),
                n - d);
      }
    });
  });
}

at::Tensor gated(const at::Tensor& x, std::string_view activation) {
  TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1) && x.size(1) % 2 == 0,
              "rows must be [rows, 2 n], dense");
  at::Tensor output = at::empty({x.size(0), x.size(1) / 2}, x.options());
  if (output.numel() == 0) return output;
  if (activation == "silu")
    gated_as<Silu>(x, output);
  else if (activation == "gelu")
    gated_as<Gelu>(x, output);
  else if (activation == "gelu_tanh")
    gated_as<GeluTanh>(x, output);
  else if (activation == "relu")
    gated_as<Relu>(x, output);
  else
    TORCH_CHECK(false, "there is no activation ", activation);
  return output;
}

// One head of one token: its first `size` dimensions are turned by the token's angles.
template <typename T, typename A>
void rotate_halves(const T* x, const A* cosines, const A* sines, T* out, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t d = 0; d < half; d += kLanes) {
    const int64_t e = d + half, count = half - d;
    const Vec a = load(x + d, count), b = load(x + e, count);
    store(out + d, a * load(cosines + d, count) - b * load(sines + d, count), count);
    store(out + e, b * load(cosines + e, count) + a * load(sines + e, count), count);
  }
}

template <typename T, typename A>
void rotate_pairs(const T* x, const A* cosines, const A* sines, T* out, int64_t size) {
  for (int64_t d = 0; d < size; d += 2) {
    const float a = x[d], b = x[d + 1];
    out[d] = static_cast<T>(a * float(cosines[d]) - b * float(sines[d]));
    out[d + 1] = static_cast<T>(b * float(cosines[d + 1]) + a * float(sines[d + 1]));
  }
}

// x [tokens, heads, head_dim]; cosines and sines [tokens, rotary_dim].
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines,
                  bool is_interleaved) {
  check_rows(x);
  TORCH_CHECK(x.dim() == 3 && cosines.dim() == 2 && cosines.sizes() == sines.sizes() &&
                  cosines.strides() == sines.strides() &&
                  cosines.scalar_type() == sines.scalar_type() && cosines.size(0) == x.size(0) &&
                  (cosines.stride(1) == 1 || cosines.size(1) <= 1),
              "cosines and sines must be alike, dense, one row per token");
  const int64_t heads = x.size(1), dim = x.size(2), size = cosines.size(1);
  TORCH_CHECK(size <= dim && size % 2 == 0, "of ", dim, " dimensions, ", size, " cannot be rotated");
  at::Tensor output = at::empty(x.sizes(), x.options());
  if (output.numel() == 0) return output;
  with_dtypes(x.scalar_type(), cosines.scalar_type(), [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const auto rows = rows_of<T>(x);
    const A *cos = cosines.const_data_ptr<A>(), *sin = sines.const_data_ptr<A>();
    T* target = output.mutable_data_ptr<T>();
    for_rows(x.size(0) * heads, dim, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const T* from = rows[r];
        const int64_t angle = r / heads * cosines.stride(0);
        if (is_interleaved)
          rotate_pairs(from, cos + angle, sin + angle, target + r * dim, size);
        else
          rotate_halves(from, cos + angle, sin + angle, target + r * dim, size);
        std::copy(from + size, from + dim, target + r * dim + size);
      }
    });
  });
  return output;
}

}  // namespace

#define TAPEOUT_DEFINE_ROWS(name)                                                                 \
  TORCH_LIBRARY_FRAGMENT(name, library) {                                                         \
    library.def("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor");          \
    library.def(                                                                                  \
        "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float offset) -> "     \
        "(Tensor, Tensor)");                                                                      \
    library.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor");         \
    library.def(                                                                                  \
        "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> "    \
        "(Tensor, Tensor)");                                                                      \
    library.def("gated(Tensor x, str activation) -> Tensor");                                     \
    library.def("rotate(Tensor x, Tensor cosines, Tensor sines, bool is_interleaved) -> Tensor"); \
  }                                                                                               \
  TORCH_LIBRARY_IMPL(name, CPU, library) {                                                        \
    library.impl("rms_norm", rms_norm);                                                           \
    library.impl("add_rms_norm", add_rms_norm);                                                   \
    library.impl("layer_norm", layer_norm);                                                       \
    library.impl("add_layer_norm", add_layer_norm);                                               \
    library.impl("gated", gated);                                                                 \
    library.impl("rotate", rotate);                                                               \
  }

TAPEOUT_DEFINE_ROWS(TAPEOUT_LIBRARY)
