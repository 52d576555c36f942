// What the CUDA kernels are written in: the pieces of CUDA that they may use, the same under nvcc and under the
// emulation by a plain C++ compiler (MOEPRUNE_CUDA_EMULATED, see emulator/cuda_emulator.h), and what they share.
//
//   block_shared<T>()   the block's one object of type T; a kernel's own T, so that no two kernels share
//   dynamic_shared()    the bytes that the launch asked for, aligned to 16
//   cluster_*           clusters of blocks; below sm_90 every block is a cluster of its own. cluster_shared(mine,
//                       rank) is the same object of another block, which must have started and not yet ended:
//                       cluster_sync() before the first and after the last use
//   load16[_streaming]  16 aligned bytes that no thread writes meanwhile; streaming: not needed again
//   copy16_async        16 aligned bytes to shared memory; its thread may read them after wait_for_copies()
//   fast_exp2           2^x within 2 ulp, subnormal results are 0
//   min_or_nan          the smaller, NaN where either is NaN
//   clusters_in(kernel) whether it can be launched in clusters: by the device, and by what it was compiled for
//   launch(kernel, shape, stream, arguments...)    a grid of no blocks launches nothing
#pragma once

#include <stdexcept>
#include <string>

#include "tensor.h"

#if defined(MOEPRUNE_CUDA_EMULATED)
#include "emulator/cuda_emulator.h"
#else
#include "cuda/native.cuh"
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
  T partial[32];  // a warp each
};

// Combines one value per thread over the block in a fixed tree, hence deterministically; every thread gets
// the result. Blocks are of whole warps. combine must be associative and commutative up to rounding.
template <class T, class Combine>
__device__ T block_reduce(T value, Combine combine) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value = combine(value, __shfl_xor_sync(0xFFFFFFFFu, value, lanes));
  auto& partial = block_shared<ReductionSpace<T>>().partial;
  __syncthreads();  // the previous reduction's result has been read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = partial[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) value = combine(value, partial[warp]);
  return value;
}

struct Sum {
  __device__ double operator()(double a, double b) const { return a + b; }
};

// The larger; of floats, the one that is a number.
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ std::uint64_t operator()(std::uint64_t a, std::uint64_t b) const { return a > b ? a : b; }
};

// The larger; NaN wins.
struct NanMax {
  __device__ double operator()(double a, double b) const { return a != a ? a : b != b ? b : a > b ? a : b; }
};

}  // namespace moeprune
