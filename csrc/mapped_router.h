// mapped_router: routes rows of logits by many router maps at once (masked_router's router_map, EEP's W_RM). router.h
// has what is common to both routers; the ids are rows of the map.
//
//   maps [C, K', E] float32, any strides
//   experts [C, E]: the first counts[c] are those that a row of map c refers to (by an entry other than 0), ascending
//   mapped_bias [C, K'] float32: the map times the correction bias
//
// Score of row j of a map: pi[j] = sum over e of map[j, e] * s[e], s the scores of the experts. A softmax runs over the
// experts that the map refers to. softmax_over_chosen: as softmax, and the pi of the chosen divided by their sum.
// Choice: by pi, or by pi + mapped_bias, where pi is then by the softmax over all E experts if the score is softmax.
// The sum that weights are divided by may have any sign. A score that is not finite makes NaN of each pi that refers
// to it, in a softmax of all; a score below the smallest normal number may count as 0.
//
// The caller ensures: K <= K' <= E, every row of a map refers to an expert, softmax_over_chosen has no bias.
#pragma once

#include "router.h"

namespace moeprune {

struct MappedRouterArgs : RouterArgs {
  TensorView maps;
  const std::int32_t* experts;  // [C, E]
  const std::int32_t* counts;   // [C]
  const float* mapped_bias;     // [C, K'] or null
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
