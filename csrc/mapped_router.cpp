// mapped_router on the CPU, compiled once per instruction set.
//
// The work is the product of scores and map. Rows of logits are a vector's lanes (router_rows.h), two vectors at once,
// so that an entry of the map, which all of them are multiplied by, is loaded once for both; four rows of the map at
// once, so that a score is loaded once for these and the sums stay in registers. The map itself stays in the cache for
// the next rows of logits. As soon as a row of the map is done its pi enter the running top-k, as integers in the order
// of "higher, NaN highest"; rows come in ascending order, so an equal one that comes later stays behind.
//
// exp(logit - highest) is what the product takes of a softmax, with the highest logit that the map refers to: what
// others have does not matter, however high, and maps that share their highest expert share the exponentials. The
// denominator divides the answers.
#include "mapped_router.h"

#include "cpu/parallel.h"
#include "cpu/router_rows.h"

namespace moeprune::MOEPRUNE_ISA {
namespace {

constexpr int kVectors = 2, kWide = kVectors * kLanes;  // rows of logits taken together
constexpr int kMapRows = 4;                             // of the map, likewise

// By expert, row of the map, or place in the top-k, and then by lane.
struct Scratch {
  alignas(64) float logit[kMaxExperts * kWide];
  alignas(64) float score[kMaxExperts * kWide];
  alignas(64) float pi[kMaxExperts * kWide];
  BestK<kWide> best;
  alignas(64) float offset[kWide];   // what the scores of a softmax are relative to
  alignas(64) double sum[kWide];     // of the scores that the map refers to
  alignas(64) float share[kWide];    // of a score's unit in the softmax over all experts
  alignas(64) float highest[kWide];  // of all experts
  alignas(64) double total[kWide];   // their denominator, relative to it
  bool finite;                       // all scores, where there is no softmax
};

// Whether the choice is by the softmax over all experts.
bool chooses_among_all(const MappedRouterArgs& args) { return is_softmax(args) && args.mapped_bias; }

// What depends on the rows only.
void prepare_rows(const MappedRouterArgs& args, const Rows<kWide>& rows, Scratch& s) {
  const int n_experts = static_cast<int>(args.logits.shape[1]), n = n_experts * kWide;
  transpose(args.logits, rows, s.logit);
  if (is_exponential(args)) {
    for (int lane = 0; lane < kWide; ++lane) s.offset[lane] = __builtin_nanf("");  // of no map: scores are to be made
  } else if (args.score == Score::sigmoid) {
    sigmoids(s.logit, n, s.score);
  } else {
    roots_of_softplus(s.logit, n, s.score);
  }
  if (!is_exponential(args)) {
    IntVec undefined = {};
    for (int at = 0; at < n; at += kLanes) {
      const Vec score = load(s.score + at);
      const IntVec here = score - score != 0.0f;  // NaN and infinity
      undefined |= here;
      store(s.score + at, select(here, splat(__builtin_nanf("")), score));
    }
    s.finite = !any(undefined);
  }
  if (!chooses_among_all(args)) return;
  for (int at = 0; at < kWide; at += kLanes) {
    Vec highest = splat(kLowest);
    for (int e = 0; e < n_experts; ++e) highest = max(load(s.logit + e * kWide + at), highest);
    DoubleVec total = {};
    for (int e = 0; e < n_experts; ++e) total += widened(exp(load(s.logit + e * kWide + at) - highest));
    store(s.highest + at, highest);
    store(s.total + at, total);
  }
}

// The scores of a softmax for this map, and their sum.
void prepare_softmax(const MappedRouterArgs& args, const std::int32_t* experts, int n, Scratch& s) {
  const int n_experts = static_cast<int>(args.logits.shape[1]);
  for (int at = 0; at < kWide; at += kLanes) {
    Vec highest = splat(kLowest);  // a NaN is passed over here and kept in the sum
    for (int i = 0; i < n; ++i) highest = max(load(s.logit + experts[i] * kWide + at), highest);
    if (any(load(s.offset + at) != highest)) {
      store(s.offset + at, highest);
      for (int e = 0; e < n_experts; ++e)  // beyond what exp is made for, where the map does not look
        store(s.score + e * kWide + at, exp(load(s.logit + e * kWide + at) - highest));
    }
    DoubleVec sum = {};
    for (int i = 0; i < n; ++i) sum += widened(load(s.score + experts[i] * kWide + at));
    store(s.sum + at, sum);
  }
  if (!chooses_among_all(args)) return;
  for (int lane = 0; lane < kWide; ++lane) {
    const double unit = __builtin_exp(static_cast<double>(s.offset[lane]) - static_cast<double>(s.highest[lane]));
    s.share[lane] = static_cast<float>(unit / s.total[lane]);
  }
}

// The map of one candidate.
struct Map {
  const float* entry;
  std::int64_t row_stride, expert_stride;
  const std::int32_t* experts;
  int n_experts, n_rows;

