// Which of an operation's kernels runs: by the tensors' device and, on the CPU, by instruction set. The best one that
// the processor has is chosen at run time, so that a wheel built on a new machine runs on an old one.
//
// With MOEPRUNE_CUDA_EMULATED there are no CPU kernels: the CUDA kernels, emulated, take the tensors of the CPU.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#if defined(MOEPRUNE_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace moeprune {

namespace py = pybind11;

#if !defined(MOEPRUNE_CUDA_EMULATED)
enum class Isa { portable, avx2, avx512 };
inline constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512"};

inline bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return isa == Isa::portable;
}

inline Isa isa_named(const std::string& name) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
    if (name == kIsaNames[static_cast<int>(isa)]) {
      if (supported(isa)) return isa;
      throw std::invalid_argument("this processor cannot run instruction set '" + name + "'");
    }
  throw std::invalid_argument("unknown instruction set '" + name + "'; expected portable, avx2 or avx512");
}

// The best that this processor can run, unless the environment names one.
inline Isa initial_isa() {
  if (const char* wanted = std::getenv("MOEPRUNE_ISA"); wanted && *wanted) return isa_named(wanted);
  return supported(Isa::avx512) ? Isa::avx512 : supported(Isa::avx2) ? Isa::avx2 : Isa::portable;
}

// What the next call runs on.
inline std::atomic<Isa>& current_isa() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

#endif

#if defined(MOEPRUNE_CUDA)
// Makes the tensors' device current for the scope and finds torch's current stream on it.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    const py::module_ cuda = py::module_::import("torch.cuda");
    stream = reinterpret_cast<void*>(cuda.attr("current_stream")(device).attr("cuda_stream").cast<std::uintptr_t>());
    // torch restores the device before, without making a context on one that was never used.
    guard_ = cuda.attr("device")(device);
    guard_.attr("__enter__")();
    const cudaError_t status = cudaSetDevice(device);  // our own copy of the runtime is told too
    if (status == cudaSuccess) return;
    leave();
    throw std::runtime_error(cudaGetErrorString(status));
  }
  ~OnDevice() { leave(); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  void* stream;

 private:
  void leave() noexcept {
    try {
      guard_.attr("__exit__")(py::none(), py::none(), py::none());
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("moeprune_ext: back to the device before");
    }
  }

  py::object guard_;
};
#endif

// One operation's kernels, by instruction set and for CUDA, called with the GIL released.
template <class Args>
struct Kernels {
  using Function = void (*)(const Args&);
#if !defined(MOEPRUNE_CUDA_EMULATED)
  Function portable, avx2, avx512;
#endif
  Function cuda;

  void operator()(Args& args, [[maybe_unused]] int device) const {
#if !defined(MOEPRUNE_CUDA_EMULATED)
    if (device < 0) {
      py::gil_scoped_release release;
      const Isa isa = current_isa();
      return (isa == Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : portable)(args);
    }
#endif
#if defined(MOEPRUNE_CUDA)
    const OnDevice guard(device);
    args.stream = guard.stream;
#endif
    if (!cuda) throw std::invalid_argument("this build of moeprune_ext has no CUDA kernels");
    py::gil_scoped_release release;
    cuda(args);
  }
};

#if defined(MOEPRUNE_CUDA_EMULATED)
#define MOEPRUNE_CPU_KERNELS(name)
#elif defined(__x86_64__)
#define MOEPRUNE_CPU_KERNELS(name) portable::name, avx2::name, avx512::name,
#else
#define MOEPRUNE_CPU_KERNELS(name) portable::name, nullptr, nullptr,
#endif
#if defined(MOEPRUNE_CUDA) || defined(MOEPRUNE_CUDA_EMULATED)
#define MOEPRUNE_KERNELS(name) {MOEPRUNE_CPU_KERNELS(name) name##_cuda}
#else
#define MOEPRUNE_KERNELS(name) {MOEPRUNE_CPU_KERNELS(name) nullptr}
#endif

}  // namespace moeprune
