// What the router kernels share on CUDA: rows of logits on their way into shared memory, scores and their order, the
// running top-k, the formula of the weights, and answers on their way out.
#pragma once

#include <type_traits>

#include "cuda/primitives.cuh"
#include "router.h"

namespace moeprune {

constexpr int kWarp = 32;
constexpr int kMaxTopK = 64;  // the thread's local arrays
constexpr float kLowest = -3.4028235e38f;
constexpr std::uint64_t kNoKey = 0;  // below every key

// Integers in the order "higher score, then lower id", NaN above all.
__device__ inline std::uint64_t key_of(float score, std::int32_t id) {
  const std::uint32_t raw = __float_as_uint(score + 0.0f);  // -0 and +0 are equal scores
  std::uint32_t bits = raw & 0x80000000u ? ~raw : raw | 0x80000000u;
  if (score != score) bits = 0xFFFFFFFFu;
  return static_cast<std::uint64_t>(bits) << 32 | ~static_cast<std::uint32_t>(id);
}

__device__ inline std::int32_t id_of(std::uint64_t key) {
  return static_cast<std::int32_t>(~static_cast<std::uint32_t>(key));
}

__device__ inline float rounded(float value, DType dtype) {
  if (dtype == DType::bfloat16) return round_to_bfloat16(value);
  if (dtype == DType::float16) return round_to_float16(value);
  return value;
}

// A value for each of the best K, or none: an unused array would cost a kernel registers.
template <int kCount>
struct CarriedValues {
  float value[kCount];
};
template <>
struct CarriedValues<0> {};

// The running top-k of a thread's row, best first, and with kCarries a value for each of them: in registers where top_k
// is known to the compiler, otherwise (kTopK = 0) in local memory.
template <int kTopK, bool kCarries, int kRoom = kTopK == 0 ? kMaxTopK : kTopK>
struct BestK : CarriedValues<kCarries ? kRoom : 0> {
  std::uint64_t key[kRoom];

  __device__ void clear(int top_k) {
#pragma unroll
    for (int j = 0; j < (kTopK > 0 ? kTopK : top_k); ++j) {
      key[j] = kNoKey;
      if constexpr (kCarries) this->value[j] = 0;
    }
  }
  // Keys are distinct: each place keeps its own, or takes the new one or the one before it.
  __device__ void insert(std::uint64_t entering, [[maybe_unused]] float its_value, int top_k) {
    const int last = (kTopK > 0 ? kTopK : top_k) - 1;
    if (entering <= key[last]) return;
#pragma unroll
    for (int j = last; j > 0; --j) {
      const bool before = entering > key[j - 1];  // belongs before: the one before comes here
      if (entering > key[j]) {
        if constexpr (kCarries) this->value[j] = before ? this->value[j - 1] : its_value;
        key[j] = before ? key[j - 1] : entering;
      }
    }
    if (entering > key[0]) {
      if constexpr (kCarries) this->value[0] = its_value;
      key[0] = entering;
    }
  }
};

// Calls body(k) with an integral_constant: top_k, if kernels are compiled for that, otherwise 0.
template <class Body>
void with_top_k(int top_k, const Body& body) {
  switch (top_k) {
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    case 4:
      return body(std::integral_constant<int, 4>());
    case 6:
      return body(std::integral_constant<int, 6>());
    case 8:
      return body(std::integral_constant<int, 8>());
    default:
      return body(std::integral_constant<int, 0>());
  }
}

// By what the scores of the chosen are multiplied (router.h). `sum` is a softmax's denominator, `chosen` the sum of the
// scores, both before they are divided.
__device__ inline double weight_factor(const RouterArgs& args, double sum, double chosen) {
  double factor = is_softmax(args) ? 1.0 / sum : is_exponential(args) ? 1.0 / chosen : 1.0;
  if (args.renormalize) factor /= chosen * factor + static_cast<double>(args.eps);
  return factor * static_cast<double>(args.scale);
}

// The grid of a router kernel, `rows` of the N rows to a block of x. Where these are few, their candidates go to
// several blocks of y, which bring in the logits each for itself, until the device has `wanted` blocks.
inline dim3 router_grid(const RouterArgs& args, int rows, std::int64_t candidates, std::int64_t wanted) {
  const std::int64_t blocks = (args.logits.shape[0] + rows - 1) / rows;
  if (blocks > 0x7FFFFFFF) throw std::invalid_argument("masked_router: too many rows in one call on CUDA");
  const std::int64_t each = (wanted + blocks - 1) / blocks;
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(each < candidates ? each : candidates));
}

