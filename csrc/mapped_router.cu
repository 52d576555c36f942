// mapped_router on CUDA.
//
// A block is one warp, a thread routes a row. The warp's scores lie in shared memory, by experts, so that a step of the
// product reads neighbouring words. The map comes to shared memory in tiles of 64 experts by 8 rows of the map: a step
// reads one score and, the same for all threads, 8 entries in two loads of 16 bytes, for 8 multiplications. A row of
// the map that is done enters the thread's running top-k, in registers.
//
// The scores of a softmax are exp(logit - the row's highest logit), made once for all maps. Where a map refers to none
// but experts far below, they are made anew, relative to the highest that it refers to: so that it does not matter what
// others have, nor which maps are routed together.
#include "cuda/router_rows.cuh"
#include "mapped_router.h"

namespace moeprune {
namespace {

constexpr int kMapRows = 8, kTileExperts = 64;
constexpr int kColumns = kWarp + 1;  // rows of logits in shared memory, and one more, against bank conflicts
constexpr float kFarBelow = 1e-12f;

struct alignas(16) Entries {
  float of_row[kMapRows];
};

// Experts that the map refers to, with their entries in rows of the map.
struct Tile {
  Entries entries[kTileExperts];
  std::int32_t expert[kTileExperts];
};

std::size_t scores_bytes(int n_experts) { return sizeof(float) * kColumns * static_cast<std::size_t>(n_experts); }

template <int kTopK>
struct RowRouter {
  const MappedRouterArgs& args;
  std::int64_t first_row;  // the warp's; rows beyond the tensor's end repeat the last and are not written
  float highest = kLowest, offset = kLowest;  // of a softmax: the highest logit, and what the scores are relative to
  double total = 0;                           // the denominator over all experts
  bool undefined = false;                     // whether a row of the warp has a NaN score, where there is no softmax
  BestK<kTopK, true> best;

  __device__ RowRouter(const MappedRouterArgs& args_, std::int64_t first) : args(args_), first_row(first) {}

  __device__ int n_experts() const { return static_cast<int>(args.logits.shape[1]); }
  __device__ int n_map_rows() const { return static_cast<int>(args.maps.shape[1]); }
  __device__ float* scores() const { return reinterpret_cast<float*>(dynamic_shared()); }
  __device__ float& score(int expert) const { return scores()[expert * kColumns + threadIdx.x]; }

  __device__ void stage_logits() const {
    __syncwarp();  // all have read their scores
    stage_rows(args.logits, first_row, scores(), kColumns);
    __syncwarp();
  }

  __device__ void take_exponentials(float relative_to) {
    offset = relative_to;
    for (int e = 0; e < n_experts(); ++e) score(e) = expf(score(e) - offset);
  }

  __device__ void prepare() {
    stage_logits();
    if (is_exponential(args)) {
      for (int e = 0; e < n_experts(); ++e) highest = fmaxf(highest, score(e));
      take_exponentials(highest);
      for (int e = 0; e < n_experts(); ++e) total += static_cast<double>(score(e));
      return;
    }
    bool nan_here = false;
    for (int e = 0; e < n_experts(); ++e) {
      float x = args.score == Score::sigmoid ? sigmoid(score(e)) : root_of_softplus(score(e));
      if (x - x != 0) {  // NaN and infinity
        x = NAN;
        nan_here = true;
      }
      score(e) = x;
    }
    undefined = __any_sync(~0u, nan_here) != 0;
  }

  // The scores of a softmax for a map that refers to these experts. Returns their sum.
  __device__ double softmax_of(const std::int32_t* experts, int n) {
    if (__any_sync(~0u, offset != highest)) {
      stage_logits();
      take_exponentials(highest);
    }
    float largest = 0;
    double sum = 0;
    for (int i = 0; i < n; ++i) {
      const float x = score(experts[i]);
      largest = fmaxf(largest, x);
      sum += static_cast<double>(x);
    }
    const bool far_below = largest < kFarBelow;
    if (!__any_sync(~0u, far_below)) return sum;
    stage_logits();
    float relative_to = far_below ? kLowest : highest;
    for (int i = 0; far_below && i < n; ++i) relative_to = fmaxf(relative_to, score(experts[i]));
    take_exponentials(relative_to);
    sum = 0;
    for (int i = 0; i < n; ++i) sum += static_cast<double>(score(experts[i]));
    return sum;
  }

  // Entries of rows [row, row + kMapRows) of map c for the n experts from `experts` on.
  __device__ void stage_tile(Tile& tile, std::int64_t c, int row, const std::int32_t* experts, int n) const {
    __syncwarp();  // the tile before has been read
    const int rows = n_map_rows() - row;
    for (int i = threadIdx.x; i < n; i += kWarp) {
      const std::int32_t expert = __ldg(experts + i);
      const float* from = static_cast<const float*>(args.maps.data) + c * args.maps.stride[0] +
                          row * args.maps.stride[1] + expert * args.maps.stride[2];
      Entries entries;
#pragma unroll
      for (int u = 0; u < kMapRows; ++u) entries.of_row[u] = u < rows ? __ldg(from + u * args.maps.stride[1]) : 0.0f;
      tile.entries[i] = entries;
      tile.expert[i] = expert;
    }
    __syncwarp();
  }

