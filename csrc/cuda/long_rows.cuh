// Long rows as CUDA kernels read them: in vectors of 16 bytes, of any float dtype, whatever the strides and the
// alignment. Which elements make a vector, and which thread takes it, depends on their indices only, so that strided
// and unaligned rows give the bits of their copies. And their log-sum-exp, put together by a cluster of blocks.
#pragma once

#include "cuda/primitives.cuh"

namespace moeprune {

constexpr float kLog2E = 1.44269504f;

// ---- rows

// The bits of the elements, by dtype.
struct Float32 {
  using Bits = std::uint32_t;
  static constexpr DType dtype = DType::float32;
  static constexpr Bits minus_infinity = 0xFF800000u;
};
struct BFloat16 {
  using Bits = std::uint16_t;
  static constexpr DType dtype = DType::bfloat16;
  static constexpr Bits minus_infinity = 0xFF80u;
};
struct Float16 {
  using Bits = std::uint16_t;
  static constexpr DType dtype = DType::float16;
  static constexpr Bits minus_infinity = 0xFC00u;
};

template <class T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(typename T::Bits));

// A row of a tensor of which it is the last dimension, kLast.
template <int kLast>
struct Row {
  const TensorView& tensor;
  const char* first;  // the first element

  __device__ Row(const TensorView& of, std::int64_t offset)
      : tensor(of), first(static_cast<const char*>(of.data) + offset * (of.dtype == DType::float32 ? 4 : 2)) {}

  __device__ int size() const { return static_cast<int>(tensor.shape[kLast]); }
  __device__ DType dtype() const { return tensor.dtype; }
  template <class T>
  __device__ typename T::Bits bits(int i) const {
    return __ldg(reinterpret_cast<const typename T::Bits*>(first) + i * tensor.stride[kLast]);
  }
  __device__ float operator[](int i) const {
    return dtype() == DType::float32    ? __uint_as_float(bits<Float32>(i))
           : dtype() == DType::bfloat16 ? bfloat16_to_float(bits<BFloat16>(i))
                                        : float16_to_float(bits<Float16>(i));
  }

  // Where vector `v` of a row of T is, if all its elements lie there side by side, at a multiple of `alignment`;
  // otherwise null.
  template <class T>
  __device__ const char* vector_at(int v, int alignment) const {
    const bool aligned = reinterpret_cast<std::uintptr_t>(first) % alignment == 0;
    const bool whole = (v + 1) * kPerVector<T> <= size() && tensor.stride[kLast] == 1;
    return aligned && whole ? first + static_cast<std::int64_t>(v) * 16 : nullptr;
  }
};

// Vector `v`, elements [v * kPerVector, ...), of a row of T; -inf beyond the row's end. kWhole: it is known to be
// loadable as it lies, which keeps the code for all else out of the kernel, and its registers.
template <class T, bool kWhole, bool kOnce, class AnyRow>
__device__ Vec16 load_vector(const AnyRow& row, int v) {
  constexpr int n = kPerVector<T>, width = 8 * static_cast<int>(sizeof(typename T::Bits));
  if constexpr (kWhole) {
    const char* from = row.first + static_cast<std::int64_t>(v) * 16;
    return kOnce ? load16_streaming(from) : load16(from);
  }
  if (const char* from = row.template vector_at<T>(v, 16)) return kOnce ? load16_streaming(from) : load16(from);
  Vec16 vector;
  if (const char* from = row.template vector_at<T>(v, 4)) {
#pragma unroll
    for (int w = 0; w < 4; ++w) vector.word[w] = __ldg(reinterpret_cast<const std::uint32_t*>(from) + w);
    return vector;
  }
#pragma unroll
  for (int w = 0; w < 4; ++w) vector.word[w] = 0;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const std::uint32_t element = v * n + i < row.size() ? row.template bits<T>(v * n + i) : T::minus_infinity;
    vector.word[i * width / 32] |= element << (i * width % 32);
  }
  return vector;
}

template <class T>
__device__ void unpack(const Vec16& vector, float (&x)[kPerVector<T>]) {
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) {
    if constexpr (T::dtype == DType::float32) {
      x[i] = __uint_as_float(vector.word[i]);
    } else if constexpr (T::dtype == DType::bfloat16) {
      x[i] = __uint_as_float(i % 2 ? vector.word[i / 2] & 0xFFFF0000u : vector.word[i / 2] << 16);
    } else {
      x[i] = float16_to_float(static_cast<std::uint16_t>(vector.word[i / 2] >> (i % 2 * 16)));
    }
  }
}

// The elements of vector `v` of a row of T in a row of another dtype.
template <class T, class AnyRow>
__device__ void gather_vector(const AnyRow& row, int v, float (&x)[kPerVector<T>]) {
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) {
    const int at = v * kPerVector<T> + i;
    x[i] = at < row.size() ? row[at] : -INFINITY;
  }
}

