// mapped_router: routes rows of logits by many router maps at once (masked_router's router_map, EEP's W_RM).
//
//   logits [N, E] float32 | bfloat16 | float16, any strides; maps [C, K', E] float32, any strides
//   s = the router's scores of the experts; pi[j] = sum over e of map[j, e] * s[e]
//   experts[c, 0 .. counts[c]): those that a row of map c refers to, by an entry other than 0, ascending; others
//   count neither in pi nor in the softmax
//   Row n takes map assigned[n] (slot 0), or every map c (slot c) where assigned is null. ids [slots, N, K] int64,
//   weights [slots, N, K] float32, contiguous
//
// Chosen by pi, or by pi + mapped_bias, where pi is by the softmax over all E experts if the score is one: stable
// descending order, the lower j first among equals, NaN above all. Weights: pi of the chosen; softmax_over_chosen: the
// same probabilities to sum 1; then w / (sum + eps) if renormalize, times scale, rounded to weights_dtype. The sum may
// have any sign. A score that is not finite makes NaN of each pi that refers to it, in a softmax of all; one below the
// smallest normal number may count as 0. Ids are always distinct.
//
// The caller ensures: K <= K' <= E, every row of a map refers to an expert, softmax_over_chosen has no bias.
#pragma once

#include "masked_router.h"

namespace moeprune {

struct MappedRouterArgs {
  TensorView logits, maps;
  const std::int32_t* experts;   // [C, E]
  const std::int32_t* counts;    // [C]
  const float* mapped_bias;      // [C, K'] or null
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

namespace portable {
void mapped_router(const MappedRouterArgs& args);
}
namespace avx2 {
void mapped_router(const MappedRouterArgs& args);
}
namespace avx512 {
void mapped_router(const MappedRouterArgs& args);
}

void mapped_router_cuda(const MappedRouterArgs& args);

}  // namespace moeprune
