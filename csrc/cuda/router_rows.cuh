// What the router kernels share on CUDA: rows of logits on their way into shared memory, scores and their order, and
// answers on their way out.
#pragma once

#include "cuda/primitives.cuh"

namespace moeprune {

constexpr int kWarp = 32;
constexpr int kMaxTopK = 64;         // the thread's local arrays
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

// The shared memory of a warp's answers: ids [32][K + 1], weights [32][K + 1].
struct StagedAnswers {
  std::int32_t* ids;
  float* weights;
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
