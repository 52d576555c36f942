// masked_router on the CPU, compiled once per instruction set.
//
// A row has few elements (E is 8 to 512) and many answers (one per mask), so the cost is not reading but
// choosing. A vector's lanes are rows: as many rows as the vector is wide walk the same list of experts together,
// each step comparing one expert with the running top-k of all of them. Scores are compared as integers whose
// order is "higher score, NaN highest", and then by expert id, so ties need no further thought. Along a walk the
// softmax's denominator is carried too, so that one walk answers for every prefix of the list. Between two stops of
// a nested walk a row's top-k rarely changes, so its answer is kept, ready to be copied, until it does.
#include "masked_router.h"

#include "cpu/parallel.h"
#include "cpu/router_rows.h"

namespace moeprune::MOEPRUNE_ISA {
namespace {

constexpr std::int64_t kStreamedAnswers = 1 << 20;  // 12 MB: more than a core's caches keep for the reader

// By expert, place in the top-k, or group, and then by lane.
struct Scratch {
  alignas(64) float logit[kMaxExperts * kLanes];
  alignas(64) float score[kMaxExperts * kLanes];       // sigmoid, sqrtsoftplus; probability
  alignas(64) std::int32_t key[kMaxExperts * kLanes];  // of what experts are chosen by
  BestK<kLanes> best;
  alignas(64) float group_first[kMaxExperts * kLanes];
  alignas(64) float group_second[kMaxExperts * kLanes];
  alignas(64) std::int32_t group_key[kMaxExperts * kLanes];
  alignas(64) std::int32_t group_allowed[kMaxExperts * kLanes];
  alignas(64) double sum[kMaxExperts * kLanes];    // the denominator up to each place of the walk,
  alignas(64) float offset[kMaxExperts * kLanes];  // relative to exp(offset)
  // The answer of each lane: the weights before they are scaled, what they are relative to, their sum, the ids.
  alignas(64) float weight[kLanes][kMaxExperts];
  alignas(64) float weight_offset[kLanes];
  alignas(64) float total[kLanes];
  alignas(64) std::int64_t id[kLanes][kMaxExperts];
  bool streaming;  // answers go to memory past the caches
};

// Whether the choice needs the whole denominator, hence a walk of its own before.
bool key_depends_on_mask(const MaskedRouterArgs& args) { return is_softmax(args) && args.bias; }

float score_of_key(std::int32_t key) {
  const std::int32_t bits = key ^ ((key >> 31) & 0x7FFFFFFF);
  float score;
  __builtin_memcpy(&score, &bits, sizeof score);
  return score;
}

// What depends on the rows only: logits, scores, keys.
void prepare_rows(const MaskedRouterArgs& args, const Rows<kLanes>& rows, Scratch& s) {
  const int n_experts = static_cast<int>(args.logits.shape[1]);
  transpose(args.logits, rows, s.logit);
  if (args.score == Score::sigmoid) sigmoids(s.logit, n_experts * kLanes, s.score);
  if (args.score == Score::sqrtsoftplus) roots_of_softplus(s.logit, n_experts * kLanes, s.score);
  if (key_depends_on_mask(args)) return;
  for (int e = 0; e < n_experts; ++e) {
    const int at = e * kLanes;
    const float* score = args.score == Score::softmax_over_chosen ? s.logit : s.score;
    store(s.key + at, key_of(args.bias ? load(score + at) + args.bias[e] : load(s.logit + at)));
  }
}

// A running sum of exp(x - offset), each lane's own. The offset follows the largest x at a distance: it is raised
// only by an x far above it, so that the sum is hardly ever rescaled, and neither overflows nor vanishes.
struct Denominator {
  Vec offset = splat(kLowest);
  DoubleVec sum = {};

