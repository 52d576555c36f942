// Long rows as the CPU kernels read them: in blocks of whole steps, of any float dtype, at any stride.
#pragma once

#include "cpu/simd.h"

namespace moeprune::MOEPRUNE_ISA {

// A row of logits or outputs, any of the three float dtypes, any stride.
struct FloatRow {
  const char* data;
  DType dtype;
  std::int64_t stride;
  std::int64_t size;
};

MOEPRUNE_INLINE FloatRow row_of(const TensorView& tensor, std::int64_t offset) {
  const int last = tensor.dim - 1;
  const int bytes = tensor.dtype == DType::float32 ? 4 : 2;
  return {static_cast<const char*>(tensor.data) + offset * bytes, tensor.dtype, tensor.stride[last],
          tensor.shape[last]};
}

// Rows are walked in blocks, short enough for float32 partial sums and for a copy in the first-level cache;
// kStep is what the unrolled loops take at a time.
constexpr int kPair = 2 * kLanes, kStep = 2 * kPair;
constexpr int kBlock = kLanes > 4 ? 1024 : 512;
static_assert(kBlock % kStep == 0, "a full block is whole steps");

struct alignas(64) BlockBuffer {
  float element[kBlock];  // or of one of the other dtypes
};

MOEPRUNE_INLINE int rounded_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

MOEPRUNE_INLINE int block_size(const FloatRow& row, std::int64_t start) {
  return row.size - start < kBlock ? static_cast<int>(row.size - start) : kBlock;
}

template <class T>
MOEPRUNE_INLINE const T* elements(const FloatRow& row, std::int64_t start) {
  return reinterpret_cast<const T*>(row.data) + start * row.stride;
}

// What the elements after a row's last count as: nothing, in a sum of exponentials or of squares.
enum class Padding { minus_infinity, zero };

MOEPRUNE_INLINE void pad(float& x, Padding padding) { x = padding == Padding::zero ? 0.0f : -__builtin_inff(); }
MOEPRUNE_INLINE void pad(BFloat16& x, Padding padding) { x.bits = padding == Padding::zero ? 0 : 0xFF80; }
MOEPRUNE_INLINE void pad(Float16& x, Padding padding) { x.bits = padding == Padding::zero ? 0 : 0xFC00; }

// Elements [start, start + n) of a row, padded to whole steps: in place where they can be loaded as they lie,
// otherwise copied to the buffer.
template <class T>
MOEPRUNE_INLINE const T* whole_steps(const FloatRow& row, std::int64_t start, int n, Padding padding,
                                     BlockBuffer& buffer) {
  const T* from = elements<T>(row, start);
  if (row.stride == 1 && n % kStep == 0) return from;
  T* to = reinterpret_cast<T*>(buffer.element);
  if (row.stride == 1) {
    __builtin_memcpy(to, from, static_cast<std::size_t>(n) * sizeof(T));
  } else {
    for (int i = 0; i < n; ++i) to[i] = from[i * row.stride];
  }
  for (int i = n; i < rounded_up(n, kStep); ++i) pad(to[i], padding);
  return to;
}

// The same as float32, whatever the dtype, in the order of memory.
MOEPRUNE_INLINE const float* converted(const FloatRow& row, std::int64_t start, int n, Padding padding,
                                       BlockBuffer& buffer) {
  if (row.dtype == DType::float32) return whole_steps<float>(row, start, n, padding, buffer);
  for (int i = 0; i < n; ++i)
    buffer.element[i] = row.dtype == DType::bfloat16 ? to_float(elements<BFloat16>(row, start)[i * row.stride])
                                                     : to_float(elements<Float16>(row, start)[i * row.stride]);
  for (int i = n; i < rounded_up(n, kStep); ++i) pad(buffer.element[i], padding);
  return buffer.element;
}

// body(x, size) on elements [start, start + n) of a row, padded to `size`, x a pointer to the row's dtype, or to
// float32 where pairs of loads are to come in the order of memory.
template <class Body>
MOEPRUNE_INLINE void with_block(const FloatRow& row, std::int64_t start, int n, Padding padding, BlockBuffer& buffer,
                                const Body& body, bool in_order = false) {
  const int size = rounded_up(n, kStep);
  if (row.dtype == DType::float32 || (in_order && row.dtype == DType::bfloat16)) {
    body(converted(row, start, n, padding, buffer), size);
  } else if (row.dtype == DType::bfloat16) {
    body(whole_steps<BFloat16>(row, start, n, padding, buffer), size);
  } else {
    body(whole_steps<Float16>(row, start, n, padding, buffer), size);
  }
}

// body(x, y, size) likewise on the same elements of two rows; rows of different dtypes come as float32.
template <class Body>
MOEPRUNE_INLINE void with_blocks(const FloatRow& a, const FloatRow& b, std::int64_t start, int n, Padding padding,
                                 BlockBuffer& buffer_a, BlockBuffer& buffer_b, const Body& body) {
  const int size = rounded_up(n, kStep);
  if (a.dtype != b.dtype) {
    body(converted(a, start, n, padding, buffer_a), converted(b, start, n, padding, buffer_b), size);
  } else if (a.dtype == DType::float32) {
    body(whole_steps<float>(a, start, n, padding, buffer_a), whole_steps<float>(b, start, n, padding, buffer_b), size);
  } else if (a.dtype == DType::bfloat16) {
    body(whole_steps<BFloat16>(a, start, n, padding, buffer_a), whole_steps<BFloat16>(b, start, n, padding, buffer_b),
         size);
  } else {
    body(whole_steps<Float16>(a, start, n, padding, buffer_a), whole_steps<Float16>(b, start, n, padding, buffer_b),
         size);
  }
}

}  // namespace moeprune::MOEPRUNE_ISA
