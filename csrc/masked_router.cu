// masked_router on CUDA.
//
// A thread routes a row. A block first brings its rows' logits into shared memory, by experts, so that a step of the
// walk reads neighbouring words; then its threads walk the list together, each with the running top-k of its row in
// registers, as keys whose integer order is "higher score, then lower id" (see masked_router.cpp): an expert sinks to
// its place by a maximum and a minimum at each. The softmax's denominator is carried along, so that a walk answers at
// every stop; where the choice itself needs the denominator (softmax plus bias, sums of scores of groups), the list is
// walked before. Answers, which are most of the traffic, leave by way of shared memory, a warp's rows as one run of
// consecutive words.
#include "cuda/router_rows.cuh"
#include "masked_router.h"

namespace moeprune {
namespace {

constexpr int kMaxGroups = 64;    // the thread's local arrays
constexpr int kRowsOfBlock = 64;  // two warps: many small blocks, since they wait for memory

// A running sum of exp(x - offset). The offset follows the largest x at a distance, so that the sum is hardly ever
// rescaled and neither overflows nor vanishes.
struct Denominator {
  float offset = kLowest;
  double sum = 0;

  __device__ void add(float x) {
    if (x > offset + 16.0f) {
      sum *= exp(static_cast<double>(offset) - static_cast<double>(x));
      offset = x;
    }
    sum += static_cast<double>(expf(x - offset));  // NaN for NaN and +inf
  }
};

// The block's shared memory, in this order: logits [E][rows + 1] where they fit (one more, against bank conflicts),
// and for each warp the answers of its rows on their way out: ids [32][K + 1], weights [32][K + 1].
struct Layout {
  int rows;     // of a block, and its threads
  bool staged;  // whether the logits are brought into shared memory

  __host__ __device__ std::size_t logits(int n_experts) const {
    return staged ? sizeof(float) * static_cast<std::size_t>(n_experts) * (rows + 1) : 0;
  }
};

template <int kTopK>
struct RowRouter {
  const MaskedRouterArgs& args;
  const Layout& layout;
  std::int64_t row;  // of the tensor; rows beyond its end repeat the last and are not written
  Denominator denominator;
  BestK<kTopK, false> best;

  __device__ int top_k() const { return kTopK > 0 ? kTopK : args.top_k; }
  __device__ int n_experts() const { return static_cast<int>(args.logits.shape[1]); }

  __device__ float logit(std::int32_t expert) const {
    if (layout.staged)
      return reinterpret_cast<const float*>(dynamic_shared())[expert * (layout.rows + 1) + threadIdx.x];
    return float_at(args.logits, row * args.logits.stride[0] + expert * args.logits.stride[1]);
  }

  __device__ float score(float x) const {
    switch (args.score) {
      case Score::softmax:
        return static_cast<float>(static_cast<double>(expf(x - denominator.offset)) / denominator.sum);
      case Score::sigmoid:
        return sigmoid(x);
      case Score::sqrtsoftplus:
        return root_of_softplus(x);
      default:
        return x;
    }
  }

  // What ranks an expert of this logit.
  __device__ float choice(float x, std::int32_t expert) const { return args.bias ? score(x) + args.bias[expert] : x; }

  // The groups that may be chosen from, as bits.
  __device__ std::uint64_t best_groups(const std::int32_t* list, int n) const {
    const int group_size = n_experts() / args.n_group;
    float first[kMaxGroups], second[kMaxGroups];
    std::uint64_t present = 0, key[kMaxGroups];
    for (int g = 0; g < args.n_group; ++g) first[g] = second[g] = -INFINITY;
    for (int i = 0; i < n; ++i) {
      const int g = list[i] / group_size;
      present |= std::uint64_t{1} << g;
      const float logit_here = logit(list[i]);
      const float x = args.group_top2_sum && !args.bias ? score(logit_here) : choice(logit_here, list[i]);
      if (x > first[g] || x != x) {  // a NaN ranks first
        second[g] = first[g];
        first[g] = x;
      } else if (x > second[g]) {
        second[g] = x;
      }
    }
    for (int g = 0; g < args.n_group; ++g)
      key[g] = present >> g & 1 ? key_of(args.group_top2_sum ? first[g] + second[g] : first[g], g) : kNoKey;
    std::uint64_t allowed = 0;
    for (int g = 0; g < args.n_group; ++g) {
      int better = 0;
      for (int other = 0; other < args.n_group; ++other) better += key[other] > key[g];
      if (key[g] != kNoKey && better < args.topk_group) allowed |= std::uint64_t{1} << g;
    }
    return allowed;
  }

  // This row's ids and weights, into the warp's shared memory. One loop a step, so that the experts' chains of
  // operations run beside each other.
  __device__ void stage(std::int32_t* ids, float* weights) const {
    const int k = top_k();
    float w[kTopK > 0 ? kTopK : kMaxTopK];
#pragma unroll
    for (int j = 0; j < k; ++j) {
      const std::int32_t expert = id_of(best.key[j]);
      ids[j] = expert;
      w[j] = logit(expert);
    }
    if (is_exponential(args)) {
      float offset = denominator.offset;
      if (args.score == Score::softmax_over_chosen) {
        offset = -INFINITY;
#pragma unroll
        for (int j = 0; j < k; ++j) offset = fmaxf(offset, w[j]);
      }
#pragma unroll
      for (int j = 0; j < k; ++j) w[j] = expf(w[j] - offset);
    } else {
#pragma unroll
      for (int j = 0; j < k; ++j) w[j] = score(w[j]);
    }
    float total = 0;
#pragma unroll
    for (int j = 0; j < k; ++j) total += w[j];
    const double factor = weight_factor(args, denominator.sum, static_cast<double>(total));
#pragma unroll
    for (int j = 0; j < k; ++j) w[j] = static_cast<float>(static_cast<double>(w[j]) * factor);
    if (args.weights_dtype != DType::float32) {
#pragma unroll
      for (int j = 0; j < k; ++j) w[j] = rounded(w[j], args.weights_dtype);
    }
#pragma unroll
    for (int j = 0; j < k; ++j) weights[j] = w[j];
  }