__device__ inline float sigmoid(float x) {
  const float t = expf(-fabsf(x));
  return (x < 0 ? t : 1.0f) / (1.0f + t);
}

// Beyond 20 the softplus is x to float precision.
__device__ inline float root_of_softplus(float x) { return sqrtf(x > 20.0f ? x : log1pf(expf(x))); }

__device__ inline float to_float(std::uint32_t bits, DType) { return __uint_as_float(bits); }
__device__ inline float to_float(std::uint16_t bits, DType dtype) {
  return dtype == DType::bfloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}

// A warp's 32 rows of logits from `first` on to to[e * stride + row], as many loads in flight as a thread has registers
// for; rows beyond the tensor's end repeat its last.
template <class Bits>
__device__ void stage_rows_as(const TensorView& logits, std::int64_t first, float* to, int stride) {
  constexpr int kAtOnce = 16;
  static_assert(kWarp % kAtOnce == 0, "each warp stages 32 rows");
  const Bits* from = static_cast<const Bits*>(logits.data);
  const std::int64_t last = logits.shape[0] - 1;
  const int n_experts = static_cast<int>(logits.shape[1]);
  for (int r = 0; r < kWarp; r += kAtOnce)
    for (int e = threadIdx.x % kWarp; e < n_experts; e += kWarp) {
      Bits bits[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const std::int64_t row = first + r + u;
        bits[u] = __ldg(from + (row < last ? row : last) * logits.stride[0] + e * logits.stride[1]);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) to[e * stride + r + u] = to_float(bits[u], logits.dtype);
    }
}

__device__ inline void stage_rows(const TensorView& logits, std::int64_t first, float* to, int stride) {
  if (logits.dtype == DType::float32) {
    stage_rows_as<std::uint32_t>(logits, first, to, stride);
  } else {
    stage_rows_as<std::uint16_t>(logits, first, to, stride);
  }
}

// Answers in a block's shared memory: ids [rows][K + 1], then weights [rows][K + 1].
constexpr std::size_t answers_bytes(int rows, int top_k) {
  return (sizeof(std::int32_t) + sizeof(float)) * static_cast<std::size_t>(rows) * (top_k + 1);
}

// Those of the calling warp: ids [32][K + 1], weights [32][K + 1].
struct StagedAnswers {
  std::int32_t* ids;
  float* weights;

  __device__ StagedAnswers(void* answers, int rows, int top_k)
      : ids(static_cast<std::int32_t*>(answers) + threadIdx.x / kWarp * kWarp * (top_k + 1)),
        weights(static_cast<float*>(answers) + (rows + threadIdx.x / kWarp * kWarp) * (top_k + 1)) {}
};

// The answers of the warp's rows from `first` on, to rows from `first` on of ids and weights [N, K], as a run of
// consecutive words; `wanted(row)` says which of them.
template <class Wanted>
__device__ void write_answers(const StagedAnswers& staged, std::int64_t first, std::int64_t n_rows, int k,
                              std::int64_t* ids, float* weights, Wanted wanted) {
  const std::int64_t rows_left = n_rows - first;
  const int words = static_cast<int>(rows_left < kWarp ? rows_left : kWarp) * k;  // below 0 for a warp without rows
  for (int i = threadIdx.x % kWarp; i < words; i += kWarp) {
    if (!wanted(first + i / k)) continue;
    const int from = i + i / k;  // rows are k + 1 words apart
    ids[first * k + i] = staged.ids[from];
    weights[first * k + i] = staged.weights[from];
  }
}

}  // namespace moeprune
