// What the router kernels share on the CPU: rows of logits, the scores of their experts, the running top-k, and the
// formula of the weights. A vector's lanes are rows, so that what is done to an expert is done to as many rows as the
// vector is wide.
#pragma once

#include <type_traits>

#include "cpu/simd.h"
#include "router.h"

namespace moeprune::MOEPRUNE_ISA {

constexpr int kSortedRows = 128;  // rows among which those of one candidate are searched
constexpr float kLowest = -__FLT_MAX__;

// Rows that are taken together, one to a lane; lanes beyond `count` repeat the first.
template <int kWidth>
struct Rows {
  std::int64_t index[kWidth];
  int count = 0;
};

// Calls body(rows) until all rows of [first, last) are done: any rows together where `assigned` is null, otherwise
// rows of one candidate. [first, last) are at most kSortedRows if rows are assigned.
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

// Writes the rows' logits to `to`, by expert and then by lane.
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

// A key and an id that lose against those of all scores; NaN has the highest key.
constexpr std::int32_t kNoKey = -0x7FFFFFFF - 1, kNoId = 0x7FFFFFFF;

// Integers in the order of the scores, NaN above all; -0 and +0 are equal scores.
MOEPRUNE_INLINE IntVec key_of(Vec score) {
  const IntVec bits = (IntVec)(score + 0.0f);
  const IntVec ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF);
  return score != score ? splat_bits(0x7FFFFFFF) : ordered;
}

MOEPRUNE_INLINE IntVec beats(IntVec key, IntVec id, IntVec other_key, IntVec other_id) {
  return (key > other_key) | ((key == other_key) & (id < other_id));
}

// The best K options of kWidth rows so far, best first, by place and then by lane.
template <int kWidth>
struct BestK {
  alignas(64) std::int32_t key[kMaxExperts * kWidth];
  alignas(64) std::int32_t id[kMaxExperts * kWidth];

  void clear(int top_k) {
    for (int at = 0; at < top_k * kWidth; at += kLanes) {
      store(key + at, splat_bits(kNoKey));
      store(id + at, splat_bits(kNoId));
    }
  }

  // Puts an option where it belongs in the vector of lanes from `first` on, and returns the lanes that it enters.
  // kTopK is top_k, or 0 for any. kAscending: ids come in ascending order, so among equals the later stays behind.
  template <int kTopK, bool kAscending>
  MOEPRUNE_METHOD IntVec insert(IntVec new_key, IntVec new_id, int first, int top_k) {
    const auto precedes = [&](IntVec other_key, IntVec other_id) {
      return kAscending ? new_key > other_key : beats(new_key, new_id, other_key, other_id);
    };
    int at = ((kTopK > 0 ? kTopK : top_k) - 1) * kWidth + first;
    IntVec here_key = load(key + at), here_id = load(id + at);
    const IntVec enters = precedes(here_key, here_id);
    // A list of known length is gone through faster than this branch is mispredicted.
    if (kTopK == 0 && !any(enters)) return enters;
    IntVec belongs = enters;  // here or before
    for (; at >= kWidth; at -= kWidth) {
      const IntVec before_key = load(key + at - kWidth), before_id = load(id + at - kWidth);
      const IntVec moves = precedes(before_key, before_id);  // belongs before: the one before comes here
      store(key + at, select(moves, before_key, select(belongs, new_key, here_key)));
      store(id + at, select(moves, before_id, select(belongs, new_id, here_id)));
      belongs = moves;
      here_key = before_key;
      here_id = before_id;
    }
    store(key + at, select(belongs, new_key, here_key));
    store(id + at, select(belongs, new_id, here_id));
    return enters;
  }
};

// Calls body(k) with an integral_constant: top_k, if the loops over it are compiled for that, otherwise 0.
template <class Body>
MOEPRUNE_INLINE void with_top_k(int top_k, const Body& body) {
  switch (top_k) {
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    case 4:
      return body(std::integral_constant<int, 4>());
    case 6:
      return body(std::integral_constant<int, 6>());
    case 8:
      return body(std::integral_constant<int, 8>());
    default:
      return body(std::integral_constant<int, 0>());
  }
}

// By what the scores of the chosen are multiplied (router.h), in kWidth rows. `sum` is a softmax's denominator,
// `chosen` the sum of the scores, both before they are divided.
template <int kWidth, class Float>
MOEPRUNE_INLINE void weight_factors(const RouterArgs& args, const double* sum, const Float* chosen, double* factor) {
  const double eps = static_cast<double>(args.eps), scale = static_cast<double>(args.scale);
  double total[kWidth];
  for (int lane = 0; lane < kWidth; ++lane) total[lane] = static_cast<double>(chosen[lane]);
  if (is_softmax(args)) {
    for (int lane = 0; lane < kWidth; ++lane) factor[lane] = 1.0 / sum[lane];
  } else if (args.score == Score::softmax_over_chosen) {
    for (int lane = 0; lane < kWidth; ++lane) factor[lane] = 1.0 / total[lane];
  } else {
    for (int lane = 0; lane < kWidth; ++lane) factor[lane] = 1.0;
  }
  if (args.renormalize)
    for (int lane = 0; lane < kWidth; ++lane) factor[lane] /= total[lane] * factor[lane] + eps;
  for (int lane = 0; lane < kWidth; ++lane) factor[lane] *= scale;
}

// Rounds to nearest even, as torch does.
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

// The weights of a row's K chosen, in `to`, which has room for whole vectors: score * factor, rounded to the model's
// dtype. precise: multiplied in float64, for scores so small that the factor is beyond float32.
MOEPRUNE_INLINE void scale_weights(const float* score, int k, double factor, bool precise, DType dtype, float* to) {
  if (precise) {
    for (int j = 0; j < k; ++j) to[j] = static_cast<float>(static_cast<double>(score[j]) * factor);
  } else {
    for (int j = 0; j < k; j += kLanes) store(to + j, load(score + j) * static_cast<float>(factor));
  }
  if (dtype == DType::float32) return;
  for (int j = k; precise && j % kLanes != 0; ++j) to[j] = 0;
  for (int j = 0; j < k; j += kLanes) store(to + j, rounded(load(to + j), dtype));
}

}  // namespace moeprune::MOEPRUNE_ISA