  MOEPRUNE_METHOD void add(Vec x) {
    const IntVec above = x > offset + 16.0f;
    if (any(above)) {
      const Vec raised = select(above, x, offset);
      sum *= widened(select(above, exp(offset - raised), splat(1.0f)));
      offset = raised;
    }
    sum += widened(exp(x - offset));
  }
};

// The denominators of all prefixes of the walk. A loop of its own: its exponentials and the comparisons of the
// top-k would fill the processor's window of instructions, one waiting for the other.
void sum_prefixes(const std::int32_t* list, int n, Scratch& s) {
  Denominator denominator;
  for (int i = 0; i < n; ++i) {
    denominator.add(load(s.logit + list[i] * kLanes));
    store(s.sum + i * kLanes, denominator.sum);
    store(s.offset + i * kLanes, denominator.offset);
  }
}

// Renews the lane's answer.
template <int kTopK>
void refresh(const MaskedRouterArgs& args, int lane, float offset, Scratch& s) {
  const int k = kTopK > 0 ? kTopK : args.top_k;
  const bool exponentials = is_exponential(args);
  float* weight = s.weight[lane];
  float highest = kLowest;
  for (int j = 0; j < k; ++j) {
    const std::int32_t expert = s.best.id[j * kLanes + lane];
    s.id[lane][j] = expert;
    weight[j] = !exponentials ? s.score[expert * kLanes + lane]
                : args.bias   ? s.logit[expert * kLanes + lane]
                              : score_of_key(s.best.key[j * kLanes + lane]);
    highest = weight[j] > highest ? weight[j] : highest;
  }
  s.weight_offset[lane] = offset;
  if (args.score == Score::softmax_over_chosen) offset = highest;
  if (key_depends_on_mask(args)) {  // the bias may choose experts so unlikely that the fast exponential gives 0
    for (int j = 0; j < k; ++j) weight[j] = __builtin_expf(weight[j] - offset);
  } else if (exponentials) {
    for (int j = k; j % kLanes != 0; ++j) weight[j] = offset;
    for (int j = 0; j < k; j += kLanes) store(weight + j, exp(load(weight + j) - offset));
  }
  float total = 0;
  for (int j = 0; j < k; ++j) total += weight[j];
  s.total[lane] = total;
}

// One row's answer, written to its slot.
template <int kTopK>
void write(const MaskedRouterArgs& args, const Scratch& s, int lane, double factor, std::int64_t at) {
  const int k = kTopK > 0 ? kTopK : args.top_k;
  alignas(64) float scaled[kTopK > 0 ? (kTopK + kLanes - 1) / kLanes * kLanes : kMaxExperts];
  scale_weights(s.weight[lane], k, factor, key_depends_on_mask(args), args.weights_dtype, scaled);
  if (s.streaming && kTopK == 8) {
    stream_8(args.weights + at, scaled);
    stream_8(args.ids + at, s.id[lane]);
  } else {
    __builtin_memcpy(args.weights + at, scaled, sizeof(float) * static_cast<std::size_t>(k));
    __builtin_memcpy(args.ids + at, s.id[lane], sizeof(std::int64_t) * static_cast<std::size_t>(k));
  }
}

// The answers of all rows at a place of the walk, first renewed in the lanes that have changed.
template <int kTopK>
void answer(const MaskedRouterArgs& args, const Rows<kLanes>& rows, IntVec changed, int place, std::int32_t slot,
            Scratch& s) {
  const float* offset = s.offset + place * kLanes;
  if (is_softmax(args)) changed |= load(offset) != load(s.weight_offset);
  if (any(changed)) {
    std::int32_t stale[kLanes];
    store(stale, changed);
    for (int lane = 0; lane < kLanes; ++lane)
      if (stale[lane]) refresh<kTopK>(args, lane, offset[lane], s);
  }
  double factor[kLanes];
  weight_factors<kLanes>(args, s.sum + place * kLanes, s.total, factor);
  for (int lane = 0; lane < rows.count; ++lane) {
    const std::int64_t at = (slot * args.logits.shape[0] + rows.index[lane]) * args.top_k;
    write<kTopK>(args, s, lane, factor[lane], at);
  }
}

// The scores that rank the groups, before any bias.
const float* group_scores(const MaskedRouterArgs& args, const Scratch& s) {
  const bool by_logit = args.score == Score::softmax_over_chosen || (!args.bias && !args.group_top2_sum);
  return by_logit ? s.logit : s.score;
}

// Marks, in each lane, the groups that experts may be chosen from.
void allow_groups(const MaskedRouterArgs& args, const std::int32_t* list, int n, Scratch& s) {
  const int group_size = static_cast<int>(args.logits.shape[1]) / args.n_group;
  bool present[kMaxExperts] = {};
  for (int at = 0; at < args.n_group * kLanes; ++at) s.group_first[at] = s.group_second[at] = -__builtin_inff();
  for (int i = 0; i < n; ++i) {
    const int g = list[i] / group_size, at = g * kLanes;
    present[g] = true;
    Vec x = load(group_scores(args, s) + list[i] * kLanes);
    if (args.bias) x += args.bias[list[i]];
    const Vec first = load(s.group_first + at), second = load(s.group_second + at);
    const IntVec leads = (x > first) | (x != x);  // a NaN ranks first
    store(s.group_second + at, select(leads, first, select(x > second, x, second)));
    store(s.group_first + at, select(leads, x, first));
  }
  for (int g = 0; g < args.n_group; ++g) {
    const Vec first = load(s.group_first + g * kLanes), second = load(s.group_second + g * kLanes);
    store(s.group_key + g * kLanes,
          present[g] ? key_of(args.group_top2_sum ? first + second : first) : splat_bits(kNoKey));
  }
  for (int g = 0; g < args.n_group; ++g) {
    const IntVec key = load(s.group_key + g * kLanes);
    IntVec before = {};  // minus the number of groups that rank before g
    for (int other = 0; other < args.n_group; ++other)
      before += beats(load(s.group_key + other * kLanes), splat_bits(other), key, splat_bits(g));
    store(s.group_allowed + g * kLanes, present[g] ? -before < args.topk_group : IntVec{});
  }
}

// Routes the rows along one walk. kTopK is top_k where that is known to the compiler, otherwise 0.
template <int kTopK>
void walk(const MaskedRouterArgs& args, const Rows<kLanes>& rows, std::int64_t w, Scratch& s) {
  const std::int32_t* list = args.lists + w * args.logits.shape[1];
  const std::int32_t* stops = args.stops + w * args.n_stops;
  const std::int32_t* slots = args.slots + w * args.n_stops;
  const int n = stops[args.n_stops - 1];
  const bool grouped = args.n_group > 1;
  const bool needs_probabilities = is_softmax(args) && (args.bias || (grouped && args.group_top2_sum));
  if (is_softmax(args)) sum_prefixes(list, n, s);
  if (needs_probabilities) {  // one stop, then
    const int last = (n - 1) * kLanes;
    for (int i = 0; i < n; ++i) {
      const int at = list[i] * kLanes;
      const Vec terms = exp(load(s.logit + at) - load(s.offset + last));
      for (int lane = 0; lane < kLanes; ++lane)
        s.score[at + lane] = static_cast<float>(static_cast<double>(terms[lane]) / s.sum[last + lane]);
      if (args.bias) store(s.key + at, key_of(load(s.score + at) + args.bias[list[i]]));
    }
  }
  if (grouped) allow_groups(args, list, n, s);
  const int group_size = static_cast<int>(args.logits.shape[1]) / args.n_group;
  s.best.clear(args.top_k);

  IntVec changed = splat_bits(-1);
  std::int64_t stop = 0;
  for (int i = 0; i < n; ++i) {
    const std::int32_t expert = list[i];
    IntVec key = load(s.key + expert * kLanes), id = splat_bits(expert);
    if (grouped) {
      const IntVec allowed = load(s.group_allowed + expert / group_size * kLanes);
      key = select(allowed, key, splat_bits(kNoKey));
      id = select(allowed, id, splat_bits(kNoId));
    }
    changed |= s.best.insert<kTopK, false>(key, id, 0, args.top_k);
    for (; stop < args.n_stops && stops[stop] == i + 1; ++stop) {
      answer<kTopK>(args, rows, changed, i, slots[stop], s);
      changed = IntVec{};
    }
  }
}

// Rows that take the same walk are walked together: any rows where all take every walk, otherwise those of one mask.
void route(const MaskedRouterArgs& args, const Rows<kLanes>& rows, Scratch& s) {
  prepare_rows(args, rows, s);
  const std::int64_t first_walk = args.assigned ? args.assigned[rows.index[0]] : 0;
  const std::int64_t end = args.assigned ? first_walk + 1 : args.n_walks;
  for (std::int64_t w = first_walk; w < end; ++w) {
    with_top_k(args.top_k, [&](auto k) { walk<decltype(k)::value>(args, rows, w, s); });
  }
}

}  // namespace

void masked_router(const MaskedRouterArgs& args) {
  const std::int64_t n_rows = args.logits.shape[0];
  if (args.n_walks == 0 || args.n_stops == 0) return;
  const std::int64_t walks = args.assigned ? 1 : args.n_walks;
  const double per_walk = static_cast<double>(args.logits.shape[1] + args.n_stops * args.top_k);
  const int threads = useful_threads(static_cast<double>(n_rows * walks) * per_walk, args.threads);
  const std::int64_t grain = args.assigned ? kSortedRows : 2 * kLanes;
  const std::int64_t answers = n_rows * (args.assigned ? 1 : args.n_walks * args.n_stops) * args.top_k;
  const auto aligned = [](const void* to) { return reinterpret_cast<std::uintptr_t>(to) % 32 == 0; };
  const bool streaming = answers >= kStreamedAnswers && aligned(args.ids) && aligned(args.weights);
  parallel_ranges(n_rows, grain, threads, [&](std::int64_t first, std::int64_t last) {
    Scratch s;
    s.streaming = streaming;
    for_rows<kLanes>(args.assigned, first, last, [&](const Rows<kLanes>& rows) { route(args, rows, s); });
    if (streaming) stream_fence();
  });
}

}  // namespace moeprune::MOEPRUNE_ISA
