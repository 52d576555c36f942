// Rows of logits as the router kernels take them on the CPU: a vector's lanes are rows, so that what is done to an
// expert is done to as many rows as the vector is wide.
#pragma once

#include "cpu/simd.h"

namespace moeprune::MOEPRUNE_ISA {

constexpr int kSortedRows = 128;  // rows among which those of one candidate are looked for

// Rows that are taken together, one to a lane; lanes beyond `count` repeat the first.
template <int kWidth>
struct Rows {
  std::int64_t index[kWidth];
  int count = 0;
};

// body(rows) until all of [first, last), at most kSortedRows if they are assigned, are done: any rows together where
// `assigned` is null, otherwise those of one candidate.
template <int kWidth, class Body>
void for_rows(const std::int64_t* assigned, std::int64_t first, std::int64_t last, const Body& body) {
  bool done[kSortedRows] = {};
  for (std::int64_t row = first; row < last; ++row) {
    if (done[row - first]) continue;
    Rows<kWidth> rows{};
    for (std::int64_t other = row; other < last && rows.count < kWidth; ++other) {
      if (done[other - first] || (assigned && assigned[other] != assigned[row])) continue;
      done[other - first] = true;
      rows.index[rows.count++] = other;
    }
    body(rows);
  }
}

template <class T, int kWidth>
void transpose_as(const TensorView& logits, const Rows<kWidth>& rows, float* to) {
  const T* from[kWidth];
  for (int lane = 0; lane < kWidth; ++lane)
    from[lane] = static_cast<const T*>(logits.data) + rows.index[lane < rows.count ? lane : 0] * logits.stride[0];
  for (std::int64_t e = 0; e < logits.shape[1]; ++e)
    for (int lane = 0; lane < kWidth; ++lane) to[e * kWidth + lane] = to_float(from[lane][e * logits.stride[1]]);
}

// The rows' logits by expert, and then by lane.
template <int kWidth>
void transpose(const TensorView& logits, const Rows<kWidth>& rows, float* to) {
  if (logits.dtype == DType::float32) {
    transpose_as<float>(logits, rows, to);
  } else if (logits.dtype == DType::bfloat16) {
    transpose_as<BFloat16>(logits, rows, to);
  } else {
    transpose_as<Float16>(logits, rows, to);
  }
}

// sigmoid(logit) of n values, a multiple of kLanes.
static inline void sigmoids(const float* logit, int n, float* to) {
  for (int at = 0; at < n; at += kLanes) {
    const Vec x = load(logit + at);
    const Vec t = exp(min(x, -x));  // e^-|x| never overflows
    const Vec numerator = x < 0.0f ? t : splat(1.0f);
    store(to + at, numerator / (t + 1.0f));
  }
}

// sqrt(softplus(logit)) of n values; beyond 20 the softplus is x to float precision.
static inline void roots_of_softplus(const float* logit, int n, float* to) {
  for (int at = 0; at < n; ++at) {
    const float x = logit[at];
    to[at] = __builtin_sqrtf(x > 20.0f ? x : __builtin_log1pf(__builtin_expf(x)));
  }
}

// A key that loses against those of all scores; NaN has the highest.
constexpr std::int32_t kNoKey = -0x7FFFFFFF - 1;

// Integers in the order of the scores, NaN above all; -0 and +0 are equal scores.
MOEPRUNE_INLINE IntVec key_of(Vec score) {
  const IntVec bits = (IntVec)(score + 0.0f);
  const IntVec ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF);
  return score != score ? splat_bits(0x7FFFFFFF) : ordered;
}

// Round to nearest even, as torch does.
MOEPRUNE_INLINE Vec rounded(Vec value, DType dtype) {
  const IntVec bits = (IntVec)value;
  if (dtype == DType::bfloat16) {
    const IntVec up = bits + 0x7FFF + ((bits >> 16) & 1);
    return value != value ? value : (Vec)(up & splat_bits(-0x10000));
  }
  // float16: 13 bits fewer where it is normal; below, multiples of its smallest number, 2^-24, the spacing of
  // floats from 0.5 on; from 65,520 on, infinity.
  const Vec magnitude = value < 0.0f ? -value : value;
  const IntVec up = (IntVec)magnitude + 0xFFF + (((IntVec)magnitude >> 13) & 1);
  const Vec normal = magnitude >= 65520.0f ? splat(__builtin_inff()) : (Vec)(up & splat_bits(-0x2000));
  const Vec rounded_magnitude = magnitude < 0x1p-14f ? (magnitude + 0.5f) - 0.5f : normal;
  return value != value ? value : value < 0.0f ? -rounded_magnitude : rounded_magnitude;
}

}  // namespace moeprune::MOEPRUNE_ISA
