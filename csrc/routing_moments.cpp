// routing_moments on the CPU, compiled once per instruction set.
//
// The work is reading `outputs` once; the nine sums per pair are nothing beside it. Pairs are taken in tiles:
// the threads first share the rows of a tile and leave one norm each, then share the *experts* and add the
// tile's pairs in order. So every sum has one owner and one order, which makes the result independent of the
// number of threads without atomics or per-thread tables. The threads wait for each other twice a tile, so
// tiles are as large as the workspace allows.
//
// A norm is the square root of a sum of squares in float32 partial sums per 1,024 elements, float64 across
// them. Where that sum overflows or underflows float32 (elements beyond 1e18 or all below 1e-17), the row is
// read again in float64.
#include "routing_moments.h"

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace moeprune::MOEPRUNE_ISA {
namespace {

constexpr int kRows = 16;  // rows that a thread takes at a time

double square_sum(const FloatRow& row, BlockBuffer& buffer) {
  DoubleVec total = {};
  for (std::int64_t start = 0; start < row.size; start += kBlock) {
    with_block(row, start, block_size(row, start), Padding::zero, buffer, [&](auto x, int n) {
      Vec partial[4] = {};
      for (int i = 0; i < n; i += kStep)
        for (int h = 0; h < 2; ++h) {
          const Pair pair = load_pair(x + i + h * kPair);
          for (int u = 0; u < 2; ++u) partial[2 * h + u] += pair.half[u] * pair.half[u];
        }
      total += widened((partial[0] + partial[1]) + (partial[2] + partial[3]));
    });
  }
  return sum(total);
}

double square_sum_in_double(const FloatRow& row, BlockBuffer& buffer) {
  double total = 0;
  for (std::int64_t start = 0; start < row.size; start += kBlock) {
    const int n = block_size(row, start);
    const float* x = converted(row, start, n, Padding::zero, buffer);
    for (int i = 0; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  return total;
}

double norm(const FloatRow& row) {
  BlockBuffer buffer;
  double squares = square_sum(row, buffer);
  if (!(squares > 1e-26 && squares < 1e37)) squares = square_sum_in_double(row, buffer);
  return __builtin_sqrt(squares);
}

double float_at(const TensorView& vector, std::int64_t i) {
  const std::int64_t at = i * vector.stride[0];
  switch (vector.dtype) {
    case DType::float64:
      return static_cast<const double*>(vector.data)[at];
    case DType::float32:
      return static_cast<double>(static_cast<const float*>(vector.data)[at]);
    case DType::bfloat16:
      return static_cast<double>(bfloat16_to_float(static_cast<const std::uint16_t*>(vector.data)[at]));
    default:
      return static_cast<double>(float16_to_float(static_cast<const std::uint16_t*>(vector.data)[at]));
  }
}

std::int64_t id_at(const TensorView& ids, std::int64_t i) {
  const std::int64_t at = i * ids.stride[0];
  return ids.dtype == DType::int64 ? static_cast<const std::int64_t*>(ids.data)[at]
                                   : static_cast<const std::int32_t*>(ids.data)[at];
}

bool valid_at(const TensorView& valid, std::int64_t i) {
  return !valid.given() || static_cast<const bool*>(valid.data)[i * valid.stride[0]];
}

void add_pair(const RoutingMomentsArgs& args, std::int64_t expert, double gate, double f) {
  const double gate_power[3] = {1, gate, gate * gate};
  const double norm_power[3] = {1, f, f * f};
  double* moments = args.moments + expert * 9;
  for (int a = 0; a < 3; ++a)
    for (int b = 0; b < 3; ++b) moments[3 * a + b] += gate_power[a] * norm_power[b];
  float& highest = args.max_norm[expert];
  const float f32 = static_cast<float>(f);
  if (highest == highest && !(f32 <= highest)) highest = f32;  // NaN enters and stays
}

}  // namespace

void routing_moments(const RoutingMomentsArgs& args) {
  const std::int64_t n_pairs = args.ids.shape[0];
  const bool norms_given = args.norms.given();
  const std::int64_t tile_size = norms_given ? n_pairs : args.workspace_size;
  for (std::int64_t tile = 0; tile < n_pairs; tile += tile_size) {
    const std::int64_t n = n_pairs - tile < tile_size ? n_pairs - tile : tile_size;
    if (!norms_given) {
      const double nanoseconds = 0.3 * static_cast<double>(n * args.outputs.shape[1]);
      const int threads = useful_threads(nanoseconds, args.threads);
      parallel_ranges(n, kRows, threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; ++i)
          if (valid_at(args.valid, tile + i))
            args.workspace[i] = norm(row_of(args.outputs, (tile + i) * args.outputs.stride[0]));
      });
    }
    const int threads = useful_threads(10.0 * static_cast<double>(n), args.threads);
    const std::int64_t share = (args.n_experts + threads - 1) / threads;
    parallel_ranges(args.n_experts, share, threads, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t i = 0; i < n; ++i) {
        if (!valid_at(args.valid, tile + i)) continue;
        const std::int64_t expert = id_at(args.ids, tile + i);
        if (expert < first || expert >= last) continue;
        const double f = norms_given ? float_at(args.norms, tile + i) : args.workspace[i];
        add_pair(args, expert, float_at(args.gates, tile + i), f);
      }
    });
  }
}

}  // namespace moeprune::MOEPRUNE_ISA
