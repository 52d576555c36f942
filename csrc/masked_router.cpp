// masked_router on the CPU, compiled once per instruction set.
//
// A row has few elements (E is 8 to 512) and many answers (one per mask), so the cost is not reading but
// choosing. A vector's lanes are rows: as many rows as the vector is wide walk the same list of experts together,
// each step comparing one expert with the running top-k of all of them. Scores are compared as integers whose
// order is "higher score, NaN highest", and then by expert id, so ties need no further thought. Along a walk the
// softmax's denominator is carried too, so that one walk answers for every prefix of the list. Between two stops of
// a nested walk a row's top-k rarely changes, so its answer is kept, ready to be copied, until it does.
#include "masked_router.h"

#include "parallel.h"
#include "simd.h"

namespace moeprune::MOEPRUNE_ISA {
namespace {

constexpr float kLowest = -__FLT_MAX__;
constexpr int kSortedRows = 128;  // rows among which those of one mask are looked for

// The rows that walk together, one to a lane; lanes beyond `count` repeat the first.
struct Rows {
  std::int64_t index[kLanes];
  int count = 0;
};

// By expert, place in the top-k, or group, and then by lane.
struct Scratch {
  alignas(64) float logit[kMaxExperts * kLanes];
  alignas(64) float score[kMaxExperts * kLanes];        // sigmoid, sqrtsoftplus
  alignas(64) std::int32_t key[kMaxExperts * kLanes];   // of what experts are chosen by
  alignas(64) std::int32_t best_key[kMaxExperts * kLanes];  // the running top-k, best first
  alignas(64) std::int32_t best_id[kMaxExperts * kLanes];
  alignas(64) float group_first[kMaxExperts * kLanes];
  alignas(64) float group_second[kMaxExperts * kLanes];
  alignas(64) std::int32_t group_key[kMaxExperts * kLanes];
  alignas(64) std::int32_t group_allowed[kMaxExperts * kLanes];
  // The answer of each lane: the weights before they are scaled, their sum, and the ids.
  alignas(64) float weight[kLanes][kMaxExperts];
  alignas(64) float total[kLanes];
  alignas(64) std::int64_t id[kLanes][kMaxExperts];
};

bool is_softmax(const MaskedRouterArgs& args) { return args.score == Score::softmax; }

// Whether the choice needs the whole denominator, hence a walk of its own before.
bool key_depends_on_mask(const MaskedRouterArgs& args) { return is_softmax(args) && args.bias; }

// Integers in the order of the scores, NaN above all; -0 and +0 are equal scores.
MOEPRUNE_INLINE IntVec key_of(Vec score) {
  const IntVec bits = (IntVec)(score + 0.0f);
  const IntVec ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF);
  return score != score ? splat_bits(0x7FFFFFFF) : ordered;
}

float score_of_key(std::int32_t key) {
  const std::int32_t bits = key ^ ((key >> 31) & 0x7FFFFFFF);
  float score;
  __builtin_memcpy(&score, &bits, sizeof score);
  return score;
}

// Round to nearest even, as torch does.
MOEPRUNE_INLINE Vec rounded(Vec value, DType dtype) {
  const IntVec bits = (IntVec)value;
  if (dtype == DType::bfloat16) {
    const IntVec up = bits + 0x7FFF + ((bits >> 16) & 1);
    return value != value ? value : (Vec)(up & splat_bits(-0x10000));
  }
  // float16: 13 bits fewer where it is normal; below, multiples of its smallest number, 2^-24, the spacing of
  // floats from 0.5 on; from 65,520 on, infinity.
  const Vec magnitude = value < 0.0f ? -value : value;
  const IntVec up = (IntVec)magnitude + 0xFFF + (((IntVec)magnitude >> 13) & 1);
  const Vec normal = magnitude >= 65520.0f ? splat(__builtin_inff()) : (Vec)(up & splat_bits(-0x2000));
  const Vec rounded_magnitude = magnitude < 0x1p-14f ? (magnitude + 0.5f) - 0.5f : normal;
  return value != value ? value : value < 0.0f ? -rounded_magnitude : rounded_magnitude;
}

constexpr std::int32_t kNoKey = -0x7FFFFFFF - 1, kNoId = 0x7FFFFFFF;  // lose against every expert

template <class T>
void transpose_row(const FloatRow& row, int lane, float* to) {
  const T* from = elements<T>(row, 0);
  for (std::int64_t e = 0; e < row.size; ++e) to[e * kLanes + lane] = to_float(from[e * row.stride]);
}

// What depends on the rows only: logits, scores, keys.
void prepare_rows(const MaskedRouterArgs& args, const Rows& rows, Scratch& s) {
  const int n_experts = static_cast<int>(args.logits.shape[1]);
  for (int lane = 0; lane < kLanes; ++lane) {
    const std::int64_t index = rows.index[lane < rows.count ? lane : 0];
    const FloatRow row = row_of(args.logits, index * args.logits.stride[0]);
    if (row.dtype == DType::float32) {
      transpose_row<float>(row, lane, s.logit);
    } else if (row.dtype == DType::bfloat16) {
      transpose_row<BFloat16>(row, lane, s.logit);
    } else {
      transpose_row<Float16>(row, lane, s.logit);
    }
  }
  if (args.score == Score::sigmoid) {
    for (int at = 0; at < n_experts * kLanes; at += kLanes) {
      const Vec x = load(s.logit + at);
      const Vec t = exp(min(x, -x));  // e^-|x| never overflows
      const Vec numerator = x < 0.0f ? t : splat(1.0f);
      store(s.score + at, numerator / (t + 1.0f));
    }
  } else if (args.score == Score::sqrtsoftplus) {  // beyond 20 the softplus is x to float precision
    for (int at = 0; at < n_experts * kLanes; ++at) {
      const float x = s.logit[at];
      s.score[at] = __builtin_sqrtf(x > 20.0f ? x : __builtin_log1pf(__builtin_expf(x)));
    }
  }
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

  // Returns the lanes whose offset has changed.
  MOEPRUNE_METHOD IntVec add(Vec x) {
    const IntVec above = x > offset + 16.0f;
    if (any(above)) {
      const Vec raised = above ? x : offset;
      sum *= widened(above ? exp(offset - raised) : splat(1.0f));
      offset = raised;
    }
    sum += widened(exp(x - offset));
    return above;
  }
};

MOEPRUNE_INLINE IntVec beats(IntVec key, IntVec id, IntVec other_key, IntVec other_id) {
  return (key > other_key) | ((key == other_key) & (id < other_id));
}

// Puts an expert into the top-k of the lanes where it belongs, and returns these lanes.
MOEPRUNE_INLINE IntVec insert(IntVec key, IntVec id, int top_k, Scratch& s) {
  int at = (top_k - 1) * kLanes;
  IntVec here_key = load(s.best_key + at), here_id = load(s.best_id + at);
  const IntVec enters = beats(key, id, here_key, here_id);
  IntVec belongs = enters;  // here or before
  while (any(belongs)) {
    if (at == 0) {
      store(s.best_key, belongs ? key : here_key);
      store(s.best_id, belongs ? id : here_id);
      break;
    }
    const IntVec before_key = load(s.best_key + at - kLanes), before_id = load(s.best_id + at - kLanes);
    const IntVec moves = beats(key, id, before_key, before_id);  // belongs before: the one before comes here
    store(s.best_key + at, moves ? before_key : belongs ? key : here_key);
    store(s.best_id + at, moves ? before_id : belongs ? id : here_id);
    belongs = moves;
    here_key = before_key;
    here_id = before_id;
    at -= kLanes;
  }
  return enters;
}

// Renews the lane's answer.
void refresh(const MaskedRouterArgs& args, int lane, float offset, Scratch& s) {
  const int k = args.top_k;
  const bool over_chosen = args.score == Score::softmax_over_chosen;
  const bool exponentials = over_chosen || is_softmax(args);
  float* weight = s.weight[lane];
  float highest = kLowest;
  for (int j = 0; j < k; ++j) {
    const std::int32_t expert = s.best_id[j * kLanes + lane];
    s.id[lane][j] = expert;
    weight[j] = !exponentials ? s.score[expert * kLanes + lane]
                : args.bias   ? s.logit[expert * kLanes + lane]
                              : score_of_key(s.best_key[j * kLanes + lane]);
    highest = weight[j] > highest ? weight[j] : highest;
  }
  if (over_chosen) offset = highest;
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

// By what the lanes' kept weights are multiplied.
void factors(const MaskedRouterArgs& args, const Denominator& denominator, const Scratch& s, double* out) {
  for (int lane = 0; lane < kLanes; ++lane) {
    double factor = 1.0, total = static_cast<double>(s.total[lane]);
    if (is_softmax(args)) {
      factor = 1.0 / denominator.sum[lane];
      total *= factor;
    } else if (args.score == Score::softmax_over_chosen) {
      factor = 1.0 / total;
      total = 1.0;
    }
    if (args.renormalize) factor /= total + static_cast<double>(args.eps);
    out[lane] = factor * static_cast<double>(args.scale);
  }
}

// One row's answer, written to its slot. kTopK is top_k where that is known to the compiler, otherwise 0.
template <int kTopK>
void write(const MaskedRouterArgs& args, const Scratch& s, int lane, double factor, std::int64_t at) {
  const int k = kTopK > 0 ? kTopK : args.top_k;
  alignas(64) float scaled[kTopK > 0 ? (kTopK + kLanes - 1) / kLanes * kLanes : kMaxExperts];
  const float* weight = s.weight[lane];
  if (key_depends_on_mask(args)) {  // vanishing weights need a factor beyond float32
    for (int j = 0; j < k; ++j) scaled[j] = static_cast<float>(static_cast<double>(weight[j]) * factor);
  } else {
    for (int j = 0; j < k; j += kLanes) store(scaled + j, load(weight + j) * static_cast<float>(factor));
  }
  if (args.weights_dtype != DType::float32)
    for (int j = 0; j < k; j += kLanes) store(scaled + j, rounded(load(scaled + j), args.weights_dtype));
  __builtin_memcpy(args.weights + at, scaled, sizeof(float) * static_cast<std::size_t>(k));
  __builtin_memcpy(args.ids + at, s.id[lane], sizeof(std::int64_t) * static_cast<std::size_t>(k));
}

// The answers of all rows at a stop, first renewed in the lanes that have changed.
void answer(const MaskedRouterArgs& args, const Rows& rows, IntVec changed, const Denominator& denominator,
            std::int32_t slot, Scratch& s) {
  for (int lane = 0; any(changed) && lane < kLanes; ++lane)
    if (changed[lane]) refresh(args, lane, denominator.offset[lane], s);
  double factor[kLanes];
  factors(args, denominator, s, factor);
  for (int lane = 0; lane < rows.count; ++lane) {
    const std::int64_t at = (slot * args.logits.shape[0] + rows.index[lane]) * args.top_k;
    switch (args.top_k) {
      case 2:
        write<2>(args, s, lane, factor[lane], at);
        break;
      case 4:
        write<4>(args, s, lane, factor[lane], at);
        break;
      case 6:
        write<6>(args, s, lane, factor[lane], at);
        break;
      case 8:
        write<8>(args, s, lane, factor[lane], at);
        break;
      default:
        write<0>(args, s, lane, factor[lane], at);
    }
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
    store(s.group_second + at, leads ? first : x > second ? x : second);
    store(s.group_first + at, leads ? x : first);
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

// Routes the rows along one walk.
void walk(const MaskedRouterArgs& args, const Rows& rows, std::int64_t w, Scratch& s) {
  const std::int32_t* list = args.lists + w * args.logits.shape[1];
  const std::int32_t* stops = args.stops + w * args.n_stops;
  const std::int32_t* slots = args.slots + w * args.n_stops;
  const int n = stops[args.n_stops - 1];
  const bool grouped = args.n_group > 1;
  const bool needs_probabilities = is_softmax(args) && (args.bias || (grouped && args.group_top2_sum));
  const bool carries_sum = is_softmax(args) && !needs_probabilities;
  Denominator denominator;
  if (needs_probabilities) {  // one stop, then
    for (int i = 0; i < n; ++i) denominator.add(load(s.logit + list[i] * kLanes));
    const Vec inverse = reciprocal(denominator.sum);
    for (int i = 0; i < n; ++i) {
      const int at = list[i] * kLanes;
      const Vec probability = exp(load(s.logit + at) - denominator.offset) * inverse;
      store(s.score + at, probability);
      if (args.bias) store(s.key + at, key_of(probability + args.bias[list[i]]));
    }
  }
  if (grouped) allow_groups(args, list, n, s);
  const int group_size = static_cast<int>(args.logits.shape[1]) / args.n_group;
  for (int at = 0; at < args.top_k * kLanes; ++at) {
    s.best_key[at] = kNoKey;
    s.best_id[at] = kNoId;
  }

  IntVec changed = splat_bits(-1);
  std::int64_t stop = 0;
  for (int i = 0; i < n; ++i) {
    const std::int32_t expert = list[i];
    IntVec key = load(s.key + expert * kLanes), id = splat_bits(expert);
    if (grouped) {
      const IntVec allowed = load(s.group_allowed + expert / group_size * kLanes);
      key = allowed ? key : splat_bits(kNoKey);
      id = allowed ? id : splat_bits(kNoId);
    }
    if (carries_sum) changed |= denominator.add(load(s.logit + expert * kLanes));
    changed |= insert(key, id, args.top_k, s);
    for (; stop < args.n_stops && stops[stop] == i + 1; ++stop) {
      answer(args, rows, changed, denominator, slots[stop], s);
      changed = IntVec{};
    }
  }
}

// Rows that take the same walk are walked together: any rows where all take every walk, otherwise those of one mask.
void route(const MaskedRouterArgs& args, std::int64_t first, std::int64_t last, Scratch& s) {
  bool done[kSortedRows] = {};
  for (std::int64_t row = first; row < last; ++row) {
    if (done[row - first]) continue;
    Rows rows;
    for (std::int64_t other = row; other < last && rows.count < kLanes; ++other) {
      if (done[other - first] || (args.assigned && args.assigned[other] != args.assigned[row])) continue;
      done[other - first] = true;
      rows.index[rows.count++] = other;
    }
    prepare_rows(args, rows, s);
    const std::int64_t first_walk = args.assigned ? args.assigned[row] : 0;
    const std::int64_t end = args.assigned ? first_walk + 1 : args.n_walks;
    for (std::int64_t w = first_walk; w < end; ++w) walk(args, rows, w, s);
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
  parallel_ranges(n_rows, grain, threads, [&](std::int64_t first, std::int64_t last) {
    Scratch s;
    route(args, first, last, s);
  });
}

}  // namespace moeprune::MOEPRUNE_ISA
