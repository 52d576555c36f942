// masked_router on the CPU, compiled once per instruction set.
//
// A row has few elements (E is 64 to 512) and many answers (one per mask), so the cost is not reading but
// choosing. Score and expert id are packed into one 64-bit key whose integer order is "higher score, then
// lower id": the walk compares single integers, most of which lose against the present k-th best at a well
// predicted branch, and ties need no further thought. Along a walk the softmax's denominator is carried
// relative to the running maximum, so that one pass answers for every prefix of the list; exponentials are
// vectorised over the experts before, and over the chosen at each stop.
#include "masked_router.h"

#include "parallel.h"
#include "simd.h"

namespace moeprune::MOEPRUNE_ISA {
namespace {

constexpr float kInf = __builtin_inff();
constexpr int kRows = 16;  // rows that a thread takes at a time

// Larger is better: the float's bits made monotone in the upper half, the complemented id in the lower.
std::uint64_t key_of(float score, std::int32_t expert) {
  const float canonical = score + 0.0f;  // -0 and +0 are equal scores
  std::uint32_t bits;
  __builtin_memcpy(&bits, &canonical, sizeof bits);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if (score != score) bits = 0xFFFFFFFFu;
  return static_cast<std::uint64_t>(bits) << 32 | ~static_cast<std::uint32_t>(expert);
}

std::int32_t expert_of(std::uint64_t key) { return static_cast<std::int32_t>(~static_cast<std::uint32_t>(key)); }

// Round to nearest even, as torch does.
float rounded(float value, DType dtype) {
  if (dtype == DType::float32 || value != value) return value;
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if (dtype == DType::bfloat16) {
    bits = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
  const float magnitude = __builtin_fabsf(value);
  if (magnitude >= 65520.0f) return value > 0 ? kInf : -kInf;
  int exponent = static_cast<int>((bits >> 23) & 0xFF) - 127;
  if (exponent < -14) exponent = -14;  // float16's subnormals share the smallest exponent
  const float unit = __builtin_ldexpf(1.0f, exponent - 10);
  return __builtin_rintf(value / unit) * unit;
}

struct Scratch {
  alignas(64) float logit[kMaxExperts];  // by expert
  alignas(64) float score[kMaxExperts];  // by expert; of the softmax: by place in the walk, relative to
                                         // running max
  alignas(64) float running_max[kMaxExperts];
  alignas(64) float place_logit[kMaxExperts];  // by place in the walk
  alignas(64) float chosen[kMaxExperts];       // the top-k's weights before scaling
  std::int64_t chosen_id[kMaxExperts];
  bool allowed[kMaxExperts];             // by group
  std::uint64_t key[kMaxExperts];        // by expert
  std::uint64_t place_key[kMaxExperts];  // by place in the walk
  std::uint64_t best[kMaxExperts];       // the running top-k, descending
};

void exp_of_differences(const float* x, const float* subtract, int n, float* out) {
  for (int i = 0; i < n; i += kLanes) store(out + i, exp(load(x + i) - load(subtract + i)));
}

bool is_softmax(const MaskedRouterArgs& args) { return args.score == Score::softmax; }
bool key_depends_on_mask(const MaskedRouterArgs& args) { return is_softmax(args) && args.bias; }

// What depends on the row only: logits, scores, keys.
void prepare_row(const MaskedRouterArgs& args, std::int64_t n, Scratch& s) {
  const FloatRow row = row_of(args.logits, n * args.logits.stride[0]);
  const int n_experts = static_cast<int>(row.size);
  for (int start = 0; start < n_experts; start += kBlock) {
    const int size = block_size(row, start);
    BlockBuffer buffer;
    __builtin_memcpy(s.logit + start, converted(row, start, size, Padding::zero, buffer), sizeof(float) * size);
  }
  for (int e = 0; e < n_experts; ++e) {
    const float x = s.logit[e];
    s.score[e] = x;
    if (args.score == Score::sqrtsoftplus)  // beyond 20 the softplus is x to float precision
      s.score[e] = __builtin_sqrtf(x > 20.0f ? x : __builtin_log1pf(__builtin_expf(x)));
  }
  if (args.score == Score::sigmoid) {
    for (int e = 0; e < n_experts; e += kLanes) {
      const Vec x = load(s.score + e);
      const Vec t = exp(min(x, -x));  // e^-|x| never overflows
      const Vec numerator = x < 0.0f ? t : splat(1.0f);
      store(s.score + e, numerator / (t + 1.0f));
    }
  }
  if (key_depends_on_mask(args)) return;
  for (int e = 0; e < n_experts; ++e) s.key[e] = key_of(args.bias ? s.score[e] + args.bias[e] : s.logit[e], e);
}

// The softmax's terms at each place, relative to the maximum of the places up to it.
void prepare_softmax(const std::int32_t* list, int n, Scratch& s) {
  float highest = -kInf;
  for (int i = 0; i < n; ++i) {
    const float x = s.logit[list[i]];
    s.place_logit[i] = x;
    highest = x > highest ? x : highest;
    s.running_max[i] = highest == -kInf ? 0.0f : highest;  // -inf alone: terms 0, not NaN
  }
  exp_of_differences(s.place_logit, s.running_max, n, s.score);
}

struct Denominator {
  double sum = 0;
  float highest = 0;

  void add(float term, float running_max) {
    if (running_max != highest) {
      if (sum > 0) sum *= __builtin_exp(static_cast<double>(highest) - static_cast<double>(running_max));
      highest = running_max;
    }
    sum += static_cast<double>(term);
  }
};

// What an answer needs of the present top-k. Between two stops of a nested walk the top-k rarely changes, so
// it is kept until it does.
struct Chosen {
  float* weight;  // softmaxes: exp(logit - offset); otherwise the scores
  std::int64_t* id;
  float total;
  float offset;
  bool stale = true;
};

void refresh(const MaskedRouterArgs& args, const Scratch& s, float running_max, Chosen& chosen) {
  const int k = args.top_k;
  const bool over_chosen = args.score == Score::softmax_over_chosen;
  const bool exponentials = over_chosen || is_softmax(args);
  float highest = -kInf;
  for (int j = 0; j < k; ++j) {
    const std::int32_t expert = expert_of(s.best[j]);
    chosen.id[j] = expert;
    chosen.weight[j] = exponentials ? s.logit[expert] : s.score[expert];
    highest = chosen.weight[j] > highest ? chosen.weight[j] : highest;
  }
  chosen.offset = over_chosen ? highest : running_max;
  if (is_softmax(args) && args.bias) {  // the bias may choose experts so unlikely that the fast exponential gives 0
    for (int j = 0; j < k; ++j) chosen.weight[j] = __builtin_expf(chosen.weight[j] - chosen.offset);
  } else if (exponentials) {
    for (int j = 0; j < k; j += kLanes) store(chosen.weight + j, exp(load(chosen.weight + j) - chosen.offset));
  }
  chosen.total = 0;
  for (int j = 0; j < k; ++j) chosen.total += chosen.weight[j];
  chosen.stale = false;
}

// Weights and ids of the present top-k, written to their slot.
void answer(const MaskedRouterArgs& args, const Scratch& s, Chosen& chosen, const Denominator& denominator,
            std::int64_t row, std::int32_t slot) {
  if (chosen.stale || (is_softmax(args) && chosen.offset != denominator.highest))
    refresh(args, s, denominator.highest, chosen);
  double factor = 1.0, total = static_cast<double>(chosen.total);
  if (is_softmax(args)) {
    factor = 1.0 / denominator.sum;
    total *= factor;
  } else if (args.score == Score::softmax_over_chosen) {
    factor = 1.0 / total;
    total = 1.0;
  }
  if (args.renormalize) factor /= total + args.eps;
  factor *= args.scale;
  const int k = args.top_k;
  const std::int64_t at = (slot * args.logits.shape[0] + row) * k;
  std::int64_t* __restrict ids = args.ids + at;
  float* __restrict weights = args.weights + at;
  for (int j = 0; j < k; ++j) ids[j] = chosen.id[j];
  if (is_softmax(args) && args.bias) {  // vanishing weights need a factor beyond float32
    for (int j = 0; j < k; ++j) weights[j] = static_cast<float>(static_cast<double>(chosen.weight[j]) * factor);
  } else {
    const float narrow = static_cast<float>(factor);
    for (int j = 0; j < k; ++j) weights[j] = chosen.weight[j] * narrow;
  }
  if (args.weights_dtype != DType::float32)
    for (int j = 0; j < k; ++j) weights[j] = rounded(weights[j], args.weights_dtype);
}

// Moves the places whose group is among the best topk_group to the front of place_key; returns their number.
int limit_to_groups(const MaskedRouterArgs& args, const std::int32_t* list, int n, Scratch& s) {
  const int n_experts = static_cast<int>(args.logits.shape[1]);
  const int group_size = n_experts / args.n_group;
  float* first = s.chosen;        // each group's best score for choosing, then the sum of the best two
  float* second = s.running_max;  // no longer needed here
  std::uint64_t* group_key = s.best;
  for (int g = 0; g < args.n_group; ++g) first[g] = second[g] = -kInf, group_key[g] = 0;
  for (int i = 0; i < n; ++i) {
    const int g = list[i] / group_size;
    const float x = s.place_logit[i];
    group_key[g] = 1;              // keeps an expert
    if (x > first[g] || x != x) {  // a NaN ranks first
      second[g] = first[g];
      first[g] = x;
    } else if (x > second[g]) {
      second[g] = x;
    }
  }
  for (int g = 0; g < args.n_group; ++g)
    if (group_key[g]) group_key[g] = key_of(args.group_top2_sum ? first[g] + second[g] : first[g], g);
  for (int g = 0; g < args.n_group; ++g) {
    int better = 0;
    for (int other = 0; other < args.n_group; ++other) better += group_key[other] > group_key[g];
    s.allowed[g] = group_key[g] != 0 && better < args.topk_group;
  }
  int left = 0;
  for (int i = 0; i < n; ++i)
    if (s.allowed[list[i] / group_size]) s.place_key[left++] = s.place_key[i];
  return left;
}

// Routes one row along one walk.
void walk(const MaskedRouterArgs& args, std::int64_t row, std::int64_t w, Scratch& s) {
  const std::int32_t* list = args.lists + w * args.logits.shape[1];
  const std::int32_t* stops = args.stops + w * args.n_stops;
  const std::int32_t* slots = args.slots + w * args.n_stops;
  const bool softmax = is_softmax(args);
  const int n = stops[args.n_stops - 1];
  Denominator denominator;
  int candidates = n;
  if (softmax) prepare_softmax(list, n, s);
  if (args.n_group > 1 || key_depends_on_mask(args)) {  // one stop: the whole denominator is needed first, or all keys
    if (softmax)
      for (int i = 0; i < n; ++i) denominator.add(s.score[i], s.running_max[i]);
    const float inverse = static_cast<float>(1.0 / denominator.sum);
    const bool by_logit = !args.bias && !args.group_top2_sum;
    for (int i = 0; i < n; ++i) {
      const std::int32_t expert = list[i];
      float score = s.logit[expert];
      if (!by_logit && softmax) score = __builtin_expf(score - denominator.highest) * inverse;
      if (!by_logit && !softmax) score = s.score[expert];
      if (args.bias) score += args.bias[expert];
      s.place_logit[i] = score;
      s.place_key[i] = args.bias ? key_of(score, expert) : key_of(s.logit[expert], expert);
    }
    if (args.n_group > 1) candidates = limit_to_groups(args, list, n, s);
  } else {
    for (int i = 0; i < n; ++i) s.place_key[i] = s.key[list[i]];
  }

  const bool carries_sum = softmax && !(args.n_group > 1 || key_depends_on_mask(args));
  const int k = args.top_k;
  std::int64_t stop = 0;
  Chosen chosen{s.chosen, s.chosen_id, 0, 0};
  for (int j = 0; j < k; ++j) s.best[j] = 0;  // below every key
  for (int i = 0; i < candidates; ++i) {
    if (carries_sum) denominator.add(s.score[i], s.running_max[i]);
    const std::uint64_t key = s.place_key[i];
    if (key > s.best[k - 1]) {
      int j = k - 1;
      for (; j > 0 && s.best[j - 1] < key; --j) s.best[j] = s.best[j - 1];
      s.best[j] = key;
      chosen.stale = true;
    }
    const bool last = i + 1 == candidates;
    for (; stop < args.n_stops && (stops[stop] == i + 1 || last); ++stop)
      answer(args, s, chosen, denominator, row, slots[stop]);
  }
}

}  // namespace

void masked_router(const MaskedRouterArgs& args) {
  const std::int64_t n_rows = args.logits.shape[0];
  if (args.n_walks == 0 || args.n_stops == 0) return;
  const std::int64_t walks = args.assigned ? 1 : args.n_walks;
  const double per_walk = static_cast<double>(4 * args.logits.shape[1] + 4 * args.n_stops * args.top_k);
  const int threads = useful_threads(static_cast<double>(n_rows * walks) * per_walk, args.threads);
  parallel_ranges(n_rows, kRows, threads, [&](std::int64_t first, std::int64_t last) {
    Scratch s;
    for (std::int64_t row = first; row < last; ++row) {
      prepare_row(args, row, s);
      if (args.assigned) {
        walk(args, row, args.assigned[row], s);
      } else {
        for (std::int64_t w = 0; w < args.n_walks; ++w) walk(args, row, w, s);
      }
    }
  });
}

}  // namespace moeprune::MOEPRUNE_ISA