  // The warp's answers to one slot: staged, then written as runs of consecutive words.
  __device__ void answer(std::int32_t slot) const {
    const int k = top_k(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const StagedAnswers staged(dynamic_shared() + layout.logits(n_experts()), layout.rows, k);
    stage(staged.ids + lane * (k + 1), staged.weights + lane * (k + 1));
    __syncwarp();
    const std::int64_t n_rows = args.logits.shape[0], to = slot * n_rows * k;
    const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * layout.rows + warp * kWarp;
    write_answers(staged, first_row, n_rows, k, args.ids + to, args.weights + to, [](std::int64_t) { return true; });
    __syncwarp();  // before the next answer is staged
  }

  __device__ void walk(std::int64_t w) {
    const std::int32_t* list = args.lists + w * n_experts();
    const std::int32_t* stops = args.stops + w * args.n_stops;
    const std::int32_t* slots = args.slots + w * args.n_stops;
    const int n = stops[args.n_stops - 1];
    const bool softmax = is_softmax(args);
    const bool denominator_first = softmax && (args.n_group > 1 || args.bias);
    denominator = Denominator();
    for (int i = 0; denominator_first && i < n; ++i) denominator.add(logit(list[i]));
    const std::uint64_t allowed = args.n_group > 1 ? best_groups(list, n) : ~std::uint64_t{0};
    const int group_size = n_experts() / args.n_group;
    std::int64_t stop = 0;
    best.clear(top_k());
    for (int i = 0; i < n; ++i) {
      const std::int32_t expert = list[i];
      const float x = logit(expert);
      if (softmax && !denominator_first) denominator.add(x);
      if (args.n_group == 1 || allowed >> (expert / group_size) & 1)
        best.insert(key_of(choice(x, expert), expert), 0, top_k());
      // The rows of a warp share their list, or (assigned) have one stop each, taken below.
      if (args.assigned) continue;
      for (; stop < args.n_stops && stops[stop] == i + 1; ++stop) answer(slots[stop]);
    }
    if (args.assigned) {
      __syncwarp();
      answer(slots[0]);
    }
  }
};

// A block to `rows` rows; the blocks of one x share its rows' walks among them.
template <int kTopK>
__global__ void __launch_bounds__(kRowsOfBlock, 6) masked_router_kernel(MaskedRouterArgs args, Layout layout) {
  if (layout.staged) {
    const int first = threadIdx.x / kWarp * kWarp;
    stage_rows(args.logits, static_cast<std::int64_t>(blockIdx.x) * layout.rows + first,
               reinterpret_cast<float*>(dynamic_shared()) + first, layout.rows + 1);
    __syncthreads();
  }
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * layout.rows + threadIdx.x;
  const std::int64_t last = args.logits.shape[0] - 1;
  RowRouter<kTopK> router{args, layout, row < last ? row : last, {}, {}};
  if (args.assigned) {
    router.walk(args.assigned[router.row]);
  } else {
    for (std::int64_t w = blockIdx.y; w < args.n_walks; w += gridDim.y) router.walk(w);
  }
}

// The rows of a block: as many as leave room for several blocks on a multiprocessor, half where they would not, and
// the logits read where they lie where even those are too many.
Layout layout_of(const MaskedRouterArgs& args, std::size_t shared_per_block) {
  const int n_experts = static_cast<int>(args.logits.shape[1]);
  const Layout whole{kRowsOfBlock, true}, half{kRowsOfBlock / 2, true};
  if (whole.logits(n_experts) + answers_bytes(whole.rows, args.top_k) <= shared_per_block / 3) return whole;
  if (half.logits(n_experts) + answers_bytes(half.rows, args.top_k) <= shared_per_block) return half;
  return {kRowsOfBlock / 2, false};
}

}  // namespace

void masked_router_cuda(const MaskedRouterArgs& args) {
  if (args.top_k > kMaxTopK || args.n_group > kMaxGroups)
    throw std::invalid_argument("masked_router: the CUDA kernel takes top_k and n_group up to 64");
  const DeviceInfo device = device_info();
  const Layout layout = layout_of(args, device.shared_per_block);
  const std::int64_t walks = args.assigned ? 1 : args.n_walks;
  const LaunchShape shape{
      router_grid(args, layout.rows, walks, 8 * device.multiprocessors), layout.rows,
      layout.logits(static_cast<int>(args.logits.shape[1])) + answers_bytes(layout.rows, args.top_k)};
  with_top_k(args.top_k,
             [&](auto k) { launch(masked_router_kernel<decltype(k)::value>, shape, args.stream, args, layout); });
}

}  // namespace moeprune