  Map(const MappedRouterArgs& args, std::int64_t c)
      : entry(static_cast<const float*>(args.maps.data) + c * args.maps.stride[0]),
        row_stride(args.maps.stride[1]),
        expert_stride(args.maps.stride[2]),
        experts(args.experts + c * args.maps.shape[2]),
        n_experts(args.counts[c]),
        n_rows(static_cast<int>(args.maps.shape[1])) {}
};

// The pi of kRows rows of the map from j on. Where a score is NaN, entries of 0 must be left out.
template <int kRows, bool kSkipZeros>
void product(const Map& map, int j, Scratch& s) {
  const float* from[kRows];
  for (int u = 0; u < kRows; ++u) from[u] = map.entry + (j + u) * map.row_stride;
  Vec pi[kRows][kVectors] = {};
  for (int i = 0; i < map.n_experts; ++i) {
    const std::int64_t expert = map.experts[i];
    Vec score[kVectors];
    for (int v = 0; v < kVectors; ++v) score[v] = load(s.score + expert * kWide + v * kLanes);
    for (int u = 0; u < kRows; ++u) {
      const float entry = from[u][expert * map.expert_stride];
      if (kSkipZeros && entry == 0.0f) continue;
      for (int v = 0; v < kVectors; ++v) pi[u][v] += entry * score[v];
    }
  }
  for (int u = 0; u < kRows; ++u)
    for (int v = 0; v < kVectors; ++v) store(s.pi + (j + u) * kWide + v * kLanes, pi[u][v]);
}

template <int kTopK>
void choose(const MappedRouterArgs& args, const Map& map, const float* bias, Scratch& s) {
  s.best.clear(args.top_k);
  for (int j = 0, step; j < map.n_rows; j += step) {
    step = map.n_rows - j < kMapRows ? 1 : kMapRows;
    if (!is_exponential(args) && !s.finite) {
      step = 1;
      product<1, true>(map, j, s);
    } else if (step == 1) {
      product<1, false>(map, j, s);
    } else {
      product<kMapRows, false>(map, j, s);
    }
    for (int row = j; row < j + step; ++row)
      for (int first = 0; first < kWide; first += kLanes) {
        Vec choice = load(s.pi + row * kWide + first);
        if (chooses_among_all(args)) choice *= load(s.share + first);
        if (bias) choice += bias[row];
        s.best.insert<kTopK, true>(key_of(choice), splat_bits(row), first, args.top_k);
      }
  }
}

// Writes the answer of one row of logits to ids and weights from `to` on.
void answer(const MappedRouterArgs& args, int lane, std::int64_t to, const Scratch& s) {
  alignas(64) float weight[kMaxExperts];
  double chosen = 0, factor;
  for (int k = 0; k < args.top_k; ++k) {
    const std::int32_t row = s.best.id[k * kWide + lane];
    args.ids[to + k] = row;
    weight[k] = s.pi[row * kWide + lane];
    chosen += static_cast<double>(weight[k]);
  }
  weight_factors<1>(args, s.sum + lane, &chosen, &factor);
  scale_weights(weight, args.top_k, factor, true, args.weights_dtype, weight);
  __builtin_memcpy(args.weights + to, weight, sizeof(float) * static_cast<std::size_t>(args.top_k));
}

void route(const MappedRouterArgs& args, const Rows<kWide>& rows, Scratch& s) {
  prepare_rows(args, rows, s);
  const std::int64_t first = args.assigned ? args.assigned[rows.index[0]] : 0;
  const std::int64_t end = args.assigned ? first + 1 : args.maps.shape[0];
  for (std::int64_t c = first; c < end; ++c) {
    const Map map(args, c);
    const float* bias = args.mapped_bias ? args.mapped_bias + c * map.n_rows : nullptr;
    if (is_exponential(args)) prepare_softmax(args, map.experts, map.n_experts, s);
    with_top_k(args.top_k, [&](auto k) { choose<decltype(k)::value>(args, map, bias, s); });
    const std::int64_t slot = args.assigned ? 0 : c;
    for (int lane = 0; lane < rows.count; ++lane)
      answer(args, lane, (slot * args.logits.shape[0] + rows.index[lane]) * args.top_k, s);
  }
}

}  // namespace

void mapped_router(const MappedRouterArgs& args) {
  const std::int64_t n_rows = args.logits.shape[0];
  const std::int64_t maps = args.assigned ? 1 : args.maps.shape[0];
  const double per_map = static_cast<double>(args.maps.shape[1] * (args.maps.shape[2] / 32 + 4) + args.maps.shape[2]);
  const int threads = useful_threads(static_cast<double>(n_rows * maps) * per_map, args.threads);
  parallel_ranges(n_rows, args.assigned ? kSortedRows : kWide, threads, [&](std::int64_t first, std::int64_t last) {
    Scratch s;
    for_rows<kWide>(args.assigned, first, last, [&](const Rows<kWide>& rows) { route(args, rows, s); });
  });
}

}  // namespace moeprune::MOEPRUNE_ISA
