// overlap on the CPU, compiled once per instruction set.
//
// The rows are long (V up to 152k) and the arithmetic on each element is small, so what counts is reading
// memory once and keeping the vector units busy. A row of q is walked twice: for its log-sum-exp, which comes
// from memory, then for the metrics, which finds it in the cache. A row of p is walked once and stays in the
// cache for a block of candidates. Since min(exp a, exp b) = exp(min(a, b)), the metric esap costs one
// exponential an element in the second walk; the divergences need both.
//
// Precision. A log-sum-exp is held as hi + lo, two floats: x - hi is exact near hi (Sterbenz), where the
// probabilities are large, so an offset common to all logits costs nothing. Sums run in float32 within a
// block of 2,048 elements (4 vectors of partial sums), in float64 across blocks.
#include "overlap.h"

#include "parallel.h"
#include "simd.h"

namespace moeprune::MOEPRUNE_ISA {
namespace {

constexpr float kInf = __builtin_inff();
constexpr float kNan = __builtin_nanf("");

struct RowSummary {
  double lse;           // NaN: no softmax exists
  std::int64_t argmax;  // the lowest index of the largest element
};

Vec block_max(const float* x, int n) {
  Vec best[4] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};
  for (int i = 0; i < n; i += kStep)
    for (int u = 0; u < 4; ++u) best[u] = max(load(x + i + u * kLanes), best[u]);  // NaN is passed over
  return max(max(best[0], best[1]), max(best[2], best[3]));
}

// Sum of exp(x - offset) over a block.
double block_exp_sum(const float* x, int n, float offset) {
  Vec partial[4] = {};
  for (int i = 0; i < n; i += kStep)
    for (int u = 0; u < 4; ++u) partial[u] += exp(load(x + i + u * kLanes) - offset);
  return sum((partial[0] + partial[1]) + (partial[2] + partial[3]));
}

std::int64_t first_equal(const FloatRow& row, std::int64_t start, float value, float* buffer) {
  const int n = block_size(row, start);
  const float* x = read_block(row, start, n, -kInf, buffer);
  for (int i = 0; i < n; ++i)
    if (x[i] == value) return start + i;
  return start;
}

// One walk: the running maximum is that of the blocks seen, and the sum is rescaled when a block raises it.
RowSummary summarize(const FloatRow& row, bool with_sum, float* buffer) {
  float highest = -kInf;
  std::int64_t highest_block = 0;
  double total = 0;
  for (std::int64_t start = 0; start < row.size; start += kBlock) {
    const int n = block_size(row, start);
    const float* x = read_block(row, start, n, -kInf, buffer);
    const float here = largest(block_max(x, rounded_up(n, kStep)));
    if (here > highest) {
      total *= __builtin_exp(static_cast<double>(highest) - static_cast<double>(here));
      highest = here;
      highest_block = start;
    }
    if (with_sum) total += block_exp_sum(x, rounded_up(n, kStep), highest == -kInf ? 0.0f : highest);
  }
  double lse = static_cast<double>(highest) + __builtin_log(total);
  if (!__builtin_isfinite(lse)) lse = __builtin_nan("");
  return {lse, first_equal(row, highest_block, highest, buffer)};
}

// x -> log probability, with the log-sum-exp split in two floats.
struct LogProbability {
  float hi, lo;

