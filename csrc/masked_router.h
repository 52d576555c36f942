// masked_router: routes rows of logits under many expert masks at once. A pruned expert is absent: the
// softmax, the groups and the top-k see the kept experts only.
//
//   logits [N, E] float32 | bfloat16 | float16, any strides
//   A *walk* visits experts in the order of lists[w, 0..] and answers at each of its stops: stops[w, j]
//   experts visited (ascending), answer to slot slots[w, j]. Nested masks are one walk with C stops, other
//   masks are walks with one stop. Row n takes walk assigned[n] (one stop, slot 0), or every walk where
//   assigned is null. ids [slots, N, K] int64, weights [slots, N, K] float32, contiguous
//
// Experts are chosen by their logits, or by score + bias where there is a bias: stable descending order, the
// lower id first among equals. Every score grows with the logit, so the logits make the same choice as the
// scores, without ties made by rounding. Group-limited: the best topk_group groups by their kept experts'
// best score (or sum of best two) first. Weights: the scores of the chosen without bias; softmax_over_chosen:
// the softmax of the chosen logits; then w / (sum + eps) if renormalize, times scale, rounded to
// weights_dtype. A NaN logit ranks first; a softmax that sees it has NaN weights. Ids are always distinct
// kept experts.
//
// The caller ensures: every stop has K experts, also within any topk_group of the groups that keep one; walks
// with several stops have n_group = 1 and, with a bias, not the score softmax (the choice would depend on the
// stop).
#pragma once

#include "tensor.h"

namespace moeprune {

enum class Score : int { softmax, sigmoid, sqrtsoftplus, softmax_over_chosen };

constexpr int kMaxExperts = 1024;  // bounds the rows' scratch, which lives on the stack

struct MaskedRouterArgs {
  TensorView logits;
  const std::int32_t* lists;  // [n_walks, E]
  const std::int32_t* stops;  // [n_walks, n_stops]
  const std::int32_t* slots;  // [n_walks, n_stops]
  std::int64_t n_walks, n_stops;
  const std::int64_t* assigned;  // [N] or null
  int top_k;
  Score score;
  bool renormalize;
  float eps, scale;
  const float* bias;  // [E] or null
  int n_group, topk_group;
  bool group_top2_sum;
  DType weights_dtype;
  std::int64_t* ids;
  float* weights;
  int threads;
  void* stream;
};

namespace portable {
void masked_router(const MaskedRouterArgs& args);
}
namespace avx2 {
void masked_router(const MaskedRouterArgs& args);
}
namespace avx512 {
void masked_router(const MaskedRouterArgs& args);
}

void masked_router_cuda(const MaskedRouterArgs& args);

}  // namespace moeprune
