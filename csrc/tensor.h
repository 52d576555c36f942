// TensorView: what the kernels see of a tensor. A plain struct, because the kernels link neither libtorch nor
// Python and are compiled for several instruction sets, where shared inline code would be a hazard: the
// linker keeps one copy of it, possibly one that this processor cannot run.
#pragma once

#include <cstdint>

namespace moeprune {

enum class DType : int { float32, bfloat16, float16, float64, int32, int64, boolean };

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::float32;
  int dim = -1;  // -1: no tensor was given
  std::int64_t shape[3] = {0, 0, 0};
  std::int64_t stride[3] = {0, 0, 0};  // in elements
  int device = -1;                     // -1: CPU; otherwise the CUDA device's index

  constexpr bool given() const { return dim >= 0; }  // constexpr: CUDA device code calls it too
};

}  // namespace moeprune