  explicit LogProbability(double lse)
      : hi(static_cast<float>(lse)), lo(static_cast<float>(lse - static_cast<double>(hi))) {}
  Vec operator()(Vec x) const { return (x - hi) - lo; }
  double operator()(float x) const {
    return static_cast<double>(x) - (static_cast<double>(hi) + static_cast<double>(lo));
  }
};

// Sum of min(p, q) over a block. p's low part is left to one factor per block, which saves a subtraction an
// element.
double block_esap(const float* p, const float* q, int n, LogProbability log_p, LogProbability log_q) {
  const float lo = log_q.lo - log_p.lo;
  Vec partial[4] = {};
  for (int i = 0; i < n; i += kStep)
    for (int u = 0; u < 4; ++u) {
      const Vec a = load(p + i + u * kLanes) - log_p.hi;
      const Vec b = (load(q + i + u * kLanes) - log_q.hi) - lo;
      partial[u] += exp(min(b, a));  // a where it is NaN; b is not, its log-sum-exp is finite
    }
  const double total = sum((partial[0] + partial[1]) + (partial[2] + partial[3]));
  return total * __builtin_exp(-static_cast<double>(log_p.lo));
}

struct Divergences {
  double esap = 0, kl_pq = 0, kl_qp = 0;
};

// prob_a (log a - log b), 0 where a is impossible, +inf where b is and a is not.
MOEPRUNE_INLINE Vec kl_terms(Vec prob_a, Vec log_a, Vec log_b) {
  const Vec terms = log_b == -kInf ? splat(kInf) : prob_a * (log_a - log_b);
  return log_a == -kInf ? Vec{} : terms;
}

void add_block(const float* p, const float* q, int n, LogProbability log_p, LogProbability log_q, Divergences& sums) {
  Vec esap[2] = {}, kl_pq[2] = {}, kl_qp[2] = {};
  for (int i = 0; i < n; i += 2 * kLanes)
    for (int u = 0; u < 2; ++u) {
      const Vec a = log_p(load(p + i + u * kLanes));
      const Vec b = log_q(load(q + i + u * kLanes));
      const Vec prob_p = exp(a), prob_q = exp(b);
      esap[u] += min(prob_q, prob_p);
      kl_pq[u] += kl_terms(prob_p, a, b);
      kl_qp[u] += kl_terms(prob_q, b, a);
    }
  sums.esap += sum(esap[0]) + sum(esap[1]);
  sums.kl_pq += sum(kl_pq[0]) + sum(kl_pq[1]);
  sums.kl_qp += sum(kl_qp[0]) + sum(kl_qp[1]);
}

// The first token whose cumulative probability exceeds u; the last possible one where rounding keeps all
// below u.
std::int64_t draw(const FloatRow& row, LogProbability log_prob, double u, float* buffer) {
  const double low_factor = __builtin_exp(-static_cast<double>(log_prob.lo));
  double below = 0;
  std::int64_t last_possible = 0;
  for (std::int64_t start = 0; start < row.size; start += kBlock) {
    const int n = block_size(row, start);
    const float* x = read_block(row, start, n, -kInf, buffer);
    const double mass = block_exp_sum(x, rounded_up(n, kStep), log_prob.hi) * low_factor;
    const bool last_block = start + n == row.size;
    if (below + mass > u || last_block) {
      for (int i = 0; i < n; ++i) {
        const double prob = __builtin_exp(log_prob(x[i]));
        if (prob > 0) last_possible = start + i;
        below += prob;
        if (below > u) return start + i;
      }
    } else {
      below += mass;
      for (int i = n - 1; mass > 0 && i >= 0; --i)
        if (x[i] > -kInf) {
          last_possible = start + i;
          break;
        }
    }
  }
  return last_possible;
}

MOEPRUNE_INLINE float element(const FloatRow& row, std::int64_t index) {
  float buffer[kStep];
  return *read_block(row, index, 1, 0.0f, buffer);
}

struct Buffers {
  alignas(64) float p[kBlock];
  alignas(64) float q[kBlock];
};

void compare_rows(const OverlapArgs& args, const FloatRow& p, RowSummary p_summary, std::int64_t c, std::int64_t t,
                  Buffers& buffers) {
  const std::int64_t n_rows = args.p.shape[0];
  const FloatRow q = row_of(args.q, c * args.q.stride[0] + t * args.q.stride[1]);
  const RowSummary q_summary = summarize(q, true, buffers.q);
  const LogProbability log_p(p_summary.lse), log_q(q_summary.lse);

  double value[kMetrics] = {};
  if (!__builtin_isfinite(p_summary.lse) || !__builtin_isfinite(q_summary.lse)) {
    for (double& v : value) v = kNan;
  } else {
    Divergences sums;
    const bool divergences = args.out[kKlPq] || args.out[kKlQp];
    if (divergences || args.out[kEsap]) {
      for (std::int64_t start = 0; start < q.size; start += kBlock) {
        const int n = block_size(q, start), padded = rounded_up(n, kStep);
        const float* x = read_block(p, start, n, -kInf, buffers.p);
        const float* y = read_block(q, start, n, -kInf, buffers.q);
        if (divergences) {
          add_block(x, y, padded, log_p, log_q, sums);
        } else {
          sums.esap += block_esap(x, y, padded, log_p, log_q);
        }
      }
    }
    value[kEsap] = sums.esap;
    value[kKlPq] = sums.kl_pq;
    value[kKlQp] = sums.kl_qp;
    value[kTop1Agree] = p_summary.argmax == q_summary.argmax;
    if (args.out[kNll] && args.labels[t] >= 0) value[kNll] = -log_q(element(q, args.labels[t]));
    if (args.out[kAccept]) {
      const std::int64_t token = draw(q, log_q, args.uniform[t], buffers.q);
      const double ratio = __builtin_exp(log_p(element(p, token)) - log_q(element(q, token)));
      value[kAccept] = ratio > 1 ? 1 : ratio;
    }
  }
  const double weight = args.weight ? args.weight[t] : 1.0;
  for (int metric = 0; metric < kMetrics; ++metric)
    if (args.out[metric]) args.out[metric][c * n_rows + t] = static_cast<float>(value[metric] * weight);
}

}  // namespace

