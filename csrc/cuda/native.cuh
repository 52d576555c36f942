// The primitives of cuda/primitives.cuh for nvcc; emulator/cuda_emulator.h has the same for the emulation.
#pragma once

#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#define MOEPRUNE_CUDA_CHECK(call)                                                                  \
  do {                                                                                             \
    const cudaError_t status_ = (call);                                                            \
    if (status_ != cudaSuccess)                                                                    \
      throw std::runtime_error(std::string("moeprune_ext, CUDA: ") + cudaGetErrorString(status_)); \
  } while (false)

namespace moeprune {

// ---- shared memory and clusters

template <class T>
__device__ T& block_shared() {
  static_assert(std::is_trivially_default_constructible_v<T>, "shared memory has no constructors");
  __shared__ T object;
  return object;
}

__device__ inline char* dynamic_shared() {
  extern __shared__ uint4 moeprune_dynamic_shared[];
  return reinterpret_cast<char*>(moeprune_dynamic_shared);
}

__device__ inline unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}

__device__ inline unsigned cluster_size() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().num_blocks();
#else
  return 1;
#endif
}

__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

template <class T>
__device__ T* cluster_shared(T* mine, [[maybe_unused]] unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(mine, static_cast<int>(rank));
#else
  return mine;
#endif
}

// ---- numbers and loads

__device__ inline float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ inline float min_or_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ inline float float16_to_float(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// To the nearest float16, ties to even.
__device__ inline float round_to_float16(float x) { return __half2float(__float2half_rn(x)); }

struct alignas(16) Vec16 {
  std::uint32_t word[4];
};

__device__ inline Vec16 load16(const void* from) {
  const uint4 v = __ldg(static_cast<const uint4*>(from));
  return {{v.x, v.y, v.z, v.w}};
}

__device__ inline Vec16 load16_streaming(const void* from) {
  const uint4 v = __ldcs(static_cast<const uint4*>(from));
  return {{v.x, v.y, v.z, v.w}};
}

__device__ inline void copy16_async(void* shared, const void* from) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- the device and launching

struct DeviceInfo {
  int multiprocessors, major, minor;
  std::size_t shared_per_block;
};

inline DeviceInfo device_info() {
  int device = 0, shared = 0;
  DeviceInfo info{};
  MOEPRUNE_CUDA_CHECK(cudaGetDevice(&device));
  MOEPRUNE_CUDA_CHECK(cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  MOEPRUNE_CUDA_CHECK(cudaDeviceGetAttribute(&info.major, cudaDevAttrComputeCapabilityMajor, device));
  MOEPRUNE_CUDA_CHECK(cudaDeviceGetAttribute(&info.minor, cudaDevAttrComputeCapabilityMinor, device));
  MOEPRUNE_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  info.shared_per_block = static_cast<std::size_t>(shared);
  return info;
}

// Whether the device runs clusters of this kernel: a build for older chips only has code without them.
template <class... Parameters>
bool clusters_in(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  MOEPRUNE_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return device_info().major >= 9 && attributes.ptxVersion >= 90;
}

struct LaunchShape {
  dim3 grid;
  int threads;
  std::size_t dynamic_shared_bytes = 0;
  int cluster = 1;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream, const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "a launch carries at most 4 KiB of parameters");
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  // Without being asked the device gives 48 KiB, static memory included. The limit is the kernel's, for all
  // threads of the process, so it is raised as far as it goes.
  if (shape.dynamic_shared_bytes > 32 * 1024) {
    cudaFuncAttributes attributes;
    MOEPRUNE_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
    MOEPRUNE_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(device_info().shared_per_block - attributes.sharedSizeBytes)));
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.dynamic_shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  MOEPRUNE_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace moeprune
