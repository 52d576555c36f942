// overlap on CUDA: plain, not yet tuned.
//
// One block per pair of rows. It walks p (unless its log-sum-exp is given), then q, for the log-sum-exps,
// then both for the metrics. Threads keep float32 sums of some hundreds of elements each; across threads they
// are added in float64 in a fixed tree, so results are deterministic.
#include "cuda_utils.cuh"
#include "overlap.h"

namespace moeprune {
namespace {

struct Row {
  const TensorView* tensor;
  std::int64_t offset, stride, size;

  __device__ float operator[](std::int64_t i) const { return float_at(*tensor, offset + i * stride); }
};

struct Best {
  float value;
  std::int64_t index;
};

// The larger value, the lower index among equals.
struct BestOf {
  __device__ Best operator()(Best a, Best b) const {
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
  }
};

__device__ std::int64_t block_argmax(const Row& row) {
  Best best{-INFINITY, row.size};
  for (std::int64_t i = threadIdx.x; i < row.size; i += kThreads) best = BestOf()(best, Best{row[i], i});
  return block_reduce(best, BestOf()).index;
}

// NaN where no softmax exists.
__device__ double block_log_sum_exp(const Row& row) {
  float highest = -INFINITY;
  double total = 0;  // in float32, rows of equal logits round the same way in every thread
  for (std::int64_t i = threadIdx.x; i < row.size; i += kThreads) {
    const float x = row[i];
    if (x > highest) {
      total = total * static_cast<double>(expf(highest - x)) + 1;
      highest = x;
    } else if (!(x == -INFINITY)) {
      total += static_cast<double>(expf(x - highest));
    }
  }
  const double block_highest = block_reduce(static_cast<double>(highest), NanMax());
  const double scaled = total == 0 ? 0.0 : total * exp(highest - block_highest);
  const double lse = block_highest + log(block_reduce(scaled, Sum()));
  return isfinite(lse) ? lse : static_cast<double>(NAN);
}

struct LogProbability {
  float hi, lo;  // x - hi is exact near hi

  __device__ explicit LogProbability(double lse)
      : hi(static_cast<float>(lse)), lo(static_cast<float>(lse - static_cast<double>(hi))) {}
  __device__ float operator()(float x) const { return (x - hi) - lo; }
};

__device__ float kl_term(float prob_a, float log_a, float log_b) {
  if (log_a == -INFINITY) return 0;
  return log_b == -INFINITY ? INFINITY : prob_a * (log_a - log_b);
}

struct DrawnToken {
  std::int64_t value;
};

// The first token whose cumulative probability exceeds u; the last possible one where rounding keeps all
// below u.
__device__ std::int64_t block_draw(const Row& row, LogProbability log_prob, double u) {
  std::int64_t& token = block_shared<DrawnToken>().value;
  constexpr int kTile = 8 * kThreads;
  double below = 0;
  if (threadIdx.x == 0) token = -1;
  for (std::int64_t start = 0; start < row.size; start += kTile) {
    const std::int64_t end = start + kTile < row.size ? start + kTile : row.size;
    double mass = 0;
    for (std::int64_t i = start + threadIdx.x; i < end; i += kThreads) mass += expf(log_prob(row[i]));
    mass = block_reduce(mass, Sum());
    if (below + mass > u || end == row.size) {  // the same decision in every thread
      if (threadIdx.x == 0) {
        for (std::int64_t i = start; i < end; ++i) {
          below += expf(log_prob(row[i]));
          if (below > u) {
            token = i;
            break;
          }
        }
        for (std::int64_t i = end - 1; token < 0 && i >= 0; --i)
          if (i == 0 || row[i] > -INFINITY) token = i;
      }
      break;
    }
    below += mass;
  }
  __syncthreads();
  return token;
}

__global__ void overlap_kernel(OverlapArgs args) {
  const std::int64_t n_rows = args.p.shape[0];
  const std::int64_t t = blockIdx.x % n_rows, c = blockIdx.x / n_rows;
  const double weight = args.weight ? args.weight[t] : 1.0;
  double value[kMetrics] = {};
  if (weight != 0) {
    const Row p{&args.p, t * args.p.stride[0], args.p.stride[1], args.p.shape[1]};
    const Row q{&args.q, c * args.q.stride[0] + t * args.q.stride[1], args.q.stride[2], args.q.shape[2]};
    const double p_lse = args.p_lse ? args.p_lse[t] : block_log_sum_exp(p);
    const double q_lse = block_log_sum_exp(q);
    const LogProbability log_p(p_lse), log_q(q_lse);
    const bool divergences = args.out[kKlPq] || args.out[kKlQp];
    if (divergences || args.out[kEsap]) {
      double esap = 0, kl_pq = 0, kl_qp = 0;
      for (std::int64_t i = threadIdx.x; i < p.size; i += kThreads) {
        const float a = log_p(p[i]), b = log_q(q[i]);
        if (divergences) {
          const float prob_p = expf(a), prob_q = expf(b);
          esap += static_cast<double>(prob_q < prob_p ? prob_q : prob_p);  // p where it is NaN
          kl_pq += static_cast<double>(kl_term(prob_p, a, b));
          kl_qp += static_cast<double>(kl_term(prob_q, b, a));
        } else {
          esap += static_cast<double>(expf(b < a ? b : a));
        }
      }
      value[kEsap] = block_reduce(esap, Sum());
      value[kKlPq] = block_reduce(kl_pq, Sum());
      value[kKlQp] = block_reduce(kl_qp, Sum());
    }
    if (args.out[kTop1Agree]) value[kTop1Agree] = block_argmax(p) == block_argmax(q);
    if (args.out[kNll] && args.labels[t] >= 0) value[kNll] = q_lse - q[args.labels[t]];
    if (args.out[kAccept]) {
      const std::int64_t token = block_draw(q, log_q, args.uniform[t]);
      const double ratio = exp((p[token] - p_lse) - (q[token] - q_lse));
      value[kAccept] = ratio > 1 ? 1 : ratio;
    }
    if (!isfinite(p_lse) || !isfinite(q_lse))
      for (double& v : value) v = NAN;
    for (double& v : value) v *= weight;
  }
  if (threadIdx.x == 0)
    for (int metric = 0; metric < kMetrics; ++metric)
      if (args.out[metric]) args.out[metric][c * n_rows + t] = static_cast<float>(value[metric]);
}

__global__ void log_sum_exp_kernel(LogSumExpArgs args) {
  const std::int64_t r = blockIdx.x;
  const double lse =
      block_log_sum_exp(Row{&args.logits, r * args.logits.stride[0], args.logits.stride[1], args.logits.shape[1]});
  if (threadIdx.x == 0) args.lse[r] = lse;
}

}  // namespace

void overlap_cuda(const OverlapArgs& args) {
  const std::int64_t blocks = args.p.shape[0] * args.q.shape[0];
  if (blocks > 0x7FFFFFFF) throw std::invalid_argument("overlap: more than 2^31 - 1 rows in one call on CUDA");
  launch(overlap_kernel, {dim3(static_cast<unsigned>(blocks)), kThreads}, args.stream, args);
}

void log_sum_exp_cuda(const LogSumExpArgs& args) {
  const std::int64_t blocks = args.logits.shape[0];
  if (blocks > 0x7FFFFFFF) throw std::invalid_argument("log_sum_exp: more than 2^31 - 1 rows in one call on CUDA");
  launch(log_sum_exp_kernel, {dim3(static_cast<unsigned>(blocks)), kThreads}, args.stream, args);
}

}  // namespace moeprune
