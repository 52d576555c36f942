// overlap on the CPU, compiled once per instruction set.
//
// The rows are long (V up to 152k) and the arithmetic on each element is small, so what counts is reading
// memory once and keeping the vector units busy. A row of q is walked twice: for its log-sum-exp, which comes
// from memory, then for the metrics, which finds it in the cache. A row of p is walked once and stays in the
// cache for a block of candidates. An element needs one exponential for q's log-sum-exp and one of p: the first is
// kept until the comparison, the second for all candidates of the row, as far as the workspace goes (a row's
// exponentials fit the second- or third-level cache). The divergences compute theirs anew.
//
// Precision. A log-sum-exp is held as hi + lo, two floats: x - hi is exact near hi (Sterbenz), where the
// probabilities are large, so an offset common to all logits costs nothing. Sums run in float32 within a
// block of 1,024 elements (a vector of partial sums), in float64 across blocks.
#include "overlap.h"

#include "cpu/log_sum_exp.h"
#include "cpu/parallel.h"

namespace moeprune::MOEPRUNE_ISA {
namespace {

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

// Exponentials of a row's first blocks, kept where there is room: the teacher's for all candidates of a row, a
// candidate's from its log-sum-exp to its comparison. Those of later blocks are computed again, to the same bits.
struct Kept {
  std::int64_t blocks;
  float* terms;    // [blocks][kBlock]
  float* offsets;  // [blocks]: terms are exp(x - offset)

