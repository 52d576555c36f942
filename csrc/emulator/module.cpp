// What only the emulated module offers to Python: the emulation's settings, and small kernels with planted bugs
// (and their correct twins), by which the tests know that the emulation finds what it claims to find.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/primitives.cuh"

namespace py = pybind11;

namespace moeprune {
namespace {

using Kernel = void (*)(float*);

struct Row {
  float value[kThreads];
};

// Every thread reads what its mirror image wrote.
template <bool kBarrier>
__global__ void mirror(float* out) {
  auto& shared = block_shared<Row>().value;
  const unsigned i = threadIdx.x;
  shared[i] = static_cast<float>(i);
  if (kBarrier) __syncthreads();
  out[blockIdx.x * kThreads + i] = shared[kThreads - 1 - i];
}

__global__ void sum_within_warps(float* out) {
  float sum = static_cast<float>(threadIdx.x);
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  const double below = __shfl_down_sync(~0u, static_cast<double>(threadIdx.x % 32), 1);
  const int first = __shfl_sync(~0u, static_cast<int>(threadIdx.x), 0);
  const unsigned odd = __ballot_sync(~0u, threadIdx.x % 2);
  const bool right =
      odd == 0xAAAAAAAAu && first % 32 == 0 && below == (threadIdx.x % 32 == 31 ? 31 : threadIdx.x % 32 + 1);
  __syncwarp();
  out[blockIdx.x * kThreads + threadIdx.x] = right && __any_sync(~0u, first == 0) == (first == 0) ? sum : -1.0f;
}

// Every block reads the row that the next block of its cluster wrote.
template <bool kBarrierBefore, bool kBarrierAfter>
__global__ void neighbours(float* out) {
  auto& shared = block_shared<Row>().value;
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  shared[threadIdx.x] = static_cast<float>(i);
  if (kBarrierBefore) cluster_sync();
  const unsigned next = (cluster_rank() + 1) % cluster_size();
  out[i] = cluster_shared(shared, next)[threadIdx.x];
  if (kBarrierAfter) cluster_sync();
}

__global__ void dynamic(float* out) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[threadIdx.x] = 2;
  out[blockIdx.x * kThreads + threadIdx.x] = shared[threadIdx.x];
}

__global__ void uninitialised(float* out) {
  out[blockIdx.x * kThreads + threadIdx.x] = block_shared<Row>().value[threadIdx.x];
}

__global__ void beyond_shared(float*) { reinterpret_cast<float*>(dynamic_shared())[kThreads + threadIdx.x % 16] = 0; }

__global__ void misaligned(float* out) {
  const Vec16 read = load16(reinterpret_cast<const char*>(out) + 4 * (threadIdx.x == 7));
  if (read.word[0] == 1) out[0] = 1;
}

__global__ void barrier_for_half(float*) {
  if (threadIdx.x < kThreads / 2) __syncthreads();
}

__global__ void two_barriers(float*) {
  if (threadIdx.x < kThreads / 2)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void lane_missing(float* out) {
  if (threadIdx.x != 5) out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
}

__global__ void not_in_mask(float* out) { out[threadIdx.x] = __shfl_xor_sync(0xFFFFu, 1.0f, 1); }

__global__ void outside_mask(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xFFFFu, 1.0f, 16);
}

__global__ void stopped_block(float*) {
  if (cluster_rank() == 0) cluster_sync();
}

const std::map<std::string, Kernel> kKernels = {
    {"mirror", mirror<true>},
    {"mirror without barrier", mirror<false>},
    {"warps", sum_within_warps},
    {"neighbours", neighbours<true, true>},
    {"neighbours without barrier before", neighbours<false, true>},
    {"neighbours without barrier after", neighbours<true, false>},
    {"dynamic", dynamic},
    {"uninitialised", uninitialised},
    {"beyond shared", beyond_shared},
    {"misaligned", misaligned},
    {"barrier for half", barrier_for_half},
    {"two barriers", two_barriers},
    {"lane missing", lane_missing},
    {"not in mask", not_in_mask},
    {"outside mask", outside_mask},
    {"stopped block", stopped_block},
};

std::vector<float> run_kernel(const std::string& name, int blocks, int cluster) {
  const py::gil_scoped_release release;
  std::vector<float> out(static_cast<std::size_t>(blocks) * kThreads + 4, -2.0f);
  float* aligned = out.data();
  while (reinterpret_cast<std::uintptr_t>(aligned) % 16 != 0) ++aligned;
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), kThreads, sizeof(Row), cluster};
  launch(kKernels.at(name), shape, nullptr, aligned);
  return {aligned, aligned + blocks * kThreads};
}

}  // namespace

void add_emulator(py::module_& m) {
  m.def(
      "set_device",
      [](int major, int minor, int multiprocessors, std::size_t shared_per_block) {
        emulator::set_device({multiprocessors, major, minor, shared_per_block});
      },
      py::arg("major") = 9, py::arg("minor") = 0, py::arg("multiprocessors") = 132,
      py::arg("shared_per_block") = 227 * 1024);
  m.def("set_schedule", &emulator::set_schedule);
  m.def("run_kernel", &run_kernel, py::arg("name"), py::arg("blocks") = 1, py::arg("cluster") = 1);
}

}  // namespace moeprune