template <int n>
__device__ float tree_sum(float (&x)[n]) {
#pragma unroll
  for (int width = n / 2; width > 0; width /= 2)
#pragma unroll
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

// The vectors of a row that are this thread's: neighbours in memory go to neighbouring threads, then to the
// cluster's blocks, then round again.
struct Share {
  int first, step;

  __device__ Share()
      : first(static_cast<int>(cluster_rank() * blockDim.x + threadIdx.x)),
        step(static_cast<int>(cluster_size() * blockDim.x)) {}
  __device__ int operator[](int k) const { return first + k * step; }
};

template <class T, class AnyRow>
__device__ int vectors_of(const AnyRow& row) {
  return (row.size() + kPerVector<T> - 1) / kPerVector<T>;
}

// ---- log-sum-exp

// A thread's terms, relative to the largest of its elements.
struct Terms {
  float highest = -INFINITY;
  float sum = 0;

  template <int n>
  __device__ void add(const float (&x)[n]) {
    float raised = highest;
#pragma unroll
    for (int i = 0; i < n; ++i) raised = fmaxf(raised, x[i]);  // NaN is passed over here and kept in the sum
    if (raised > highest) sum = sum > 0 ? sum * exp2f((highest - raised) * kLog2E) : sum;
    highest = raised;
    const float offset = highest == -INFINITY ? 0 : highest;  // -inf only: terms 0, not NaN
    float term[n];
#pragma unroll
    for (int i = 0; i < n; ++i) term[i] = fast_exp2((x[i] - offset) * kLog2E);
    sum += tree_sum(term);
  }
};

// Sums of exponentials relative to the largest of their terms, of many threads.
struct ManyTerms {
  float highest;
  double sum;
};

// What warps and the blocks of a cluster tell each other. `terms` is written by thread 0 before a cluster_sync() and
// read by other blocks before the next, so it may be written again after that.
struct LseExchange {
  ManyTerms warps[32];
  ManyTerms terms[2];  // of two rows
  double lse[2];
};

// The warp's terms together, in every lane; each lane brings some, or {-INFINITY, 0}.
__device__ inline ManyTerms warp_combine(ManyTerms mine) {
  float highest = mine.highest;
  for (int lanes = 16; lanes > 0; lanes /= 2) highest = fmaxf(highest, __shfl_xor_sync(0xFFFFFFFFu, highest, lanes));
  // Also -inf only, where highest - highest is no number, and sums that are NaN already.
  const bool scaled = mine.sum == 0 || mine.highest == highest;
  double sum = scaled ? mine.sum : mine.sum * static_cast<double>(exp2f((mine.highest - highest) * kLog2E));
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
  return {highest, sum};
}

// The log-sum-exp of the cluster's threads' terms, in every thread; NaN where no softmax exists.
__device__ inline double combined_lse(const Terms& terms, int slot) {
  auto& mine = block_shared<LseExchange>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const ManyTerms of_warp = warp_combine({terms.highest, static_cast<double>(terms.sum)});
  if (lane == 0) mine.warps[warp] = of_warp;
  __syncthreads();
  if (warp == 0) {
    const ManyTerms of_block =
        warp_combine(lane < static_cast<int>(blockDim.x / 32) ? mine.warps[lane] : ManyTerms{-INFINITY, 0});
    if (lane == 0) mine.terms[slot] = of_block;
  }
  cluster_sync();
  if (warp == 0) {  // a lane to a block: one round trip for all
    const bool present = static_cast<unsigned>(lane) < cluster_size();
    const ManyTerms of_cluster =
        warp_combine(present ? cluster_shared(&mine, lane)->terms[slot] : ManyTerms{-INFINITY, 0});
    const double lse = static_cast<double>(of_cluster.highest) + log(of_cluster.sum);
    if (lane == 0) mine.lse[slot] = isfinite(lse) ? lse : static_cast<double>(NAN);
  }
  __syncthreads();
  return mine.lse[slot];
}

// Reading the row, holding nothing of it.
template <class T, class AnyRow>
__device__ double streamed_lse(const AnyRow& row, int slot) {
  constexpr int kAtOnce = 4;  // loads in flight
  const Share share;
  const int vectors = vectors_of<T>(row);
  Terms terms;
  for (int v = share.first; v < vectors; v += kAtOnce * share.step) {
    Vec16 loaded[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (v + u * share.step < vectors) loaded[u] = load_vector<T, false, false>(row, v + u * share.step);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (v + u * share.step < vectors) {
        float x[kPerVector<T>];
        unpack<T>(loaded[u], x);
        terms.add(x);
      }
    }
  }
  return combined_lse(terms, slot);
}

template <class AnyRow>
__device__ double streamed_lse(const AnyRow& row, int slot) {
  switch (row.dtype()) {
    case DType::bfloat16:
      return streamed_lse<BFloat16>(row, slot);
    case DType::float16:
      return streamed_lse<Float16>(row, slot);
    default:
      return streamed_lse<Float32>(row, slot);
  }
}

}  // namespace moeprune
