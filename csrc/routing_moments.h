// routing_moments: the streaming statistics behind every pruning criterion.
//
//   for each routed pair s (valid ones only), e = ids[s], g = gates[s], f = ||outputs[s]||_2 or norms[s]:
//     moments[e, a, b] += g^a f^b  (a, b in {0, 1, 2}; 0^0 = 1)       max_norm[e] = max(max_norm[e], f)
//
//   moments [E, 3, 3] float64 and max_norm [E] float32, contiguous, updated in place
//   ids [S] int32 | int64; gates [S] and norms [S] any float; outputs [S, H] float32 | bfloat16 | float16;
//   valid [S] bool or absent; any strides
//
// The caller ensures that the id of every valid pair lies in [0, E). The pairs of an expert are added in the order of
// s, in float64, whatever the number of threads: same input, same bits. A NaN norm counts and makes the expert's sums
// and max_norm NaN.
#pragma once

#include "tensor.h"

namespace moeprune {

struct RoutingMomentsArgs {
  double* moments;
  float* max_norm;
  std::int64_t n_experts;
  TensorView ids, gates, outputs, norms, valid;  // outputs or norms is given
  double* workspace;  // [workspace_size]; holds a tile of pairs: 8 bytes each on the CPU, 10 on CUDA, at least 80
  std::int64_t workspace_size;
  int threads;
  void* stream;
};

namespace portable {
void routing_moments(const RoutingMomentsArgs& args);
}
namespace avx2 {
void routing_moments(const RoutingMomentsArgs& args);
}
namespace avx512 {
void routing_moments(const RoutingMomentsArgs& args);
}

void routing_moments_cuda(const RoutingMomentsArgs& args);

}  // namespace moeprune
