// routing_moments on CUDA: plain and deterministic, not yet tuned.
//
// Two kernels per tile of pairs. One warp per row leaves the row's norm in the workspace; then one block per
// expert goes through the tile's ids, each thread keeping the sums of every 256th pair, and a fixed tree adds
// the threads' sums to the table. No atomics: every sum has one order. A tile is as many pairs as the
// workspace holds; tiles follow each other on the stream.
#include "cuda_utils.cuh"
#include "routing_moments.h"

namespace moeprune {
namespace {

__device__ bool valid_at(const TensorView& valid, std::int64_t i) {
  return !valid.given() || static_cast<const bool*>(valid.data)[i * valid.stride[0]];
}

__device__ std::int64_t id_at(const TensorView& ids, std::int64_t i) {
  const std::int64_t at = i * ids.stride[0];
  return ids.dtype == DType::int64 ? static_cast<const std::int64_t*>(ids.data)[at]
                                   : static_cast<const std::int32_t*>(ids.data)[at];
}

__global__ void norms_kernel(RoutingMomentsArgs args, std::int64_t tile, std::int64_t n) {
  const std::int64_t warp = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (warp >= n || !valid_at(args.valid, tile + warp)) return;
  const std::int64_t row = (tile + warp) * args.outputs.stride[0];
  double squares = 0;
  for (std::int64_t h = lane; h < args.outputs.shape[1]; h += 32) {
    const double x = float_at(args.outputs, row + h * args.outputs.stride[1]);
    squares += x * x;
  }
  for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, offset);
  if (lane == 0) args.workspace[warp] = sqrt(squares);
}

__global__ void accumulate_kernel(RoutingMomentsArgs args, std::int64_t tile, std::int64_t n) {
  const std::int64_t expert = blockIdx.x;
  double sums[9] = {};
  double highest = -INFINITY;  // an expert without pairs keeps its entry
  for (std::int64_t i = threadIdx.x; i < n; i += kThreads) {
    if (!valid_at(args.valid, tile + i) || id_at(args.ids, tile + i) != expert) continue;
    const double gate = double_at(args.gates, (tile + i) * args.gates.stride[0]);
    const double f = args.norms.given() ? double_at(args.norms, (tile + i) * args.norms.stride[0]) : args.workspace[i];
    const double gate_power[3] = {1, gate, gate * gate};
    const double norm_power[3] = {1, f, f * f};
    for (int a = 0; a < 3; ++a)
      for (int b = 0; b < 3; ++b) sums[3 * a + b] += gate_power[a] * norm_power[b];
    highest = NanMax()(highest, f);
  }
  for (int k = 0; k < 9; ++k) {
    const double total = block_reduce(sums[k], Sum());
    if (threadIdx.x == 0) args.moments[expert * 9 + k] += total;
  }
  highest = block_reduce(highest, NanMax());
  if (threadIdx.x == 0) args.max_norm[expert] = static_cast<float>(NanMax()(args.max_norm[expert], highest));
}

}  // namespace

void routing_moments_cuda(const RoutingMomentsArgs& args) {
  const std::int64_t n_pairs = args.ids.shape[0];
  if (args.n_experts == 0) return;
  const std::int64_t tile_size = args.norms.given() ? n_pairs : args.workspace_size;
  for (std::int64_t tile = 0; tile < n_pairs; tile += tile_size) {
    const std::int64_t n = n_pairs - tile < tile_size ? n_pairs - tile : tile_size;
    if (!args.norms.given()) {
      const std::int64_t blocks = (n * 32 + kThreads - 1) / kThreads;
      launch(norms_kernel, {dim3(static_cast<unsigned>(blocks)), kThreads}, args.stream, args, tile, n);
    }
    launch(accumulate_kernel, {dim3(static_cast<unsigned>(args.n_experts)), kThreads}, args.stream, args, tile, n);
  }
}

}  // namespace moeprune
