// masked_router on CUDA: plain, not yet tuned.
//
// One thread routes one row along one walk, with the running top-k in its local memory, as keys whose integer
// order is "higher score, then lower id" (see masked_router.cpp). The softmax's denominator is carried
// relative to the running maximum, so that a walk answers at every stop; where the choice itself needs the
// denominator (softmax plus bias) or the groups, the list is walked before.
#include "cuda_utils.cuh"
#include "masked_router.h"

namespace moeprune {
namespace {

constexpr int kMaxTopK = 64, kMaxGroups = 64;  // the thread's local arrays

__device__ std::uint64_t key_of(float score, std::int32_t expert) {
  const std::uint32_t raw = __float_as_uint(score + 0.0f);  // -0 and +0 are equal scores
  std::uint32_t bits = raw & 0x80000000u ? ~raw : raw | 0x80000000u;
  if (score != score) bits = 0xFFFFFFFFu;
  return static_cast<std::uint64_t>(bits) << 32 | ~static_cast<std::uint32_t>(expert);
}

__device__ std::int32_t expert_of(std::uint64_t key) {
  return static_cast<std::int32_t>(~static_cast<std::uint32_t>(key));
}

__device__ float rounded(float value, DType dtype) {
  if (dtype == DType::bfloat16) return round_to_bfloat16(value);
  if (dtype == DType::float16) return round_to_float16(value);
  return value;
}

struct Denominator {
  double sum = 0;
  float highest = -INFINITY;

  __device__ void add(float x) {
    if (x > highest) {
      sum = sum * exp(static_cast<double>(highest) - static_cast<double>(x)) + (x == INFINITY ? NAN : 1.0);
      highest = x;
    } else if (x != -INFINITY) {
      sum += expf(x - highest);
    }
  }
};

struct RowRouter {
  const MaskedRouterArgs& args;
  std::int64_t row;
  Denominator denominator;
  std::uint64_t best[kMaxTopK];

  __device__ float logit(std::int32_t expert) const {
    return float_at(args.logits, row * args.logits.stride[0] + expert * args.logits.stride[1]);
  }

  __device__ float score(std::int32_t expert) const {
    const float x = logit(expert);
    switch (args.score) {
      case Score::softmax:
        return static_cast<float>(expf(x - denominator.highest) / denominator.sum);
      case Score::sigmoid: {
        const float t = expf(-fabsf(x));
        return (x < 0 ? t : 1.0f) / (1.0f + t);
      }
      case Score::sqrtsoftplus:
        return sqrtf(x > 20.0f ? x : log1pf(expf(x)));
      default:
        return x;
    }
  }

  __device__ float score_for_choice(std::int32_t expert) const {
    return args.bias ? score(expert) + args.bias[expert] : logit(expert);
  }

  // The groups that may be chosen from, as bits.
  __device__ std::uint64_t best_groups(const std::int32_t* list, int n) const {
    const int group_size = static_cast<int>(args.logits.shape[1]) / args.n_group;
    std::uint64_t group_key[kMaxGroups];
    for (int g = 0; g < args.n_group; ++g) {
      float first = -INFINITY, second = -INFINITY;
      bool present = false;
      for (int i = 0; i < n; ++i) {
        if (list[i] / group_size != g) continue;
        present = true;
        const float x = args.group_top2_sum && !args.bias ? score(list[i]) : score_for_choice(list[i]);
        if (x > first || x != x) {  // a NaN ranks first
          second = first;
          first = x;
        } else if (x > second) {
          second = x;
        }
      }
      group_key[g] = present ? key_of(args.group_top2_sum ? first + second : first, g) : 0;
    }
    std::uint64_t allowed = 0;
    for (int g = 0; g < args.n_group; ++g) {
      int better = 0;
      for (int other = 0; other < args.n_group; ++other) better += group_key[other] > group_key[g];
      if (group_key[g] != 0 && better < args.topk_group) allowed |= std::uint64_t{1} << g;
    }
    return allowed;
  }

  __device__ void insert(std::uint64_t key) {
    int j = args.top_k - 1;
    if (key <= best[j]) return;
    for (; j > 0 && best[j - 1] < key; --j) best[j] = best[j - 1];
    best[j] = key;
  }

  __device__ void answer(std::int32_t slot) const {
    const int k = args.top_k;
    const std::int64_t at = (slot * args.logits.shape[0] + row) * k;
    const bool over_chosen = args.score == Score::softmax_over_chosen;
    float highest = -INFINITY, total = 0;
    for (int j = 0; over_chosen && j < k; ++j) highest = fmaxf(highest, logit(expert_of(best[j])));
    for (int j = 0; j < k; ++j) {
      const std::int32_t expert = expert_of(best[j]);
      const float weight = over_chosen ? expf(logit(expert) - highest) : score(expert);
      args.ids[at + j] = expert;
      args.weights[at + j] = weight;
      total += weight;
    }
    double factor = 1;
    if (over_chosen) {
      factor /= static_cast<double>(total);
      total = 1;
    }
    if (args.renormalize) factor /= static_cast<double>(total) + args.eps;
    factor *= args.scale;
    for (int j = 0; j < k; ++j)
      args.weights[at + j] = rounded(static_cast<float>(args.weights[at + j] * factor), args.weights_dtype);
  }

  __device__ void walk(std::int64_t w) {
    const std::int64_t n_experts = args.logits.shape[1];
    const std::int32_t* list = args.lists + w * n_experts;
    const std::int32_t* stops = args.stops + w * args.n_stops;
    const std::int32_t* slots = args.slots + w * args.n_stops;
    const int n = stops[args.n_stops - 1];
    const bool softmax = args.score == Score::softmax;
    const bool denominator_first = softmax && (args.n_group > 1 || args.bias);
    for (int i = 0; denominator_first && i < n; ++i) denominator.add(logit(list[i]));
    const std::uint64_t allowed = args.n_group > 1 ? best_groups(list, n) : ~std::uint64_t{0};
    const int group_size = static_cast<int>(n_experts) / args.n_group;
    std::int64_t stop = 0;
    for (int j = 0; j < args.top_k; ++j) best[j] = 0;  // below every key
    for (int i = 0; i < n; ++i) {
      const std::int32_t expert = list[i];
      if (softmax && !denominator_first) denominator.add(logit(expert));
      if (args.n_group == 1 || allowed >> (expert / group_size) & 1) insert(key_of(score_for_choice(expert), expert));
      for (; stop < args.n_stops && stops[stop] == i + 1; ++stop) answer(slots[stop]);
    }
  }
};

__global__ void masked_router_kernel(MaskedRouterArgs args) {
  const std::int64_t n_rows = args.logits.shape[0];
  const std::int64_t walks = args.assigned ? 1 : args.n_walks;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= n_rows * walks) return;
  RowRouter router{args, index % n_rows, {}, {}};
  router.walk(args.assigned ? args.assigned[router.row] : index / n_rows);
}

}  // namespace

void masked_router_cuda(const MaskedRouterArgs& args) {
  if (args.top_k > kMaxTopK || args.n_group > kMaxGroups)
    throw std::invalid_argument("masked_router: the CUDA kernel takes top_k and n_group up to 64");
  const std::int64_t work = args.logits.shape[0] * (args.assigned ? 1 : args.n_walks);
  const std::int64_t blocks = (work + kThreads - 1) / kThreads;
  if (blocks > 0x7FFFFFFF) throw std::invalid_argument("masked_router: too many rows in one call on CUDA");
  launch(masked_router_kernel, {dim3(static_cast<unsigned>(blocks)), kThreads}, args.stream, args);
}

}  // namespace moeprune
