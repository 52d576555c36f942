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
#define MOEPRUNE_NOINLINE static __attribute__((noinline))  // loops that want all registers for themselves
#define MOEPRUNE_METHOD inline __attribute__((always_inline))

MOEPRUNE_INLINE Vec splat(float x) { return x - Vec{}; }

MOEPRUNE_INLINE IntVec splat_bits(std::int32_t x) { return x - IntVec{}; }

MOEPRUNE_INLINE Vec load(const float* from) {
  Vec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

MOEPRUNE_INLINE void store(float* to, Vec v) { __builtin_memcpy(to, &v, sizeof v); }

MOEPRUNE_INLINE IntVec load(const std::int32_t* from) {
  IntVec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

MOEPRUNE_INLINE void store(std::int32_t* to, IntVec v) { __builtin_memcpy(to, &v, sizeof v); }

// a where the comparison holds, b elsewhere: for comparisons combined with & and |, which the compiler does not
// recognise as such in `mask ? a : b`.
MOEPRUNE_INLINE IntVec select(IntVec mask, IntVec a, IntVec b) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_mask_blend_epi32(_mm512_movepi32_mask((__m512i)mask), (__m512i)b, (__m512i)a);
#elif defined(__AVX2__)
  return (IntVec)_mm256_blendv_epi8((__m256i)b, (__m256i)a, (__m256i)mask);
#else
  return (mask & a) | (~mask & b);
#endif
}

MOEPRUNE_INLINE Vec select(IntVec mask, Vec a, Vec b) { return (Vec)select(mask, (IntVec)a, (IntVec)b); }

// Whether any lane of a comparison holds.
MOEPRUNE_INLINE bool any(IntVec mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  std::int64_t words[sizeof mask / 8], all = 0;
  __builtin_memcpy(words, &mask, sizeof mask);
  for (std::int64_t word : words) all |= word;
  return all != 0;
#endif
}

// A Vec's lanes in float64: two registers.
struct DoubleVec {
  typedef double Half __attribute__((vector_size(4 * kLanes)));
  Half low, high;

  MOEPRUNE_METHOD void operator+=(const DoubleVec& other) {
    low += other.low;
    high += other.high;
  }
  MOEPRUNE_METHOD void operator*=(const DoubleVec& other) {
    low *= other.low;
    high *= other.high;
  }
  MOEPRUNE_METHOD void operator*=(double factor) {
    low *= factor;
    high *= factor;
  }
};

MOEPRUNE_INLINE DoubleVec widened(Vec v) {
#if defined(__AVX512F__)
  return {_mm512_maskz_cvtps_pd(0xFF, _mm512_maskz_extractf32x8_ps(0xFF, v, 0)),
          _mm512_maskz_cvtps_pd(0xFF, _mm512_maskz_extractf32x8_ps(0xFF, v, 1))};
#elif defined(__AVX2__)
  return {_mm256_cvtps_pd(_mm256_extractf128_ps(v, 0)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
#else
  typedef float FloatHalf __attribute__((vector_size(2 * kLanes)));
  FloatHalf half[2];
  __builtin_memcpy(half, &v, sizeof v);
  return {__builtin_convertvector(half[0], DoubleVec::Half), __builtin_convertvector(half[1], DoubleVec::Half)};
#endif
}

MOEPRUNE_INLINE void store(double* to, const DoubleVec& v) {
  __builtin_memcpy(to, &v.low, sizeof v.low);
  __builtin_memcpy(to + kLanes / 2, &v.high, sizeof v.high);
}

// Eight elements to memory past the caches, for outputs larger than these; `to` is aligned to 32 bytes.
template <class T>
MOEPRUNE_INLINE void stream_8(T* to, const T* from) {
#if defined(__AVX2__)
  for (int i = 0; i < 8; i += 32 / static_cast<int>(sizeof(T)))
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#else
  __builtin_memcpy(to, from, 8 * sizeof(T));
#endif
}

// Streamed stores are seen before what this thread stores afterwards.
MOEPRUNE_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

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

MOEPRUNE_INLINE double sum(const DoubleVec& v) {
  const DoubleVec::Half both = v.low + v.high;
  double total = 0;
  for (int lane = 0; lane < kLanes / 2; ++lane) total += both[lane];
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

// 2^(j/4), j the two low bits of each lane, as bits of its mantissa less j << 21.
MOEPRUNE_INLINE IntVec quarter_powers(IntVec j) {
  constexpr std::int32_t kOne = 0x3F800000;
  constexpr std::int32_t kPower[4] = {0, 0x3F9837F0 - kOne - (1 << 21), 0x3FB504F3 - kOne - (2 << 21),
                                      0x3FD744FD - kOne - (3 << 21)};
#if defined(__AVX2__)
  IntVec table;
  for (int lane = 0; lane < kLanes; ++lane) table[lane] = kPower[lane % 4];
#if defined(__AVX512F__)
  return (IntVec)_mm512_maskz_permutevar_ps(0xFFFF, (__m512)table, (__m512i)j);
#else
  return (IntVec)_mm256_permutevar_ps((__m256)table, (__m256i)j);
#endif
#else
  const IntVec odd = (j & 1) != 0, high = (j & 2) != 0;
  return high ? (odd ? splat_bits(kPower[3]) : splat_bits(kPower[2])) : (odd ? splat_bits(kPower[1]) : IntVec{});
#endif
}

// exp(x) for x <= 88, relative error below 6e-7 from -16 on, 2e-6 below: 2^n times 2^(j/4), from a table of four, times
// a minimax polynomial of degree 3 for 2^(r/4), |r| <= 1/2, where 4 x / ln 2 = 4 n + j + r. Adding `shift` rounds to
// the integer and leaves 4 (n + 127) + j in the low bits; moved up by 21, n + 127 is the exponent, and what j adds to
// the mantissa the table's entries have subtracted. On processors that spend two pipes on a fused multiply-add, as
// AMD's do, this is a sixth cheaper than a polynomial of degree 5 without the table.
// At the lowest x the exponent is 0 and the factor 0: results below the smallest normal number, exp(-inf) among
// them, are exactly 0 at no further cost. NaN stays NaN because the factor is multiplied, not added to the bits.
MOEPRUNE_INLINE Vec exp(Vec x) {
  const Vec shift = splat(12582912.0f + 4 * 127.0f);  // 1.5 * 2^23
  const Vec clamped = max(splat(-88.03f), x);
  const Vec shifted = clamped * 5.77078016f + shift;
  const Vec n = shifted - shift;
  // Without fused multiply-add, ln 2 / 4 in two parts, the first so short that n times it is exact.
  const Vec r =
      kFused ? clamped * 5.77078016f - n : ((clamped - n * 0.17327880859375f) - n * 7.98654624e-6f) * 5.77078016f;
  Vec poly = r * 8.66925902e-4f + 1.50235539e-2f;
  poly = poly * r + 1.73286907e-1f;
  poly = poly * r + 0.999999707f;
  return poly * (Vec)(quarter_powers((IntVec)shifted) + ((IntVec)shifted << 21));
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

// Elements of the two half-precision types as they lie in memory.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

MOEPRUNE_INLINE float to_float(float x) { return x; }
MOEPRUNE_INLINE float to_float(BFloat16 x) { return bfloat16_to_float(x.bits); }
MOEPRUNE_INLINE float to_float(Float16 x) { return float16_to_float(x.bits); }

// The next 2 kLanes elements, in an order of lanes that is the same for all rows of a dtype: what sums and maxima
// need of loads, cheaper for bfloat16 than the order of memory.
struct Pair {
  Vec half[2];
};

MOEPRUNE_INLINE Pair load_pair(const float* from) { return {{load(from), load(from + kLanes)}}; }

MOEPRUNE_INLINE Pair load_pair(const BFloat16* from) {
  IntVec bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return {{(Vec)(bits << 16), (Vec)(bits & splat_bits(-0x10000))}};
}

MOEPRUNE_INLINE Pair load_pair(const Float16* from) {
#if defined(__AVX512F__)
  const __m256i* bits = reinterpret_cast<const __m256i*>(from);
  return {{_mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(bits)),
           _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(bits + 1))}};
#elif defined(__AVX2__)
  const __m128i* bits = reinterpret_cast<const __m128i*>(from);
  return {{_mm256_cvtph_ps(_mm_loadu_si128(bits)), _mm256_cvtph_ps(_mm_loadu_si128(bits + 1))}};
#else
  Pair pair;
  for (int lane = 0; lane < kLanes; ++lane) {
    pair.half[0][lane] = to_float(from[lane]);
    pair.half[1][lane] = to_float(from[kLanes + lane]);
  }
  return pair;
#endif
}

// Asks for the step of elements that the loop reaches 2 KB later: rows longer than the second-level cache come
// from memory at each of their walks. Beyond the row's end it does nothing.
template <class T>
MOEPRUNE_INLINE void prefetch_step(const T* from) {
  const char* ahead = reinterpret_cast<const char*>(from) + 2048;
  for (int at = 0; at < 4 * kLanes * static_cast<int>(sizeof(T)); at += 64) __builtin_prefetch(ahead + at);
}

}  // namespace moeprune::MOEPRUNE_ISA
