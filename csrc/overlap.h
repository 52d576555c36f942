// overlap: how alike the next-token distributions of a teacher (p) and of C candidates (q) are, row by row.
//
//   p [T, V], q [C, T, V]: logits, float32 | bfloat16 | float16, any strides; p and q below are their softmaxes
//   out[metric] [C, T] float32, contiguous, null where not asked for, each multiplied by weight[t]:
//     esap        sum_v min(p, q)
//     kl_pq       sum_v p (log p - log q)        kl_qp       sum_v q (log q - log p)
//     top1_agree  1 where argmax p = argmax q, the lowest index among equals
//     nll         -log q[labels[t]]; 0 where the label is -100
//     accept      min(1, p/q) at the first token whose cumulative probability under q exceeds uniform[t]
//
// A logit of -inf is probability 0, and 0 log 0 = 0; a KL is +inf where it must be. A row with NaN or +inf,
// or of -inf only, gives NaN in every metric. Rows of weight 0 are not read and give 0. Arithmetic is float32
// with blocked partial sums in float64: the error stays under 2e-6 at V = 152k. The result of a row does not
// depend on the number of threads or on the other rows.
#pragma once

#include "tensor.h"

namespace moeprune {

enum Metric : int { kEsap, kKlPq, kKlQp, kTop1Agree, kNll, kAccept, kMetrics };

struct OverlapArgs {
  TensorView p, q;
  const double* p_lse;          // [T], log sum exp of p's rows; null: computed here
  const double* weight;         // [T] or null: all 1
  const std::int64_t* labels;   // [T], needed for nll
  const double* uniform;        // [T] in [0, 1), needed for accept
  float* workspace;             // [workspace_size], CPU only; any size, without changing the results. Useful: the V of
  std::int64_t workspace_size;  // a row and a little for each thread, twice that with several candidates
  float* out[kMetrics];
  int threads;
  void* stream;
};

// lse[r] = log sum_v exp(logits[r, v]) as float64, NaN where the softmax does not exist; logits [R, V].
struct LogSumExpArgs {
  TensorView logits;
  double* lse;
  int threads;
  void* stream;
};

namespace portable {
void overlap(const OverlapArgs& args);
void log_sum_exp(const LogSumExpArgs& args);
}  // namespace portable
namespace avx2 {
void overlap(const OverlapArgs& args);
void log_sum_exp(const LogSumExpArgs& args);
}  // namespace avx2
namespace avx512 {
void overlap(const OverlapArgs& args);
void log_sum_exp(const LogSumExpArgs& args);
}  // namespace avx512

void overlap_cuda(const OverlapArgs& args);
void log_sum_exp_cuda(const LogSumExpArgs& args);

}  // namespace moeprune