  Kept(float* room, std::int64_t size) : blocks(size / (kBlock + 1)), terms(room), offsets(room + blocks * kBlock) {}
  float* block(std::int64_t start) const { return start / kBlock < blocks ? terms + start : nullptr; }
};

// Sum of min(p, q) over a block, q as exp(x - offset) still to be multiplied by `scale`. p where either is NaN.
template <class T>
MOEPRUNE_NOINLINE DoubleVec block_esap(const T* p, const float* q_terms, int n, float p_offset, float scale) {
  Vec partial = {};
  for (int i = 0; i < n; i += kStep) {
    prefetch_step(p + i);
    prefetch_step(q_terms + i);
    Vec term[4];
    for (int h = 0; h < 2; ++h) {
      const Pair x = load_pair(p + i + h * kPair), y = load_pair(q_terms + i + h * kPair);
      for (int u = 0; u < 2; ++u) term[2 * h + u] = min(y.half[u] * scale, exp(x.half[u] - p_offset));
    }
    partial += (term[0] + term[1]) + (term[2] + term[3]);
  }
  return widened(partial);
}

// The same with p's exponentials kept.
MOEPRUNE_NOINLINE DoubleVec block_esap(const float* p_terms, const float* q_terms, int n, float scale) {
  Vec partial = {};
  for (int i = 0; i < n; i += kStep) {
    prefetch_step(p_terms + i);
    prefetch_step(q_terms + i);
    Vec term[4];
    for (int u = 0; u < 4; ++u) term[u] = min(load(q_terms + i + u * kLanes) * scale, load(p_terms + i + u * kLanes));
    partial += (term[0] + term[1]) + (term[2] + term[3]);
  }
  return widened(partial);
}

struct Sums {
  DoubleVec esap = {}, kl_pq = {}, kl_qp = {};
};

// prob_a (log a - log b), 0 where a is impossible, +inf where b is and a is not.
MOEPRUNE_INLINE Vec kl_terms(Vec prob_a, Vec log_a, Vec log_b) {
  const Vec terms = log_b == -kInf ? splat(kInf) : prob_a * (log_a - log_b);
  return log_a == -kInf ? Vec{} : terms;
}

template <class T>
MOEPRUNE_INLINE void add_block(const T* p, const T* q, int n, LogProbability log_p, LogProbability log_q, Sums& sums) {
  Vec esap[2] = {}, kl_pq[2] = {}, kl_qp[2] = {};
  for (int i = 0; i < n; i += kPair) {
    const Pair x = load_pair(p + i), y = load_pair(q + i);
    for (int u = 0; u < 2; ++u) {
      const Vec a = log_p(x.half[u]);
      const Vec b = log_q(y.half[u]);
      const Vec prob_p = exp(a), prob_q = exp(b);
      esap[u] += min(prob_q, prob_p);
      kl_pq[u] += kl_terms(prob_p, a, b);
      kl_qp[u] += kl_terms(prob_q, b, a);
    }
  }
  sums.esap += widened(esap[0] + esap[1]);
  sums.kl_pq += widened(kl_pq[0] + kl_pq[1]);
  sums.kl_qp += widened(kl_qp[0] + kl_qp[1]);
}

// The first token whose cumulative probability exceeds u; the last possible one where rounding keeps all
// below u.
std::int64_t draw(const FloatRow& row, LogProbability log_prob, double u, BlockBuffer& buffer) {
  const double low_factor = __builtin_exp(-static_cast<double>(log_prob.lo));
  double below = 0;
  std::int64_t last_possible = 0;
  for (std::int64_t start = 0; start < row.size; start += kBlock) {
    const int n = block_size(row, start);
    const float* x = converted(row, start, n, Padding::minus_infinity, buffer);
    const double mass = sum(block_exp_sum<false>(x, rounded_up(n, kStep), log_prob.hi).sum) * low_factor;
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

// Whether esap is computed by itself, from kept exponentials, or along with the divergences.
bool keeps_exponentials(const OverlapArgs& args) { return args.out[kEsap] && !args.out[kKlPq] && !args.out[kKlQp]; }

struct Buffers {
  BlockBuffer p, q;
  alignas(64) float terms[kBlock];
};

// What a thread needs to compare a row of p with candidates.
struct Task {
  FloatRow p;
  RowSummary p_summary;
  std::int64_t t;
  Kept kept_p, kept_q;
  bool in_order;       // the rows' dtypes differ, so their loads come in the order of memory
  float kept_highest;  // of q's kept blocks, where computing again goes on
  Buffers& buffers;
};

// Leaves exp(p - hi) of the blocks that there is room for.
void keep_teacher(Task& task) {
  const float hi = LogProbability(task.p_summary.lse).hi;
  for (std::int64_t start = 0; start < task.p.size && task.kept_p.block(start); start += kBlock)
    with_block(
        task.p, start, block_size(task.p, start), Padding::minus_infinity, task.buffers.p,
        [&](auto x, int n) { block_exp_sum<true>(x, n, hi, task.kept_p.block(start)); }, task.in_order);
}

RowSummary summarize_and_keep(const FloatRow& q, Task& task) {
  ExpWalk walk;
  task.kept_highest = walk.highest;
  for (std::int64_t start = 0; start < q.size; start += kBlock)
    with_block(
        q, start, block_size(q, start), Padding::minus_infinity, task.buffers.q,
        [&](auto x, int n) {
          float* kept = task.kept_q.block(start);
          const float offset = walk.add<true>(x, n, start, kept ? kept : task.buffers.terms);
          if (!kept) return;
          task.kept_q.offsets[start / kBlock] = offset;
          task.kept_highest = walk.highest;
        },
        task.in_order);
  return walk.summary();
}

double esap(const FloatRow& q, RowSummary q_summary, Task& task) {
  const LogProbability log_p(task.p_summary.lse);
  const double low = static_cast<double>(log_p.lo);  // common to all of p: a factor of the result
  ExpWalk walk;                                      // over the blocks that were not kept
  walk.highest = task.kept_highest;
  float offset = kNan, scale = 0;
  DoubleVec total = {};
  for (std::int64_t start = 0; start < q.size; start += kBlock) {
    const int n = block_size(q, start);
    const float* q_terms = task.kept_q.block(start);
    float q_offset = 0;
    if (q_terms) {
      q_offset = task.kept_q.offsets[start / kBlock];
    } else {
      with_block(
          q, start, n, Padding::minus_infinity, task.buffers.q,
          [&](auto x, int size) { q_offset = walk.add<true>(x, size, start, task.buffers.terms); }, task.in_order);
      q_terms = task.buffers.terms;
    }
    if (q_offset != offset) {
      offset = q_offset;
      scale = static_cast<float>(__builtin_exp(static_cast<double>(offset) - q_summary.lse + low));
    }
    if (const float* p_terms = task.kept_p.block(start)) {
      total += block_esap(p_terms, q_terms, rounded_up(n, kStep), scale);
    } else {
      with_block(
          task.p, start, n, Padding::minus_infinity, task.buffers.p,
          [&](auto x, int size) { total += block_esap(x, q_terms, size, log_p.hi, scale); }, task.in_order);
    }
  }
  return sum(total) * __builtin_exp(-low);
}

void compare_rows(const OverlapArgs& args, std::int64_t c, Task& task) {
  const std::int64_t n_rows = args.p.shape[0], t = task.t;
  const FloatRow& p = task.p;
  const FloatRow q = row_of(args.q, c * args.q.stride[0] + t * args.q.stride[1]);
  const bool keeps = keeps_exponentials(args);
  const RowSummary q_summary = keeps ? summarize_and_keep(q, task) : summarize(q, task.buffers.q);
  const LogProbability log_p(task.p_summary.lse), log_q(q_summary.lse);

  double value[kMetrics] = {};
  if (!__builtin_isfinite(task.p_summary.lse) || !__builtin_isfinite(q_summary.lse)) {
    for (double& v : value) v = kNan;
  } else {
    if (keeps) value[kEsap] = esap(q, q_summary, task);
    if (args.out[kKlPq] || args.out[kKlQp]) {
      Sums sums;
      for (std::int64_t start = 0; start < q.size; start += kBlock)
        with_blocks(p, q, start, block_size(q, start), Padding::minus_infinity, task.buffers.p, task.buffers.q,
                    [&](auto x, auto y, int n) { add_block(x, y, n, log_p, log_q, sums); });
      value[kEsap] = sum(sums.esap);
      value[kKlPq] = sum(sums.kl_pq);
      value[kKlQp] = sum(sums.kl_qp);
    }
    if (args.out[kTop1Agree]) value[kTop1Agree] = argmax(p, task.p_summary) == argmax(q, q_summary);
    if (args.out[kNll] && args.labels[t] >= 0) value[kNll] = -log_q(element(q, args.labels[t]));
    if (args.out[kAccept]) {
      const std::int64_t token = draw(q, log_q, args.uniform[t], task.buffers.q);
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
  const std::int64_t room = args.workspace_size / threads;
  parallel_ranges(n_rows * blocks, 1, threads, [&](std::int64_t index, std::int64_t) {
    const std::int64_t t = index / blocks, first = index % blocks * per_task;
    const std::int64_t last = first + per_task < n_candidates ? first + per_task : n_candidates;
    if (args.weight && args.weight[t] == 0) {
      for (float* out : args.out)
        for (std::int64_t c = first; out && c < last; ++c) out[c * n_rows + t] = 0;
      return;
    }
    // The thread's room is q's, or half of it p's where p meets several candidates.
    float* mine = args.workspace + thread_index() * room;
    const std::int64_t for_q = last - first > 1 ? room / 2 / 16 * 16 : room;
    Buffers buffers;
    Task task{row_of(args.p, t * args.p.stride[0]), {},    t,      Kept(mine + for_q, room - for_q), Kept(mine, for_q),
              args.p.dtype != args.q.dtype,         -kInf, buffers};
    if (!args.p_lse) {
      task.p_summary = summarize(task.p, task.buffers.p);
    } else {
      if (args.out[kTop1Agree]) task.p_summary = summarize_maximum(task.p, task.buffers.p);
      task.p_summary.lse = args.p_lse[t];
    }
    if (keeps_exponentials(args)) keep_teacher(task);
    for (std::int64_t c = first; c < last; ++c) compare_rows(args, c, task);
  });
}

void log_sum_exp(const LogSumExpArgs& args) {
  const double elements = static_cast<double>(args.logits.shape[0] * args.logits.shape[1]);
  parallel_ranges(args.logits.shape[0], 1, useful_threads(elements, args.threads), [&](std::int64_t r, std::int64_t) {
    BlockBuffer buffer;
    args.lse[r] = summarize(row_of(args.logits, r * args.logits.stride[0]), buffer).lse;
  });
}

}  // namespace moeprune::MOEPRUNE_ISA
