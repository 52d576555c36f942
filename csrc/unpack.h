// An operation's arguments out of Python: torch tensors, read through their Python attributes, and numbers, all by
// name. Refuses what the kernels could not survive; friendly messages are the business of moeprune_ext/ops.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "tensor.h"

namespace moeprune {

namespace py = pybind11;

using DTypes = std::vector<DType>;
using Shape = std::vector<std::int64_t>;  // -1: any size

inline const DTypes kFloats = {DType::float32, DType::bfloat16, DType::float16};
inline const DTypes kAnyFloats = {DType::float32, DType::bfloat16, DType::float16, DType::float64};

inline DType dtype_of(const py::handle& tensor) {
  const std::string name = py::str(tensor.attr("dtype"));
  if (name == "torch.float32") return DType::float32;
  if (name == "torch.bfloat16") return DType::bfloat16;
  if (name == "torch.float16") return DType::float16;
  if (name == "torch.float64") return DType::float64;
  if (name == "torch.int32") return DType::int32;
  if (name == "torch.int64") return DType::int64;
  if (name == "torch.bool") return DType::boolean;
  throw std::invalid_argument("the compiled core does not know dtype " + name);
}

// None gives a TensorView that is not given().
inline TensorView view(const py::handle& tensor) {
  TensorView result;
  if (tensor.is_none()) return result;
  const auto shape = tensor.attr("shape").cast<Shape>();
  const auto stride = tensor.attr("stride")().cast<Shape>();
  if (shape.size() > 3) throw std::invalid_argument("the compiled core takes tensors of up to 3 dimensions");
  result.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<std::uintptr_t>());
  result.dtype = dtype_of(tensor);
  result.dim = static_cast<int>(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) {
    result.shape[i] = shape[i];
    result.stride[i] = stride[i];
  }
  const py::object device = tensor.attr("device");
  const auto type = device.attr("type").cast<std::string>();
  if (type == "cuda") {
    result.device = device.attr("index").cast<int>();
  } else if (type != "cpu") {
    throw std::invalid_argument("the compiled core works on CPU and CUDA tensors, got device " + type);
  }
  return result;
}

template <class T>
constexpr DType kDTypeOf = std::is_same_v<T, float>          ? DType::float32
                           : std::is_same_v<T, double>       ? DType::float64
                           : std::is_same_v<T, std::int32_t> ? DType::int32
                                                             : DType::int64;

// The keyword arguments of one call. A tensor that is left out counts as None, which only the methods named optional
// take; all tensors are on the device of the first.
class Unpacker {
 public:
  Unpacker(const char* operation, const py::kwargs& arguments) : operation_(operation), arguments_(arguments) {}

  bool given(const char* name) const { return !argument(name).is_none(); }

  template <class T>
  T number(const char* name) {
    const py::handle value = take(name);
    if (value.is_none()) fail(name, "is missing");
    return value.cast<T>();
  }

  // A tensor as it lies, of one of these dtypes.
  TensorView strided(const char* name, const DTypes& dtypes, const Shape& shape) {
    return required(name, optional_strided(name, dtypes, shape));
  }

  TensorView optional_strided(const char* name, const DTypes& dtypes, const Shape& shape) {
    return checked(take(name), name, dtypes, shape);
  }

  // The elements of a contiguous tensor of T.
  template <class T>
  T* contiguous(const char* name, const Shape& shape) {
    return static_cast<T*>(required(name, checked_contiguous<T>(take(name), name, shape)).data);
  }

  // nullptr where there is none.
  template <class T>
  T* optional_contiguous(const char* name, const Shape& shape) {
    return static_cast<T*>(checked_contiguous<T>(take(name), name, shape).data);
  }

  // A contiguous vector and its length.
  template <class T>
  T* vector(const char* name, std::int64_t& size) {
    const TensorView result = checked_contiguous<T>(take(name), name, {-1});
    size = result.shape[0];
    return static_cast<T*>(result.data);
  }

  // A list of `count` contiguous tensors, or None, of one shape.
  template <class T>
  void optional_list(const char* name, int count, const Shape& shape, T** results) {
    const auto tensors = number<std::vector<py::object>>(name);
    if (static_cast<int>(tensors.size()) != count) fail(name, "has the wrong length");
    for (int i = 0; i < count; ++i)
      results[i] = static_cast<T*>(checked_contiguous<T>(tensors[static_cast<std::size_t>(i)], name, shape).data);
  }

  // Refuses arguments that no one asked for.
  void finish() const {
    for (const auto& item : arguments_) {
      bool taken = false;
      for (const char* name : taken_) taken = taken || PyUnicode_CompareWithASCIIString(item.first.ptr(), name) == 0;
      if (!taken) fail(item.first.cast<std::string>().c_str(), "is not an argument");
    }
  }

  [[noreturn]] void fail(const char* name, const char* what) const {
    throw std::invalid_argument(std::string(operation_) + ": " + name + " " + what);
  }

  int device = -1;

 private:
  py::handle argument(const char* name) const {
    PyObject* value = PyDict_GetItemString(arguments_.ptr(), name);
    return value ? value : Py_None;
  }

  py::handle take(const char* name) {
    taken_.push_back(name);
    return argument(name);
  }

  TensorView required(const char* name, const TensorView& tensor) const {
    if (!tensor.given()) fail(name, "is missing");
    return tensor;
  }

  TensorView checked(const py::handle& tensor, const char* name, const DTypes& dtypes, const Shape& shape) {
    const TensorView result = view(tensor);
    if (!result.given()) return result;
    bool dtype_fits = false;
    for (DType dtype : dtypes) dtype_fits = dtype_fits || dtype == result.dtype;
    if (!dtype_fits) fail(name, "has the wrong dtype");
    if (result.dim != static_cast<int>(shape.size())) fail(name, "has the wrong number of dimensions");
    for (std::size_t i = 0; i < shape.size(); ++i)
      if (shape[i] >= 0 && result.shape[i] != shape[i]) fail(name, "has the wrong shape");
    if (first_) {
      device = result.device;
      first_ = false;
    } else if (result.device != device) {
      fail(name, "is on another device than the first tensor");
    }
    return result;
  }

  template <class T>
  TensorView checked_contiguous(const py::handle& tensor, const char* name, const Shape& shape) {
    const TensorView result = checked(tensor, name, {kDTypeOf<T>}, shape);
    if (result.given() && !tensor.attr("is_contiguous")().cast<bool>()) fail(name, "is not contiguous");
    return result;
  }

  const char* operation_;
  const py::kwargs& arguments_;
  std::vector<const char*> taken_;
  bool first_ = true;
};

}  // namespace moeprune
