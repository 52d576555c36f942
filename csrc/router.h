// What masked_router and mapped_router share: the router's formula and the form of the answers.
//
// A candidate is a mask of the experts (masked_router) or a router map (mapped_router). Under a candidate a row of
// logits chooses K among its options: the kept experts, or the rows of the map.
//
//   logits [N, E] float32 | bfloat16 | float16, any strides
//   assigned [N] int64: row n takes candidate assigned[n], slots = 1; null: every row takes every candidate
//   ids [slots, N, K] int64 and weights [slots, N, K] float32, contiguous
//
// Order of choice: stable and descending, the lower id first among equals, NaN above all. Ids are always distinct.
//
// Weights, from the scores of the chosen options, without any bias:
//   softmax, sigmoid, sqrtsoftplus   w = score
//   softmax_over_chosen              w = the chosen scores as probabilities that sum to 1
//   then w / (sum of w + eps) if renormalize, times scale, rounded to weights_dtype
#pragma once

#include "tensor.h"

namespace moeprune {

enum class Score : int { softmax, sigmoid, sqrtsoftplus, softmax_over_chosen };

constexpr int kMaxExperts = 1024;  // bounds the rows' scratch, which lives on the stack

struct RouterArgs {
  TensorView logits;
  const std::int64_t* assigned;  // [N] or null
  int top_k;
  Score score;
  bool renormalize;
  float eps, scale;
  DType weights_dtype;
  std::int64_t* ids;
  float* weights;
  int threads;
  void* stream;
};

// Whether scores are divided by a sum over the candidate's experts. (static: see tensor.h)
static constexpr bool is_softmax(const RouterArgs& args) { return args.score == Score::softmax; }

// Whether weights are exponentials of logits, still to be divided by a sum.
static constexpr bool is_exponential(const RouterArgs& args) {
  return is_softmax(args) || args.score == Score::softmax_over_chosen;
}

}  // namespace moeprune
