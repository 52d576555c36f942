// The log-sum-exp and the maximum of long rows, in one walk over each. A part of overlap.cpp and, like the rest of it,
// unnamed, so that the compiler inlines what it pleases.
#pragma once

#include "cpu/rows.h"

namespace moeprune::MOEPRUNE_ISA {
namespace {

constexpr float kInf = __builtin_inff();
constexpr float kNan = __builtin_nanf("");

struct RowSummary {
  double lse;                  // NaN: no softmax exists
  float highest;               // the largest element
  std::int64_t highest_block;  // where the first block that holds it starts
};

template <class T>
MOEPRUNE_INLINE float block_max(const T* x, int n) {
  Vec highest[2] = {splat(-kInf), splat(-kInf)};
  for (int i = 0; i < n; i += kPair) {
    const Pair pair = load_pair(x + i);
    for (int u = 0; u < 2; ++u) highest[u] = max(pair.half[u], highest[u]);  // NaN is passed over
  }
  return largest(max(highest[0], highest[1]));
}

struct BlockSum {
  DoubleVec sum;  // of exp(x - offset)
  float highest;
};

// With the terms themselves left in `out`, if kStore, in the order of load_pair.
template <bool kStore, class T>
MOEPRUNE_NOINLINE BlockSum block_exp_sum(const T* x, int n, float offset, float* out = nullptr) {
  Vec partial = {}, highest = splat(-kInf);
  for (int i = 0; i < n; i += kStep) {
    prefetch_step(x + i);
    Vec term[4];
    for (int h = 0; h < 2; ++h) {
      const Pair pair = load_pair(x + i + h * kPair);
      for (int u = 0; u < 2; ++u) {
        highest = max(pair.half[u], highest);  // NaN is passed over here and kept in the sum
        term[2 * h + u] = exp(pair.half[u] - offset);
        if (kStore) store(out + i + (2 * h + u) * kLanes, term[2 * h + u]);
      }
    }
    partial += (term[0] + term[1]) + (term[2] + term[3]);
  }
  return {widened(partial), largest(highest)};
}

MOEPRUNE_INLINE float element(const FloatRow& row, std::int64_t index) {
  switch (row.dtype) {
    case DType::bfloat16:
      return to_float(*elements<BFloat16>(row, index));
    case DType::float16:
      return to_float(*elements<Float16>(row, index));
    default:
      return *elements<float>(row, index);
  }
}

// The lowest index of the largest element.
std::int64_t argmax(const FloatRow& row, const RowSummary& summary) {
  std::int64_t i = summary.highest_block;
  while (i + 1 < row.size && element(row, i) != summary.highest) ++i;
  return i;
}

// Without the log-sum-exp.
RowSummary summarize_maximum(const FloatRow& row, BlockBuffer& buffer) {
  RowSummary summary{0, -kInf, 0};
  for (std::int64_t start = 0; start < row.size; start += kBlock) {
    with_block(row, start, block_size(row, start), Padding::minus_infinity, buffer, [&](auto x, int n) {
      const float here = block_max(x, n);
      if (here > summary.highest) {
        summary.highest = here;
        summary.highest_block = start;
      }
    });
  }
  return summary;
}

// Log-sum-exp and maximum in one walk. A block's terms are taken relative to the maximum of the blocks before
// it, so that maximum and sum need one load; where that was far too low, the block, which is in the cache by
// then, is summed again. The same blocks give the same terms, whenever they are walked.
struct ExpWalk {
  float highest = -kInf;  // of the blocks seen
  std::int64_t highest_block = 0;
  DoubleVec total = {};

  // Returns what the terms left in `out` are relative to.
  template <bool kStore, class T>
  MOEPRUNE_METHOD float add(const T* x, int n, std::int64_t start, float* out = nullptr) {
    constexpr float kFar = 32;  // terms up to e^32: far from overflow, and the error is relative to the sum
    if (highest == -kInf) {
      highest = block_max(x, n);
      highest_block = start;
    }
    float offset = highest == -kInf ? 0.0f : highest;  // -inf only: terms 0, not NaN
    BlockSum block = block_exp_sum<kStore>(x, n, offset, out);
    if (block.highest > highest) {
      const double factor = __builtin_exp(static_cast<double>(highest) - static_cast<double>(block.highest));
      total *= factor;
      if (block.highest > highest + kFar) {
        offset = block.highest;
        block = block_exp_sum<kStore>(x, n, offset, out);
      } else {
        block.sum *= factor;
      }
      highest = block.highest;
      highest_block = start;
    }
    total += block.sum;
    return offset;
  }

  RowSummary summary() const {
    const double lse = static_cast<double>(highest) + __builtin_log(sum(total));
    return {__builtin_isfinite(lse) ? lse : __builtin_nan(""), highest, highest_block};
  }
};

RowSummary summarize(const FloatRow& row, BlockBuffer& buffer) {
  ExpWalk walk;
  for (std::int64_t start = 0; start < row.size; start += kBlock)
    with_block(row, start, block_size(row, start), Padding::minus_infinity, buffer,
               [&](auto x, int n) { walk.add<false>(x, n, start); });
  return walk.summary();
}

}  // namespace
}  // namespace moeprune::MOEPRUNE_ISA
