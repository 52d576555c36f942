// The few pieces that the CUDA kernels share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "tensor.h"

#define MOEPRUNE_CUDA_CHECK(call)                                                                  \
  do {                                                                                             \
    const cudaError_t status_ = (call);                                                            \
    if (status_ != cudaSuccess)                                                                    \
      throw std::runtime_error(std::string("moeprune_ext, CUDA: ") + cudaGetErrorString(status_)); \
  } while (false)

namespace moeprune {

constexpr int kThreads = 256;  // of every block

// An element of a float tensor of any dtype as float32, by its offset in elements.
__device__ inline float float_at(const TensorView& tensor, std::int64_t at) {
  switch (tensor.dtype) {
    case DType::float32:
      return static_cast<const float*>(tensor.data)[at];
    case DType::bfloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(tensor.data)[at]);
    case DType::float64:
      return static_cast<float>(static_cast<const double*>(tensor.data)[at]);
    default:
      return __half2float(static_cast<const __half*>(tensor.data)[at]);
  }
}

__device__ inline double double_at(const TensorView& tensor, std::int64_t at) {
  if (tensor.dtype == DType::float64) return static_cast<const double*>(tensor.data)[at];
  return float_at(tensor, at);
}

// Combines one value per thread over the block in a fixed tree, hence deterministically; every thread gets
// the result. combine must be associative and commutative up to rounding.
template <class T, class Combine>
__device__ T block_reduce(T value, Combine combine) {
  __shared__ T partial[kThreads];
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
