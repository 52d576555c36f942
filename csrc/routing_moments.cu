// routing_moments on CUDA, deterministic and without atomics: every sum has one order.
//
// The work is reading `outputs` once: a warp to a row, 16 bytes a thread and load, several loads in flight. It leaves
// in the workspace what the second kernel needs of a pair: the norm in float64 and the expert in 16 bits. In the
// second kernel each expert's block goes through all the pairs' experts, eight to a load, so compact that all
// blocks together read little beside the outputs, and adds up its own pairs: each thread every so-manieth, then a
// fixed tree over the threads. Where the workspace does not hold all pairs they are taken in tiles.
#include "cuda/primitives.cuh"
#include "routing_moments.h"

namespace moeprune {
namespace {

constexpr int kExpertThreads = 1024;
constexpr std::uint16_t kNobody = 0xFFFF;  // the expert of a pair that does not count
constexpr int kIdsPerLoad = 8;

__device__ bool valid_at(const TensorView& valid, std::int64_t i) {
  return !valid.given() || static_cast<const bool*>(valid.data)[i * valid.stride[0]];
}

__device__ std::int64_t id_at(const TensorView& ids, std::int64_t i) {
  const std::int64_t at = i * ids.stride[0];
  return ids.dtype == DType::int64 ? static_cast<const std::int64_t*>(ids.data)[at]
                                   : static_cast<const std::int32_t*>(ids.data)[at];
}

// A tile of pairs, and its part of the workspace: norms [capacity] float64, then experts [capacity] uint16.
struct Tile {
  std::int64_t first, size, capacity;

  __device__ double* norms(const RoutingMomentsArgs& args) const { return args.workspace; }
  __device__ std::uint16_t* experts(const RoutingMomentsArgs& args) const {
    return reinterpret_cast<std::uint16_t*>(args.workspace + capacity);
  }
};

__device__ float square_sum(const Vec16& vector, DType dtype) {
  float sum = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const std::uint32_t word = vector.word[w];
    if (dtype == DType::float32) {
      const float x = __uint_as_float(word);
      sum = fmaf(x, x, sum);
    } else {
      const bool brain = dtype == DType::bfloat16;
      const float low = brain ? __uint_as_float(word << 16) : float16_to_float(static_cast<std::uint16_t>(word));
      const float high =
          brain ? __uint_as_float(word & 0xFFFF0000u) : float16_to_float(static_cast<std::uint16_t>(word >> 16));
      sum = fmaf(low, low, fmaf(high, high, sum));
    }
  }
  return sum;
}

__device__ double warp_sum(double value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
  return value;
}

// The norm of elements [0, n) from `row` on, in every lane. Lane l takes elements l * per_vector and so on,
// whether they can be loaded 16 bytes at a time or not, so that strided rows give the bits of their copies.
__device__ double row_norm(const TensorView& outputs, std::int64_t row) {
  const int lane = threadIdx.x % 32, bytes = outputs.dtype == DType::float32 ? 4 : 2, per_vector = 16 / bytes;
  const std::int64_t n = outputs.shape[1], stride = outputs.stride[1];
  const char* from = static_cast<const char*>(outputs.data) + row * bytes;
  const std::int64_t vectors = n / per_vector;
  double squares = 0;
  if (stride == 1 && reinterpret_cast<std::uintptr_t>(from) % 16 == 0) {
    std::int64_t v = lane;
    for (; v + 96 < vectors; v += 128) {
      Vec16 loaded[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) loaded[u] = load16_streaming(from + (v + 32 * u) * 16);
#pragma unroll
      for (int u = 0; u < 4; ++u) squares += static_cast<double>(square_sum(loaded[u], outputs.dtype));
    }
    for (; v < vectors; v += 32)
      squares += static_cast<double>(square_sum(load16_streaming(from + v * 16), outputs.dtype));
  } else {
    for (std::int64_t v = lane; v < vectors; v += 32) {
      Vec16 gathered{};
      for (int i = 0; i < per_vector; ++i) {
        const std::int64_t at = row + (v * per_vector + i) * stride;
        if (bytes == 4) {
          gathered.word[i] = static_cast<const std::uint32_t*>(outputs.data)[at];
        } else {
          const std::uint32_t half = static_cast<const std::uint16_t*>(outputs.data)[at];
          gathered.word[i / 2] |= half << (i % 2 * 16);
        }
      }
      squares += static_cast<double>(square_sum(gathered, outputs.dtype));
    }
  }
  for (std::int64_t i = vectors * per_vector + lane; i < n; i += 32) {
    const double x = float_at(outputs, row + i * stride);
    squares += x * x;
  }
  squares = warp_sum(squares);
  if (!(squares > 1e-26 && squares < 1e37)) {  // beyond what squares in float32 hold: again, in float64
    squares = 0;
    for (std::int64_t i = lane; i < n; i += 32) {
      const double x = float_at(outputs, row + i * stride);
      squares += x * x;
    }
    squares = warp_sum(squares);
  }
  return sqrt(squares);
}

// A warp to a pair.
__global__ void __launch_bounds__(kThreads) norms_kernel(RoutingMomentsArgs args, Tile tile) {
  const std::int64_t i = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (i >= tile.size) return;
  const std::int64_t pair = tile.first + i;
  const bool counts = valid_at(args.valid, pair);
  double norm = 0;
  if (counts) norm = row_norm(args.outputs, pair * args.outputs.stride[0]);
  if (threadIdx.x % 32 != 0) return;
  tile.norms(args)[i] = norm;
  tile.experts(args)[i] = counts ? static_cast<std::uint16_t>(id_at(args.ids, pair)) : kNobody;
}

struct Moments {
  double sums[9] = {};
  double highest = -INFINITY;  // an expert without pairs keeps its entry

