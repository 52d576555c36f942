// The Python module moeprune_ext._C: unpacks an operation's keyword arguments, checks what would otherwise be a crash,
// and runs the kernel for the tensors' device. moeprune_ext/ops is the only caller, and says what arguments mean.
//
// With MOEPRUNE_CUDA_EMULATED it is the test module moeprune_ext._C_emulated instead (isa.h).
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "mapped_router.h"
#include "masked_router.h"
#include "overlap.h"
#include "routing_moments.h"
#include "unpack.h"

using namespace moeprune;

#if defined(MOEPRUNE_CUDA_EMULATED)
namespace moeprune {
void add_emulator(py::module_& m);  // emulator/module.cpp
}
#endif

namespace {

const Kernels<OverlapArgs> overlap_kernels MOEPRUNE_KERNELS(overlap);
const Kernels<LogSumExpArgs> log_sum_exp_kernels MOEPRUNE_KERNELS(log_sum_exp);
const Kernels<MaskedRouterArgs> masked_router_kernels MOEPRUNE_KERNELS(masked_router);
const Kernels<MappedRouterArgs> mapped_router_kernels MOEPRUNE_KERNELS(mapped_router);
const Kernels<RoutingMomentsArgs> routing_moments_kernels MOEPRUNE_KERNELS(routing_moments);

// The arguments of an operation, by name: what they mean stands in its header.

void overlap(const py::kwargs& arguments) {
  Unpacker unpack("overlap", arguments);
  OverlapArgs args{};
  args.p = unpack.strided("p_logits", kFloats, {-1, -1});
  const std::int64_t rows = args.p.shape[0];
  args.q = unpack.strided("q_logits", kFloats, {-1, rows, args.p.shape[1]});
  args.p_lse = unpack.optional_contiguous<double>("p_lse", {rows});
  args.weight = unpack.optional_contiguous<double>("weight", {rows});
  args.labels = unpack.optional_contiguous<std::int64_t>("labels", {rows});
  args.uniform = unpack.optional_contiguous<double>("uniform", {rows});
  args.workspace = unpack.vector<float>("workspace", args.workspace_size);
  unpack.optional_list<float>("out", kMetrics, {args.q.shape[0], rows}, args.out);
  args.threads = unpack.number<int>("threads");
  unpack.finish();
  if (rows == 0 || args.q.shape[0] == 0) return;
  if ((args.out[kNll] && !args.labels) || (args.out[kAccept] && !args.uniform))
    throw std::invalid_argument("overlap: nll needs labels and accept needs uniform");
  overlap_kernels(args, unpack.device);
}

void log_sum_exp(const py::kwargs& arguments) {
  Unpacker unpack("log_sum_exp", arguments);
  LogSumExpArgs args{};
  args.logits = unpack.strided("logits", kFloats, {-1, -1});
  args.lse = unpack.contiguous<double>("lse", {args.logits.shape[0]});
  args.threads = unpack.number<int>("threads");
  unpack.finish();
  if (args.logits.shape[0] > 0) log_sum_exp_kernels(args, unpack.device);
}

// What both routers take, but the logits. `slots`: of the answers, unless rows are assigned; -1 for any number.
void unpack_router(Unpacker& unpack, RouterArgs& args, std::int64_t slots) {
  const std::int64_t rows = args.logits.shape[0];
  args.assigned = unpack.optional_contiguous<std::int64_t>("assigned", {rows});
  args.top_k = unpack.number<int>("top_k");
  args.score = static_cast<Score>(unpack.number<int>("score"));
  args.renormalize = unpack.number<bool>("renormalize");
  args.eps = unpack.number<float>("eps");
  args.scale = unpack.number<float>("scale");
  args.weights_dtype = static_cast<DType>(unpack.number<int>("weights_dtype"));
  if (unpack.given("assigned")) slots = 1;
  args.ids = unpack.contiguous<std::int64_t>("ids", {slots, rows, args.top_k});
  args.weights = unpack.contiguous<float>("weights", {slots, rows, args.top_k});
  args.threads = unpack.number<int>("threads");
}

TensorView router_logits(Unpacker& unpack) {
  const TensorView logits = unpack.strided("logits", kFloats, {-1, -1});
  if (logits.shape[1] > kMaxExperts) unpack.fail("logits", "has too many experts");
  return logits;
}

void masked_router(const py::kwargs& arguments) {
  Unpacker unpack("masked_router", arguments);
  MaskedRouterArgs args{};
  args.logits = router_logits(unpack);
  const std::int64_t n_experts = args.logits.shape[1];
  unpack_router(unpack, args, -1);
  const TensorView stops = unpack.strided("stops", {DType::int32}, {-1, -1});
  args.n_walks = stops.shape[0];
  args.n_stops = stops.shape[1];
  args.stops = unpack.contiguous<std::int32_t>("stops", {args.n_walks, args.n_stops});
  args.slots = unpack.contiguous<std::int32_t>("slots", {args.n_walks, args.n_stops});
  args.lists = unpack.contiguous<std::int32_t>("lists", {args.n_walks, n_experts});
  args.bias = unpack.optional_contiguous<float>("correction_bias", {n_experts});
  args.n_group = unpack.number<int>("n_group");
  args.topk_group = unpack.number<int>("topk_group");
  args.group_top2_sum = unpack.number<bool>("group_top2_sum");
  unpack.finish();
  if (args.logits.shape[0] > 0 && args.n_walks > 0 && args.n_stops > 0) masked_router_kernels(args, unpack.device);
}

void mapped_router(const py::kwargs& arguments) {
  Unpacker unpack("mapped_router", arguments);
  MappedRouterArgs args{};
  args.logits = router_logits(unpack);
  const std::int64_t n_experts = args.logits.shape[1];
  args.maps = unpack.strided("maps", {DType::float32}, {-1, -1, n_experts});
  const std::int64_t candidates = args.maps.shape[0], kept = args.maps.shape[1];
  unpack_router(unpack, args, candidates);
  if (args.top_k < 1 || args.top_k > kept || kept > n_experts)
    throw std::invalid_argument("mapped_router: needs 1 <= top_k <= rows of the map <= experts");
  args.experts = unpack.contiguous<std::int32_t>("experts", {candidates, n_experts});
  args.counts = unpack.contiguous<std::int32_t>("counts", {candidates});
  args.mapped_bias = unpack.optional_contiguous<float>("mapped_bias", {candidates, kept});
  unpack.finish();
  if (args.logits.shape[0] > 0 && candidates > 0) mapped_router_kernels(args, unpack.device);
}

void routing_moments(const py::kwargs& arguments) {
  Unpacker unpack("routing_moments_", arguments);
  RoutingMomentsArgs args{};
  args.ids = unpack.strided("expert_ids", {DType::int32, DType::int64}, {-1});
  const std::int64_t pairs = args.ids.shape[0];
  args.max_norm = unpack.vector<float>("max_norm", args.n_experts);
  args.moments = unpack.contiguous<double>("moments", {args.n_experts, 3, 3});
  args.gates = unpack.strided("gates", kAnyFloats, {pairs});
  args.outputs = unpack.optional_strided("outputs", kFloats, {pairs, -1});
  args.norms = unpack.optional_strided("norms", kAnyFloats, {pairs});
  args.valid = unpack.optional_strided("valid", {DType::boolean}, {pairs});
  args.workspace = unpack.vector<double>("workspace", args.workspace_size);
  args.threads = unpack.number<int>("threads");
  unpack.finish();
  if (pairs == 0) return;
  if (args.workspace_size < 1 || args.outputs.given() == args.norms.given())
    throw std::invalid_argument("routing_moments_: needs a workspace, and either outputs or norms");
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
