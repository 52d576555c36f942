// The part of CUDA that the kernels use, for a plain C++ compiler: the same .cu files then run on the CPU, one
// fiber per CUDA thread, so that their arithmetic, barriers and edges are tested where there is no GPU. A test
// tool; what it cannot show is timing, the memory model and what only the hardware's approximations change.
//
// It throws std::runtime_error out of launch() for what a GPU would answer with a crash, a hang or garbage:
//   - a barrier or warp operation that some of its threads never reach, or reach at another line;
//   - a 16-byte load from an address that is not a multiple of 16;
//   - writes just beyond shared memory, more shared memory than the device has, shapes no device launches.
// Shared memory starts out as NaN (all bits set), and set_schedule() changes the order in which threads and
// blocks run, so that a missing barrier or initialisation shows up as a wrong result. Accesses beyond a tensor are
// found when it is compiled with -fsanitize=address,undefined --param asan-stack=0 (the stacks are the fibers') and
// libasan is preloaded into Python.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace moeprune {

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

struct DeviceInfo {
  int multiprocessors = 132;
  int major = 9, minor = 0;
  std::size_t shared_per_block = 227 * 1024;
};

struct LaunchShape;

namespace emulator {

void set_device(const DeviceInfo& info);
// 0: threads and blocks run in ascending order, 1: descending, other seeds: shuffled anew after every barrier.
void set_schedule(std::uint64_t seed);

// Where a thread waits: the operation and the source line, on which all its threads must agree.
struct Place {
  const char* operation;
  const char* file;
  int line;
};

void meet_block(Place place);
void meet_cluster(Place place);
// Waits for the lanes of the mask. Returns what lane `source` brought, or everyone's bits where source is -1.
std::uint64_t meet_warp(Place place, unsigned mask, std::uint64_t brought, int source);

int lane();
unsigned rank_in_cluster();
unsigned blocks_in_cluster();
void* static_shared(const void* key, std::size_t size, std::size_t alignment);
char* dynamic_shared();
void* shared_of_rank(void* mine, unsigned rank);
[[noreturn]] void fail(const std::string& what);
void run(const LaunchShape& shape, const std::function<void()>& thread);

template <class T>
T shuffle(Place place, unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "the warp exchanges 32 or 64 bits");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = meet_warp(place, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

DeviceInfo device_info();

// ---- barriers and warps; file and line are the caller's

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::meet_block({"__syncthreads", file, line});
}

inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::meet_warp({"__syncwarp", file, line}, mask, 0, emulator::lane());
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return emulator::shuffle({"__shfl_sync", file, line}, mask, value, source & 31);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return emulator::shuffle({"__shfl_xor_sync", file, line}, mask, value, emulator::lane() ^ (lanes & 31));
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  const int source = emulator::lane() + static_cast<int>(lanes & 31);
  return emulator::shuffle({"__shfl_down_sync", file, line}, mask, value, source < 32 ? source : emulator::lane());
}

inline unsigned __ballot_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  const std::uint64_t bit = predicate ? std::uint64_t{1} << emulator::lane() : 0;
  return static_cast<unsigned>(emulator::meet_warp({"__ballot_sync", file, line}, mask, bit, -1));
}

inline int __any_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return emulator::meet_warp({"__any_sync", file, line}, mask, predicate != 0, -1) != 0;
}

// ---- clusters and shared memory; cuda/primitives.cuh says what they promise

inline unsigned cluster_rank() { return emulator::rank_in_cluster(); }
inline unsigned cluster_size() { return emulator::blocks_in_cluster(); }
inline void cluster_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::meet_cluster({"cluster_sync", file, line});
}

template <class T>
T* cluster_shared(T* mine, unsigned rank) {
  return static_cast<T*>(emulator::shared_of_rank(mine, rank));
}

template <class T>
T& block_shared() {
  static_assert(std::is_trivially_default_constructible_v<T>, "shared memory has no constructors");
  static char key;  // its address stands for T
  return *static_cast<T*>(emulator::static_shared(&key, sizeof(T), alignof(T)));
}

inline char* dynamic_shared() { return emulator::dynamic_shared(); }

// ---- bits, numbers, loads and stores

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same bits, same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }

inline float fast_exp2(float x) {
  const float result = exp2f(x);
  return result < 0x1p-126f ? 0.0f : result;  // false for NaN
}

inline float min_or_nan(float a, float b) { return a != a ? a : b != b ? b : a < b ? a : b; }

inline float float16_to_float(std::uint16_t bits) {
  const unsigned sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7FFFu) << 13;
  // 2^112 moves the exponent's bias from 15 to 127, for subnormal numbers too.
  const float value =
      (bits & 0x7C00u) == 0x7C00u ? __uint_as_float(0x7F800000u | magnitude) : __uint_as_float(magnitude) * 0x1p112f;
  return __uint_as_float(__float_as_uint(value) | sign);
}

inline float round_to_float16(float x) {
  if (x != x) return x;
  if (fabsf(x) >= 65520.0f) return copysignf(INFINITY, x);
  int exponent = static_cast<int>(__float_as_uint(x) >> 23 & 0xFF) - 127;
  if (exponent < -14) exponent = -14;  // subnormal numbers share the smallest exponent
  const float unit = ldexpf(1.0f, exponent - 10);
  return rintf(x / unit) * unit;
}

struct alignas(16) Vec16 {
  std::uint32_t word[4];
};

inline Vec16 load16(const void* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) emulator::fail("loads 16 bytes from a misaligned address");
  Vec16 result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline Vec16 load16_streaming(const void* from) { return load16(from); }

// Done at once; that a kernel waits before it reads is not checked.
inline void copy16_async(void* shared, const void* from) {
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0) emulator::fail("copies 16 bytes to a misaligned address");
  *static_cast<Vec16*>(shared) = load16(from);
}

inline void wait_for_copies() {}

template <class T>
T __ldg(const T* from) {
  return *from;
}

// ---- launching

template <class... Parameters>
bool clusters_in(void (*)(Parameters...)) {
  return device_info().major >= 9;
}

struct LaunchShape {
  dim3 grid;
  int threads;
  std::size_t dynamic_shared_bytes = 0;
  int cluster = 1;
};

// Runs the whole grid before it returns.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* /*stream*/, const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "a launch carries at most 4 KiB of parameters");
  emulator::run(shape, [&] { kernel(arguments...); });
}

}  // namespace moeprune
