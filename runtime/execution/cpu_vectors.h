// Vectors as wide as the instruction set allows, and the small matrix product built on them.
// Written with the compiler's vector extensions, so one source serves every set.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kPanel = 4;  // vectors of rows per register tile: 6 x 4 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kPanel = 2;  // 6 x 2 of 16 registers
#else
constexpr int kLanes = 4;
constexpr int kPanel = 4;
#endif
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t WordVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfWordVec __attribute__((vector_size(kLanes * 2)));

inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const c10::BFloat16* p) {
  HalfWordVec h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, WordVec) << 16);
}

inline Vec load(const c10::Half* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline void store(c10::BFloat16* p, Vec v) {  // rounds to nearest even; NaN stays NaN
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
  const WordVec bits = (WordVec)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const HalfWordVec h = __builtin_convertvector(v != v ? (rounded | 0x7fc0u) : rounded, HalfWordVec);
#endif
  std::memcpy(p, &h, sizeof h);
}

inline void store(c10::Half* p, Vec v) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &h, sizeof h);
#elif defined(__F16C__)
  const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &h, sizeof h);
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<c10::Half>(v[i]);
#endif
}

// The first `count` lanes alone; the others are 0, and not written.
template <typename T>
inline Vec load(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T lanes[kLanes] = {};
  std::memcpy(static_cast<void*>(lanes), p, count * sizeof(T));
  return load(lanes);
}

template <typename T>
inline void store(T* p, Vec v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(static_cast<void*>(p), lanes, count * sizeof(T));
}

inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

inline float sum_lanes(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Half a transposed sum: lane i holds a[i] + a[i ^ H] where bit H of i is 0, else b[i] + b[i ^ H].
template <int H>
inline Vec fold(Vec a, Vec b) {
#if defined(__clang__)  // which has no shuffle by a vector of indices
  Vec own, other;
  for (int i = 0; i < kLanes; ++i) {
    own[i] = i & H ? b[i] : a[i];
    other[i] = i & H ? b[i ^ H] : a[i ^ H];
  }
  return own + other;
#else
  IntVec own, other;
  for (int i = 0; i < kLanes; ++i) {
    own[i] = i & H ? i + kLanes : i;
    other[i] = (i ^ H) + (i & H ? kLanes : 0);
  }
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
#endif
}

// Finishes what fold<1> and fold<2> began on each four of kLanes vectors: lane i becomes the sum
// over the lanes of the i-th.
inline Vec fold_all(const Vec* parts) {
  if constexpr (kLanes == 4) {
    return parts[0];
  } else if constexpr (kLanes == 8) {
    return fold<4>(parts[0], parts[1]);
  } else {
    return fold<8>(fold<4>(parts[0], parts[1]), fold<4>(parts[2], parts[3]));
  }
}

// exp to within 2 ulp (Cephes' polynomial). Below -87 gives exactly 0; NaN stays NaN.
inline Vec exponential(Vec x) {
  const Vec lowest = splat(-87.0f), magic = splat(12582912.0f);  // 1.5 * 2^23: rounds to integer
  const Vec clamped = x < lowest ? lowest : x;
  const Vec shifted = clamped * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  Vec y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const IntVec exponent = ((IntVec)shifted - (IntVec)magic + 127) << 23;
  return x < lowest ? Vec{} : y * (Vec)exponent;
}

inline Vec capped(Vec s, float cap) {  // cap * tanh(s / cap)
  const Vec e = exponential((s > 0 ? s : -s) * (-2.0f / cap));
  const Vec t = cap * (1.0f - e) / (1.0f + e);
  return s > 0 ? t : -t;
}

// C[i][m] = alpha[m] * C[i][m] + sum over k of A[i][k] * B[k][m], for I values of i and V vectors
// of m, held in registers. Without alpha, C's old content is ignored.
template <int I, int V>
inline void multiply_tile(const float* a, int64_t a_i, int64_t a_k, const float* b, int64_t b_k,
                          float* c, int64_t c_i, int64_t depth, const float* alpha) {
  Vec sums[I][V];
  for (int i = 0; i < I; ++i)
    for (int v = 0; v < V; ++v)
      sums[i][v] = alpha ? load(c + i * c_i + v * kLanes) * load(alpha + v * kLanes) : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[V];
    for (int v = 0; v < V; ++v) row[v] = load(b + k * b_k + v * kLanes);
    for (int i = 0; i < I; ++i) {
      const Vec scalar = splat(a[i * a_i + k * a_k]);
      for (int v = 0; v < V; ++v) sums[i][v] += scalar * row[v];
    }
  }
  for (int i = 0; i < I; ++i)
    for (int v = 0; v < V; ++v) store(c + i * c_i + v * kLanes, sums[i][v]);
}

template <int V>
void multiply_panel(const float* a, int64_t a_i, int64_t a_k, const float* b, int64_t rows,
                    float* c, int64_t num_i, int64_t depth, const float* alpha) {
  int64_t i = 0;
  for (; i + 6 <= num_i; i += 6)
    multiply_tile<6, V>(a + i * a_i, a_i, a_k, b, rows, c + i * rows, rows, depth, alpha);
  for (; i + 2 <= num_i; i += 2)
    multiply_tile<2, V>(a + i * a_i, a_i, a_k, b, rows, c + i * rows, rows, depth, alpha);
  for (; i < num_i; ++i)
    multiply_tile<1, V>(a + i * a_i, a_i, a_k, b, rows, c + i * rows, rows, depth, alpha);
}

// B is [depth, rows] and C [num_i, rows]; rows is a multiple of kLanes.
inline void multiply(const float* a, int64_t a_i, int64_t a_k, const float* b, int64_t rows, float* c,
              int64_t num_i, int64_t depth, const float* alpha) {
  int64_t m = 0;
  for (; m + kPanel * kLanes <= rows; m += kPanel * kLanes)
    multiply_panel<kPanel>(a, a_i, a_k, b + m, rows, c + m, num_i, depth, alpha ? alpha + m : 0);
  for (; m < rows; m += kLanes)
    multiply_panel<1>(a, a_i, a_k, b + m, rows, c + m, num_i, depth, alpha ? alpha + m : 0);
}

}  // namespace
