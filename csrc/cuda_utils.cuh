// What the CUDA kernels are written in: the pieces of CUDA that they may use, the same under nvcc and under the
// emulation by a plain C++ compiler (MOEPRUNE_CUDA_EMULATED, see cuda_emulator.h), and what they share.
//
//   block_shared<T>()   the block's one object of type T; a kernel's own T, so that no two kernels share
//   dynamic_shared()    the bytes that the launch asked for, aligned to 16
//   cluster_*           clusters of blocks; below sm_90 every block is a cluster of its own. cluster_shared(mine,
//                       rank) is the same object of another block, which must have started and not yet ended:
//                       cluster_sync() before the first and after the last use
//   load16[_streaming]  16 aligned bytes that no thread writes meanwhile; streaming: not needed again
//   fast_exp2           2^x within 2 ulp, subnormal results are 0
//   launch(kernel, shape, stream, arguments...)    a grid of no blocks launches nothing
#pragma once

#include <stdexcept>
#include <string>

#include "tensor.h"

#if defined(MOEPRUNE_CUDA_EMULATED)
#include "cuda_emulator.h"
#else
#include "cuda_native.cuh"
#endif

namespace moeprune {

constexpr int kThreads = 256;  // of a block, unless a kernel says otherwise

__device__ inline float bfloat16_to_float(std::uint16_t bits) {
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

// To the nearest bfloat16, ties to even.
__device__ inline float round_to_bfloat16(float x) {
  if (x != x) return x;
  const unsigned bits = __float_as_uint(x);
  return __uint_as_float((bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u);
}

// An element of a float tensor of any dtype as float32, by its offset in elements.
__device__ inline float float_at(const TensorView& tensor, std::int64_t at) {
  switch (tensor.dtype) {
    case DType::float32:
      return static_cast<const float*>(tensor.data)[at];
    case DType::bfloat16:
      return bfloat16_to_float(static_cast<const std::uint16_t*>(tensor.data)[at]);
    case DType::float64:
      return static_cast<float>(static_cast<const double*>(tensor.data)[at]);
    default:
      return float16_to_float(static_cast<const std::uint16_t*>(tensor.data)[at]);
  }
}

__device__ inline double double_at(const TensorView& tensor, std::int64_t at) {
  if (tensor.dtype == DType::float64) return static_cast<const double*>(tensor.data)[at];
  return static_cast<double>(float_at(tensor, at));
}

template <class T>
struct ReductionSpace {
  T partial[kThreads];
};

// Combines one value per thread over the block in a fixed tree, hence deterministically; every thread gets
// the result. combine must be associative and commutative up to rounding.
template <class T, class Combine>
__device__ T block_reduce(T value, Combine combine) {
  auto& partial = block_shared<ReductionSpace<T>>().partial;
  __syncthreads();  // the previous reduction's result has been read
  partial[threadIdx.x] = value;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (static_cast<int>(threadIdx.x) < width)
      partial[threadIdx.x] = combine(partial[threadIdx.x], partial[threadIdx.x + width]);
    __syncthreads();
  }
  return partial[0];
}

struct Sum {
  __device__ double operator()(double a, double b) const { return a + b; }
};

// The larger; NaN wins.
struct NanMax {
  __device__ double operator()(double a, double b) const { return a != a ? a : b != b ? b : a > b ? a : b; }
};

}  // namespace moeprune
