// The Python module moeprune_ext._C: reads torch tensors through their Python attributes, checks what would
// otherwise be a crash, picks the kernel by device and instruction set. Meaning and friendly messages are the
// business of moeprune_ext/ops.py, the only caller.
//
// With MOEPRUNE_CUDA_EMULATED it is the test module moeprune_ext._C_emulated instead, which has no CPU kernels:
// there the CUDA kernels, emulated, take the tensors of the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "mapped_router.h"
#include "masked_router.h"
#include "overlap.h"
#include "routing_moments.h"
#if defined(MOEPRUNE_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;
using namespace moeprune;

#if defined(MOEPRUNE_CUDA_EMULATED)
namespace moeprune {
void add_emulator(py::module_& m);  // emulator/module.cpp
}
#endif

namespace {

#if !defined(MOEPRUNE_CUDA_EMULATED)
// ---- instruction sets

enum class Isa { portable, avx2, avx512 };
const char* const kIsaNames[] = {"portable", "avx2", "avx512"};

bool supported(Isa isa) {
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

Isa isa_named(const std::string& name) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
    if (name == kIsaNames[static_cast<int>(isa)]) {
      if (supported(isa)) return isa;
      throw std::invalid_argument("this processor cannot run instruction set '" + name + "'");
    }
  throw std::invalid_argument("unknown instruction set '" + name + "'; expected portable, avx2 or avx512");
}

Isa initial_isa() {
  if (const char* wanted = std::getenv("MOEPRUNE_ISA"); wanted && *wanted) return isa_named(wanted);
  return supported(Isa::avx512) ? Isa::avx512 : supported(Isa::avx2) ? Isa::avx2 : Isa::portable;
}

std::atomic<Isa>& current_isa() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

#endif

// ---- tensors

DType dtype_of(const py::handle& tensor) {
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

TensorView view(const py::handle& tensor) {
  TensorView result;
  if (tensor.is_none()) return result;
  const auto shape = tensor.attr("shape").cast<std::vector<std::int64_t>>();
  const auto stride = tensor.attr("stride")().cast<std::vector<std::int64_t>>();
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

// Collects an operation's tensors and refuses what the kernels could not survive.
class Unpacker {
 public:
  explicit Unpacker(const char* operation) : operation_(operation) {}

  TensorView strided(const py::handle& tensor, const char* name, std::vector<DType> dtypes,
                     std::vector<std::int64_t> shape) {
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
  T* contiguous(const py::handle& tensor, const char* name, DType dtype, std::vector<std::int64_t> shape) {
    const TensorView result = strided(tensor, name, {dtype}, std::move(shape));
    if (result.given() && !tensor.attr("is_contiguous")().cast<bool>()) fail(name, "is not contiguous");
    return static_cast<T*>(result.data);
  }

  int device = -1;

 private:
  [[noreturn]] void fail(const char* name, const char* what) const {
    throw std::invalid_argument(std::string(operation_) + ": " + name + " " + what);
  }

  const char* operation_;
  bool first_ = true;
};

const std::vector<DType> kFloats = {DType::float32, DType::bfloat16, DType::float16};

// ---- kernels

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

// One operation's kernels, called with the GIL released.
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
const Kernels<OverlapArgs> overlap_kernels MOEPRUNE_KERNELS(overlap);
const Kernels<LogSumExpArgs> log_sum_exp_kernels MOEPRUNE_KERNELS(log_sum_exp);
const Kernels<MaskedRouterArgs> masked_router_kernels MOEPRUNE_KERNELS(masked_router);
const Kernels<MappedRouterArgs> mapped_router_kernels MOEPRUNE_KERNELS(mapped_router);
const Kernels<RoutingMomentsArgs> routing_moments_kernels MOEPRUNE_KERNELS(routing_moments);

// ---- operations

void overlap(const py::object& p, const py::object& q, const py::object& p_lse, const py::object& weight,
             const py::object& labels, const py::object& uniform, const py::object& workspace,
             const std::vector<py::object>& out, int threads) {
  Unpacker unpack("overlap");
  OverlapArgs args{};
  args.p = unpack.strided(p, "p_logits", kFloats, {-1, -1});
  const std::int64_t rows = args.p.shape[0];
  args.q = unpack.strided(q, "q_logits", kFloats, {-1, rows, args.p.shape[1]});
  args.p_lse = unpack.contiguous<double>(p_lse, "p_lse", DType::float64, {rows});
  args.weight = unpack.contiguous<double>(weight, "weight", DType::float64, {rows});
  args.labels = unpack.contiguous<std::int64_t>(labels, "labels", DType::int64, {rows});
  args.uniform = unpack.contiguous<double>(uniform, "uniform", DType::float64, {rows});
  args.workspace = unpack.contiguous<float>(workspace, "workspace", DType::float32, {-1});
  if (args.workspace) args.workspace_size = view(workspace).shape[0];
  if (out.size() != kMetrics) throw std::invalid_argument("overlap: one output or None per metric");
  for (int metric = 0; metric < kMetrics; ++metric)
    args.out[metric] = unpack.contiguous<float>(out[metric], "out", DType::float32, {args.q.shape[0], rows});
  if (rows == 0 || args.q.shape[0] == 0) return;
  if ((args.out[kNll] && !args.labels) || (args.out[kAccept] && !args.uniform))
    throw std::invalid_argument("overlap: nll needs labels and accept needs uniform");
  args.threads = threads;
  overlap_kernels(args, unpack.device);
}

void log_sum_exp(const py::object& logits, const py::object& lse, int threads) {
  Unpacker unpack("log_sum_exp");
  LogSumExpArgs args{};
  args.logits = unpack.strided(logits, "logits", kFloats, {-1, -1});
  args.lse = unpack.contiguous<double>(lse, "lse", DType::float64, {args.logits.shape[0]});
  if (args.logits.shape[0] == 0) return;
  args.threads = threads;
  log_sum_exp_kernels(args, unpack.device);
}

void masked_router(const py::object& logits, const py::object& lists, const py::object& stops, const py::object& slots,
                   const py::object& assigned, int top_k, int score, bool renormalize, float eps, float scale,
                   const py::object& bias, int n_group, int topk_group, bool group_top2_sum, const py::object& ids,
                   const py::object& weights, int weights_dtype, int threads) {
  Unpacker unpack("masked_router");
  MaskedRouterArgs args{};
  args.logits = unpack.strided(logits, "logits", kFloats, {-1, -1});
  const std::int64_t rows = args.logits.shape[0], n_experts = args.logits.shape[1];
  if (n_experts > kMaxExperts) throw std::invalid_argument("masked_router: too many experts");
  args.lists = unpack.contiguous<std::int32_t>(lists, "lists", DType::int32, {-1, n_experts});
  const TensorView stops_view = unpack.strided(stops, "stops", {DType::int32}, {-1, -1});
  args.n_walks = stops_view.shape[0];
  args.n_stops = stops_view.shape[1];
  args.stops = unpack.contiguous<std::int32_t>(stops, "stops", DType::int32, {args.n_walks, args.n_stops});
  args.slots = unpack.contiguous<std::int32_t>(slots, "slots", DType::int32, {args.n_walks, args.n_stops});
  args.assigned = unpack.contiguous<std::int64_t>(assigned, "assigned", DType::int64, {rows});
  args.top_k = top_k;
  args.score = static_cast<Score>(score);
  args.renormalize = renormalize;
  args.eps = eps;
  args.scale = scale;
  args.bias = unpack.contiguous<float>(bias, "correction_bias", DType::float32, {n_experts});
  args.n_group = n_group;
  args.topk_group = topk_group;
  args.group_top2_sum = group_top2_sum;
  args.weights_dtype = static_cast<DType>(weights_dtype);
  args.ids = unpack.contiguous<std::int64_t>(ids, "ids", DType::int64, {-1, rows, top_k});
  args.weights = unpack.contiguous<float>(weights, "weights", DType::float32, {-1, rows, top_k});
  if (rows == 0 || args.n_walks == 0 || args.n_stops == 0) return;
  args.threads = threads;
  masked_router_kernels(args, unpack.device);
}

void mapped_router(const py::object& logits, const py::object& maps, const py::object& experts,
                   const py::object& counts, const py::object& mapped_bias, const py::object& assigned, int top_k,
                   int score, bool renormalize, float eps, float scale, const py::object& ids,
                   const py::object& weights, int weights_dtype, int threads) {
  Unpacker unpack("mapped_router");
  MappedRouterArgs args{};
  args.logits = unpack.strided(logits, "logits", kFloats, {-1, -1});
  const std::int64_t rows = args.logits.shape[0], n_experts = args.logits.shape[1];
  if (n_experts > kMaxExperts) throw std::invalid_argument("mapped_router: too many experts");
  args.maps = unpack.strided(maps, "router_map", {DType::float32}, {-1, -1, n_experts});
  const std::int64_t candidates = args.maps.shape[0], kept = args.maps.shape[1];
  if (top_k < 1 || top_k > kept || kept > n_experts)
    throw std::invalid_argument("mapped_router: needs 1 <= top_k <= rows of the map <= experts");
  args.experts = unpack.contiguous<std::int32_t>(experts, "experts", DType::int32, {candidates, n_experts});
  args.counts = unpack.contiguous<std::int32_t>(counts, "counts", DType::int32, {candidates});
  args.mapped_bias = unpack.contiguous<float>(mapped_bias, "mapped_bias", DType::float32, {candidates, kept});
  args.assigned = unpack.contiguous<std::int64_t>(assigned, "assigned", DType::int64, {rows});
  args.top_k = top_k;
  args.score = static_cast<Score>(score);
  args.renormalize = renormalize;
  args.eps = eps;
  args.scale = scale;
  args.weights_dtype = static_cast<DType>(weights_dtype);
  const std::int64_t slots = assigned.is_none() ? candidates : 1;
  args.ids = unpack.contiguous<std::int64_t>(ids, "ids", DType::int64, {slots, rows, top_k});
  args.weights = unpack.contiguous<float>(weights, "weights", DType::float32, {slots, rows, top_k});
  if (rows == 0 || candidates == 0) return;
  args.threads = threads;
  mapped_router_kernels(args, unpack.device);
}

void routing_moments(const py::object& moments, const py::object& max_norm, const py::object& ids,
                     const py::object& gates, const py::object& outputs, const py::object& norms,
                     const py::object& valid, const py::object& workspace, int threads) {
  Unpacker unpack("routing_moments_");
  const std::vector<DType> any_float = {DType::float32, DType::bfloat16, DType::float16, DType::float64};
  RoutingMomentsArgs args{};
  args.ids = unpack.strided(ids, "expert_ids", {DType::int32, DType::int64}, {-1});
  const std::int64_t pairs = args.ids.shape[0];
  args.max_norm = unpack.contiguous<float>(max_norm, "max_norm", DType::float32, {-1});
  args.n_experts = view(max_norm).shape[0];
  args.moments = unpack.contiguous<double>(moments, "moments", DType::float64, {args.n_experts, 3, 3});
  args.gates = unpack.strided(gates, "gates", any_float, {pairs});
  args.outputs = unpack.strided(outputs, "outputs", kFloats, {pairs, -1});
  args.norms = unpack.strided(norms, "norms", any_float, {pairs});
  args.valid = unpack.strided(valid, "valid", {DType::boolean}, {pairs});
  args.workspace = unpack.contiguous<double>(workspace, "workspace", DType::float64, {-1});
  args.workspace_size = view(workspace).shape[0];
  if (pairs == 0) return;
  if (args.workspace_size < 1 || outputs.is_none() == norms.is_none())
    throw std::invalid_argument("routing_moments_: needs a workspace, and either outputs or norms");
  args.threads = threads;
  routing_moments_kernels(args, unpack.device);
}

py::dict build_info() {
  py::dict info;
  py::list archs, isas;
  info["version"] = MOEPRUNE_VERSION;
  info["cuda_runtime"] = py::none();
  info["cuda_available"] = false;
#if defined(MOEPRUNE_CUDA)
  info["cuda"] = true;
  archs = py::str(MOEPRUNE_CUDA_ARCHS).attr("split")(",");
  info["cuda_runtime"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  int devices = 0;
  info["cuda_available"] = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
#else
  info["cuda"] = false;
#endif
  info["cuda_archs"] = archs;
#if defined(MOEPRUNE_CUDA_EMULATED)
  info["cpu_isa"] = "cuda-emulated";
#else
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
    if (supported(isa)) isas.append(kIsaNames[static_cast<int>(isa)]);
  info["cpu_isa"] = kIsaNames[static_cast<int>(current_isa().load())];
#endif
  info["cpu_isas"] = isas;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["compiler"] = MOEPRUNE_COMPILER;
  return info;
}

}  // namespace

PYBIND11_MODULE(MOEPRUNE_MODULE, m) {
  m.doc() = "The compiled core of moeprune_ext; use it through moeprune_ext.ops";
  m.attr("MAX_EXPERTS") = kMaxExperts;
  m.def("build_info", &build_info);
#if defined(MOEPRUNE_CUDA_EMULATED)
  add_emulator(m);
#else
  current_isa();  // an unusable MOEPRUNE_ISA fails the import, not the first call
  m.def("set_isa", [](const std::string& name) { current_isa() = isa_named(name); });
#endif
  m.def("overlap", &overlap);
  m.def("log_sum_exp", &log_sum_exp);
  m.def("masked_router", &masked_router);
  m.def("mapped_router", &mapped_router);
  m.def("routing_moments", &routing_moments);
}
