// masked_router: routes rows of logits under many expert masks at once. A pruned expert is absent: the softmax, the
// groups and the top-k see the kept experts only. router.h has what is common to both routers; the ids are experts.
//
// A *walk* visits experts in the order of lists[w, 0..] and answers at each of its stops: after stops[w, j] experts
// (ascending) it writes to slot slots[w, j]. Nested masks are one walk with a stop for each mask; other masks are
// walks with one stop each. Row n takes walk assigned[n], which has one stop and slot 0.
//
// Choice: by the logits, or by score + bias where there is a bias. Every score grows with the logit, so the logits
// make the same choice as the scores, without ties made by rounding. Group-limited routers first choose the
// topk_group best of n_group equal groups, by the best score of a group's kept experts, or the sum of the best two.
// Scores: softmax over the kept experts, sigmoid or sqrtsoftplus of the logit. softmax_over_chosen: the softmax of
// the chosen logits. A softmax over a NaN logit has NaN weights.
//
// The caller ensures: every stop leaves K experts, also in any topk_group of the groups that keep one. Walks with
// several stops have n_group = 1, and no bias with the score softmax (the choice would depend on the stop).
#pragma once

#include "router.h"

namespace moeprune {

struct MaskedRouterArgs : RouterArgs {
  const std::int32_t* lists;  // [n_walks, E]
  const std::int32_t* stops;  // [n_walks, n_stops]
  const std::int32_t* slots;  // [n_walks, n_stops]
  std::int64_t n_walks, n_stops;
  const float* bias;  // [E] or null
  int n_group, topk_group;
  bool group_top2_sum;
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