  // Adds the tile's n experts. Where a score is NaN, entries of 0 must be left out.
  template <bool kSkipZeros>
  __device__ void add_tile(const Tile& tile, int n, float* pi) const {
#pragma unroll 4
    for (int i = 0; i < n; ++i) {
      const float x = score(tile.expert[i]);
      const Entries entries = tile.entries[i];
#pragma unroll
      for (int u = 0; u < kMapRows; ++u)
        if (!kSkipZeros || entries.of_row[u] != 0) pi[u] = fmaf(entries.of_row[u], x, pi[u]);
    }
  }

  // Routes by map c, and writes to `slot`.
  __device__ void route(std::int64_t c, std::int64_t slot) {
    const std::int32_t* experts = args.experts + c * n_experts();
    const int n = args.counts[c];
    const double sum = is_exponential(args) ? softmax_of(experts, n) : 1.0;
    const bool among_all = is_softmax(args) && args.mapped_bias;
    const float share =  // of a score's unit in the softmax over all experts
        among_all ? static_cast<float>(exp(static_cast<double>(offset) - static_cast<double>(highest)) / total) : 1.0f;
    Tile& tile = block_shared<Tile>();
    best.clear(args.top_k);
    for (int row = 0; row < n_map_rows(); row += kMapRows) {
      float pi[kMapRows] = {};
      for (int i = 0; i < n; i += kTileExperts) {
        const int here = n - i < kTileExperts ? n - i : kTileExperts;
        stage_tile(tile, c, row, experts + i, here);
        if (undefined) {
          add_tile<true>(tile, here, pi);
        } else {
          add_tile<false>(tile, here, pi);
        }
      }
#pragma unroll
      for (int u = 0; u < kMapRows; ++u) {
        if (row + u >= n_map_rows()) break;
        float choice = among_all ? pi[u] * share : pi[u];
        if (args.mapped_bias) choice += args.mapped_bias[c * n_map_rows() + row + u];
        best.insert(key_of(choice, row + u), pi[u], args.top_k);
      }
    }
    answer(c, slot, sum);
  }

  __device__ void answer(std::int64_t c, std::int64_t slot, double sum) const {
    const int k = kTopK > 0 ? kTopK : args.top_k;
    const StagedAnswers staged(scores() + n_experts() * kColumns, kWarp, k);
    double chosen = 0;
#pragma unroll
    for (int j = 0; j < k; ++j) chosen += static_cast<double>(best.value[j]);
    const double factor = weight_factor(args, sum, chosen);
#pragma unroll
    for (int j = 0; j < k; ++j) {
      const float weight = static_cast<float>(static_cast<double>(best.value[j]) * factor);
      staged.ids[threadIdx.x * (k + 1) + j] = id_of(best.key[j]);
      staged.weights[threadIdx.x * (k + 1) + j] = rounded(weight, args.weights_dtype);
    }
    __syncwarp();
    const std::int64_t n_rows = args.logits.shape[0], to = slot * n_rows * k;
    write_answers(staged, first_row, n_rows, k, args.ids + to, args.weights + to,
                  [&](std::int64_t row) { return !args.assigned || args.assigned[row] == c; });
    __syncwarp();  // before the next answer is staged
  }
};

// The blocks of one x share its rows' maps among them.
template <int kTopK>
__global__ void __launch_bounds__(kWarp, 8) mapped_router_kernel(MappedRouterArgs args) {
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * kWarp;
  const std::int64_t row = first_row + threadIdx.x, last = args.logits.shape[0] - 1;
  RowRouter<kTopK> router(args, first_row);
  router.prepare();
  for (std::int64_t c = blockIdx.y; c < args.maps.shape[0]; c += gridDim.y) {
    // Assigned: the warp goes by every map of its rows, usually few.
    if (args.assigned && !__any_sync(~0u, args.assigned[row < last ? row : last] == c)) continue;
    router.route(c, args.assigned ? 0 : c);
  }
}

}  // namespace

void mapped_router_cuda(const MappedRouterArgs& args) {
  if (args.top_k > kMaxTopK)
    throw std::invalid_argument("masked_router: the CUDA kernel takes top_k and n_group up to 64");
  const DeviceInfo device = device_info();
  const std::size_t shared = scores_bytes(static_cast<int>(args.logits.shape[1])) + answers_bytes(kWarp, args.top_k);
  if (shared + sizeof(Tile) > device.shared_per_block)
    throw std::invalid_argument("masked_router: " + std::to_string(args.logits.shape[1]) +
                                " experts with a router_map need more shared memory than the GPU has");
  const std::int64_t maps = args.maps.shape[0];
  const LaunchShape shape{router_grid(args, kWarp, maps, 16 * device.multiprocessors), kWarp, shared};
  with_top_k(args.top_k, [&](auto k) { launch(mapped_router_kernel<decltype(k)::value>, shape, args.stream, args); });
}

}  // namespace moeprune
