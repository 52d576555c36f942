// The few vector operations that the kernels need, on the widest vector of the instruction set being
// compiled. Everything lives in moeprune::MOEPRUNE_ISA, so that each instruction set has its own copy of
// every function.
#pragma once

#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "tensor.h"

namespace moeprune::MOEPRUNE_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t IntVec __attribute__((vector_size(4 * kLanes)));

#define MOEPRUNE_INLINE static inline __attribute__((always_inline))

MOEPRUNE_INLINE Vec splat(float x) { return x - Vec{}; }

MOEPRUNE_INLINE Vec load(const float* from) {
  Vec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

MOEPRUNE_INLINE void store(float* to, Vec v) { __builtin_memcpy(to, &v, sizeof v); }

// The smaller and the larger; b where either is NaN (the x86 instructions' rule, kept on every target). The
// masked forms are the plain instructions without a false warning of gcc 12.
#if defined(__AVX512F__)
MOEPRUNE_INLINE Vec min(Vec a, Vec b) { return _mm512_maskz_min_ps(0xFFFF, a, b); }
MOEPRUNE_INLINE Vec max(Vec a, Vec b) { return _mm512_maskz_max_ps(0xFFFF, a, b); }
#elif defined(__AVX2__)
MOEPRUNE_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
MOEPRUNE_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
#else
MOEPRUNE_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
MOEPRUNE_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
#endif

MOEPRUNE_INLINE double sum(Vec v) {
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
  return total;
}

MOEPRUNE_INLINE float largest(Vec v) {
  float result = v[0];
  for (int lane = 1; lane < kLanes; ++lane) result = v[lane] > result ? v[lane] : result;
  return result;
}

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

// exp(x) for x <= 88, within 2 ulp for x > -20, 4 ulp below: 2^n times a minimax polynomial of degree 5 on
// [-ln2/2, ln2/2]. Adding `shift` rounds to the integer n and leaves n + 127, the exponent of 2^n, in the low
// bits. At the lowest x that exponent is 0 and the factor 0: results below the smallest normal number,
// exp(-inf) among them, are exactly 0 at no further cost. NaN stays NaN because the factor is multiplied, not
// added to the bits.
MOEPRUNE_INLINE Vec exp(Vec x) {
  const Vec shift = splat(12582912.0f + 127.0f);  // 1.5 * 2^23
  const Vec clamped = max(splat(-88.03f), x);
  const Vec shifted = clamped * 1.44269504088896341f + shift;
  const Vec n = shifted - shift;
  // Without fused multiply-add, ln2 in two parts, the first so short that n times it is exact.
  const Vec r = kFused ? clamped - n * 0.693147180559945f : (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec poly = r * 0.008312501013278961f + 0.041890330612659454f;
  poly = poly * r + 0.16667115688323975f;
  poly = poly * r + 0.499992311000824f;
  poly = poly * r + 1.0f;
  poly = poly * r + 1.0f;
  return poly * (Vec)((IntVec)shifted << 23);
}

MOEPRUNE_INLINE float bfloat16_to_float(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

// Exponent and mantissa are moved into place and scaled by 2^112, which is exact, subnormals included.
MOEPRUNE_INLINE float float16_to_float(std::uint16_t bits) {
  const std::uint32_t magnitude = bits & 0x7FFFu;
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  std::uint32_t wide = magnitude << 13;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  value *= 0x1p112f;
  __builtin_memcpy(&wide, &value, sizeof value);
  wide = (magnitude >= 0x7C00u ? (magnitude << 13) | 0x7F800000u : wide) | sign;  // inf and NaN
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

// A row of logits or outputs, any of the three float dtypes, any stride.
struct FloatRow {
  const char* data;
  DType dtype;
  std::int64_t stride;
  std::int64_t size;
};

MOEPRUNE_INLINE FloatRow row_of(const TensorView& tensor, std::int64_t offset) {
  const int last = tensor.dim - 1;
  const int bytes = tensor.dtype == DType::float32 ? 4 : 2;
  return {static_cast<const char*>(tensor.data) + offset * bytes, tensor.dtype, tensor.stride[last],
          tensor.shape[last]};
}

// Rows are walked in blocks that stay in the first-level cache; kStep is what the unrolled loops take at a
// time.
constexpr int kStep = 4 * kLanes;
constexpr int kBlock = 2048;
static_assert(kBlock % kStep == 0, "a full block is whole steps");

MOEPRUNE_INLINE int rounded_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

MOEPRUNE_INLINE int block_size(const FloatRow& row, std::int64_t start) {
  return row.size - start < kBlock ? static_cast<int>(row.size - start) : kBlock;
}

// Elements [start, start + n) as float32, padded with `padding` to whole steps: the row itself where it can
// be read in place, otherwise `buffer`, converted. The kernels thus have one body for all dtypes and strides.
MOEPRUNE_INLINE const float* read_block(const FloatRow& row, std::int64_t start, int n, float padding, float* buffer) {
  if (row.dtype == DType::float32) {
    const float* from = reinterpret_cast<const float*>(row.data) + start * row.stride;
    if (row.stride == 1 && n % kStep == 0) return from;
    if (row.stride == 1) {
      __builtin_memcpy(buffer, from, static_cast<std::size_t>(n) * sizeof(float));
    } else {
      for (int i = 0; i < n; ++i) buffer[i] = from[i * row.stride];
    }
  } else {
    const std::uint16_t* from = reinterpret_cast<const std::uint16_t*>(row.data) + start * row.stride;
    int i = 0;
    if (row.dtype == DType::bfloat16) {
      if (row.stride == 1)
        for (; i < n; ++i) buffer[i] = bfloat16_to_float(from[i]);
      for (; i < n; ++i) buffer[i] = bfloat16_to_float(from[i * row.stride]);
    } else {
      if (row.stride == 1) {
#if defined(__AVX2__)
        for (; i + 8 <= n; i += 8)
          _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
        for (; i < n; ++i) buffer[i] = float16_to_float(from[i]);
      }
      for (; i < n; ++i) buffer[i] = float16_to_float(from[i * row.stride]);
    }
  }
  for (int i = n; i < rounded_up(n, kStep); ++i) buffer[i] = padding;
  return buffer;
}

}  // namespace moeprune::MOEPRUNE_ISA