  __device__ void add(double gate, double norm) {
    const double gate_power[3] = {1, gate, gate * gate}, norm_power[3] = {1, norm, norm * norm};
#pragma unroll
    for (int a = 0; a < 3; ++a)
#pragma unroll
      for (int b = 0; b < 3; ++b) sums[3 * a + b] += gate_power[a] * norm_power[b];
    highest = NanMax()(highest, norm);
  }
};

__device__ double gate_at(const RoutingMomentsArgs& args, std::int64_t pair) {
  return double_at(args.gates, pair * args.gates.stride[0]);
}

// A block to an expert. kFromTile: pairs as norms_kernel left them; otherwise ids and norms as given.
template <bool kFromTile>
__global__ void __launch_bounds__(kExpertThreads) accumulate_kernel(RoutingMomentsArgs args, Tile tile) {
  const std::int64_t expert = blockIdx.x;
  Moments moments;
  if constexpr (kFromTile) {
    const std::uint16_t* experts = tile.experts(args);
    const std::uint32_t both = static_cast<std::uint32_t>(expert) * 0x10001u;
    for (std::int64_t start = threadIdx.x * kIdsPerLoad; start < tile.size; start += kExpertThreads * kIdsPerLoad) {
      const Vec16 ids = load16(experts + start);  // the workspace goes on to a multiple of eight
      std::uint32_t found = 0;                    // not 0 where a half of some word is the expert
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const std::uint32_t difference = ids.word[w] ^ both;
        found |= (difference - 0x10001u) & ~difference & 0x80008000u;
      }
      if (found == 0) continue;
      for (int u = 0; u < kIdsPerLoad && start + u < tile.size; ++u) {
        if ((ids.word[u / 2] >> (u % 2 * 16) & 0xFFFFu) != expert) continue;
        moments.add(gate_at(args, tile.first + start + u), tile.norms(args)[start + u]);
      }
    }
  } else {
    for (std::int64_t i = threadIdx.x; i < tile.size; i += kExpertThreads) {
      if (!valid_at(args.valid, i) || id_at(args.ids, i) != expert) continue;
      moments.add(gate_at(args, i), double_at(args.norms, i * args.norms.stride[0]));
    }
  }
  for (int k = 0; k < 9; ++k) {
    const double total = block_reduce(moments.sums[k], Sum());
    if (threadIdx.x == 0) args.moments[expert * 9 + k] += total;
  }
  const double highest = block_reduce(moments.highest, NanMax());
  if (threadIdx.x == 0)
    args.max_norm[expert] = static_cast<float>(NanMax()(static_cast<double>(args.max_norm[expert]), highest));
}

}  // namespace

void routing_moments_cuda(const RoutingMomentsArgs& args) {
  const std::int64_t n_pairs = args.ids.shape[0];
  if (args.n_experts >= kNobody) throw std::invalid_argument("routing_moments_: CUDA takes up to 65,534 experts");
  const LaunchShape experts{dim3(static_cast<unsigned>(args.n_experts)), kExpertThreads};
  if (args.norms.given()) return launch(accumulate_kernel<false>, experts, args.stream, args, Tile{0, n_pairs, 0});
  // Ten bytes a pair, in whole loads of the experts.
  const std::int64_t capacity = args.workspace_size * 8 / 10 / kIdsPerLoad * kIdsPerLoad;
  if (capacity == 0) throw std::invalid_argument("routing_moments_: the workspace is too small");
  for (std::int64_t first = 0; first < n_pairs; first += capacity) {
    const Tile tile{first, n_pairs - first < capacity ? n_pairs - first : capacity, capacity};
    const std::int64_t warps_per_block = kThreads / 32, blocks = (tile.size + warps_per_block - 1) / warps_per_block;
    if (blocks > 0x7FFFFFFF) throw std::invalid_argument("routing_moments_: too many pairs in one call on CUDA");
    launch(norms_kernel, LaunchShape{dim3(static_cast<unsigned>(blocks)), kThreads}, args.stream, args, tile);
    launch(accumulate_kernel<true>, experts, args.stream, args, tile);
  }
}

}  // namespace moeprune