void overlap(const OverlapArgs& args) {
  const std::int64_t n_candidates = args.q.shape[0], n_rows = args.p.shape[0];
  const double elements = static_cast<double>(n_candidates * n_rows) * static_cast<double>(args.p.shape[1]);
  const int threads = useful_threads(elements, args.threads);
  // A task is a row of p with a block of candidates: all of them where there are rows enough to go round.
  const bool enough_rows = n_rows >= 4 * threads;
  const std::int64_t per_task = enough_rows ? n_candidates : 1 + (n_candidates - 1) / threads;
  const std::int64_t blocks = per_task > 0 ? (n_candidates + per_task - 1) / per_task : 0;
  parallel_ranges(n_rows * blocks, 1, threads, [&](std::int64_t task, std::int64_t) {
    const std::int64_t t = task / blocks, first = task % blocks * per_task;
    const std::int64_t last = first + per_task < n_candidates ? first + per_task : n_candidates;
    if (args.weight && args.weight[t] == 0) {
      for (float* out : args.out)
        for (std::int64_t c = first; out && c < last; ++c) out[c * n_rows + t] = 0;
      return;
    }
    Buffers buffers;
    const FloatRow p = row_of(args.p, t * args.p.stride[0]);
    RowSummary p_summary{args.p_lse ? args.p_lse[t] : 0, 0};
    if (!args.p_lse) {
      p_summary = summarize(p, true, buffers.p);
    } else if (args.out[kTop1Agree]) {
      p_summary.argmax = summarize(p, false, buffers.p).argmax;
    }
    for (std::int64_t c = first; c < last; ++c) compare_rows(args, p, p_summary, c, t, buffers);
  });
}

void log_sum_exp(const LogSumExpArgs& args) {
  const double elements = static_cast<double>(args.logits.shape[0] * args.logits.shape[1]);
  parallel_ranges(args.logits.shape[0], 1, useful_threads(elements, args.threads), [&](std::int64_t r, std::int64_t) {
    alignas(64) float buffer[kBlock];
    args.lse[r] = summarize(row_of(args.logits, r * args.logits.stride[0]), true, buffer).lse;
  });
}

}  // namespace moeprune::MOEPRUNE_ISA
