// overlap on CUDA.
//
// A row of logits is long (V = 152k is 300 KB in bfloat16) and is needed twice: for its log-sum-exp, then for the
// metrics. So a row of q is read once and held: in the registers of one block or, on Hopper, of a cluster of up to
// eight, each of which has a share of every row's vectors of 16 bytes. What does not fit, on older chips or beyond
// 328k logits of 2 bytes or 164k of 4, is read again, from the second-level cache if all goes well. A row of p is held
// likewise, in shared memory, for all of its candidates, which come one after the other, the next being fetched while
// one is compared.
//
// Blocks and clusters exchange a maximum and a sum, then the metrics' sums. Which thread takes an element depends on
// its index and on V only, never on addresses, so strided and unaligned rows give the bits of their copies. Sums run
// in float32 over at most some dozens of terms a thread, in float64 across threads, in a fixed order.
#include "cuda/long_rows.cuh"
#include "overlap.h"

namespace moeprune {
namespace {

constexpr int kBlock = 512;  // threads
constexpr int kMaxCluster = 8;
constexpr int kFew = 5, kMany = 10;  // vectors of q that a thread holds: few let two blocks share a multiprocessor

// ---- rows

using RowOfP = Row<1>;
using RowOfQ = Row<2>;

__device__ RowOfP p_row(const OverlapArgs& args, std::int64_t t) { return RowOfP(args.p, t * args.p.stride[0]); }

__device__ RowOfQ q_row(const OverlapArgs& args, std::int64_t c, std::int64_t t) {
  return RowOfQ(args.q, c * args.q.stride[0] + t * args.q.stride[1]);
}

// ---- metrics

// Log probabilities. x - hi is exact near hi, so that an offset common to all logits costs nothing.
struct LogProbability {
  float hi, lo;

  __device__ explicit LogProbability(double lse)
      : hi(static_cast<float>(lse)), lo(static_cast<float>(lse - static_cast<double>(hi))) {}
  __device__ float operator()(float x) const { return (x - hi) - lo; }
  __device__ float base2(float x) const { return fmaf(x - hi, kLog2E, -lo * kLog2E); }
};

// prob_a (log a - log b), 0 where a is impossible, +inf where b is and a is not.
__device__ float kl_term(float prob_a, float log_a, float log_b) {
  if (log_a == -INFINITY) return 0;
  return log_b == -INFINITY ? INFINITY : prob_a * (log_a - log_b);
}

// An order of (value, lower index first) in one integer; 0 ranks below all.
__device__ std::uint64_t ranked(float value, std::uint32_t index) {
  const std::uint32_t raw = __float_as_uint(value + 0.0f);  // -0 and +0 are equal
  const std::uint32_t ordered = raw & 0x80000000u ? ~raw : raw | 0x80000000u;
  return static_cast<std::uint64_t>(ordered) << 32 | static_cast<std::uint32_t>(~index);
}

// A thread's share of the metrics.
struct Sums {
  float esap = 0;
  double kl_pq = 0, kl_qp = 0;
  std::uint64_t best_p = 0, best_q = 0;

  template <bool kEsapOnly, int n>
  __device__ void add(const float (&x)[n], const float (&y)[n], int first, LogProbability log_p, LogProbability log_q) {
    float smaller[n];
    if constexpr (kEsapOnly) {
#pragma unroll
      for (int i = 0; i < n; ++i) smaller[i] = fast_exp2(min_or_nan(log_p.base2(x[i]), log_q.base2(y[i])));
    } else {
      float pq[n], qp[n];
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const float a = log_p(x[i]), b = log_q(y[i]);
        const float prob_p = expf(a), prob_q = expf(b);
        smaller[i] = min_or_nan(prob_p, prob_q);
        pq[i] = kl_term(prob_p, a, b);
        qp[i] = kl_term(prob_q, b, a);
        const std::uint32_t index = static_cast<std::uint32_t>(first + i);
        const std::uint64_t p_rank = ranked(x[i], index), q_rank = ranked(y[i], index);
        best_p = p_rank > best_p ? p_rank : best_p;
        best_q = q_rank > best_q ? q_rank : best_q;
      }
      kl_pq += tree_sum(pq);
      kl_qp += tree_sum(qp);
    }
    esap += tree_sum(smaller);
  }
};

// What the blocks of a cluster tell each other; see LseExchange for when it may be written.
struct SumExchange {
  double sums[3];
  std::uint64_t best[2];
};

// The cluster's sums, for the first thread of its first block, in its exchange.
template <bool kEsapOnly>
__device__ void combine(const Sums& sums) {
  auto& mine = block_shared<SumExchange>();
  const double esap = block_reduce(static_cast<double>(sums.esap), Sum());
  if (threadIdx.x == 0) mine.sums[0] = esap;
  if constexpr (!kEsapOnly) {
    const double kl_pq = block_reduce(sums.kl_pq, Sum()), kl_qp = block_reduce(sums.kl_qp, Sum());
    const std::uint64_t best_p = block_reduce(sums.best_p, Max()), best_q = block_reduce(sums.best_q, Max());
    if (threadIdx.x == 0) {
      mine.sums[1] = kl_pq;
      mine.sums[2] = kl_qp;
      mine.best[0] = best_p;
      mine.best[1] = best_q;
    }
  }
  cluster_sync();
  if (cluster_rank() != 0 || threadIdx.x >= 32) return;
  const bool present = threadIdx.x < cluster_size();  // a lane to a block
  const SumExchange& theirs = *cluster_shared(&mine, present ? threadIdx.x : 0);
  double sum[kEsapOnly ? 1 : 3];
  std::uint64_t best[2] = {};
  for (double& value : sum) value = present ? theirs.sums[&value - sum] : 0;
  for (int i = 0; !kEsapOnly && i < 2; ++i) best[i] = present ? theirs.best[i] : 0;
  for (int lanes = kMaxCluster / 2; lanes > 0; lanes /= 2) {
    for (double& value : sum) value += __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
    for (int i = 0; !kEsapOnly && i < 2; ++i) best[i] = Max()(best[i], __shfl_xor_sync(0xFFFFFFFFu, best[i], lanes));
  }
  if (threadIdx.x != 0) return;
  for (double& value : sum) mine.sums[&value - sum] = value;
  for (int i = 0; !kEsapOnly && i < 2; ++i) mine.best[i] = best[i];
}

// Writes the metrics of candidate c that are not a kernel of their own.
__device__ void write(const OverlapArgs& args, std::int64_t t, std::int64_t c, double p_lse, double q_lse,
                      double weight) {
  const auto& total = block_shared<SumExchange>();
  double value[kAccept] = {total.sums[0], total.sums[1], total.sums[2], 0, 0};
  value[kTop1Agree] = total.best[0] << 32 == total.best[1] << 32;  // the same index
  if (args.out[kNll] && args.labels[t] >= 0) value[kNll] = q_lse - q_row(args, c, t)[static_cast<int>(args.labels[t])];
  const bool exists = isfinite(p_lse) && isfinite(q_lse);
  for (int metric = 0; metric < kAccept; ++metric)
    if (args.out[metric])
      args.out[metric][c * args.p.shape[0] + t] = static_cast<float>(exists ? value[metric] * weight : NAN);
}

// Blocks that share a multiprocessor, by the kernel's registers.
template <bool kWhole, int kHeld, bool kEsapOnly>
constexpr int kResident = kWhole && kHeld == kFew && kEsapOnly ? 2 : 1;

// A cluster takes a row of p and up to `per_cluster` of its candidates, one after the other. kHeld vectors of p stay in
// each thread's shared memory, and as many of the candidate's row in its registers; while it is compared, those of the
// next are fetched.
template <class T, bool kWhole, int kHeld, bool kEsapOnly>
__global__ void __launch_bounds__(kBlock, kResident<kWhole, kHeld, kEsapOnly>)
    overlap_kernel(OverlapArgs args, std::int64_t per_cluster) {
  constexpr int n = kPerVector<T>;
  const std::int64_t n_candidates = args.q.shape[0], n_rows = args.p.shape[0];
  const std::int64_t groups = (n_candidates + per_cluster - 1) / per_cluster;
  const std::int64_t cluster = blockIdx.x / cluster_size(), t = cluster / groups;
  const std::int64_t first = cluster % groups * per_cluster;
  const std::int64_t last = first + per_cluster < n_candidates ? first + per_cluster : n_candidates;
  const bool writes = cluster_rank() == 0 && threadIdx.x == 0;
  const double weight = args.weight ? args.weight[t] : 1.0;
  if (weight == 0) {  // nothing is read
    for (std::int64_t c = first; writes && c < last; ++c)
      for (int metric = 0; metric < kAccept; ++metric)
        if (args.out[metric]) args.out[metric][c * n_rows + t] = 0;
    return;
  }
  const RowOfP p = p_row(args, t);
  const bool alike = kWhole || p.dtype() == T::dtype;
  const Share share;
  const int vectors = vectors_of<T>(p);
  Vec16 held[kHeld];
  Vec16* held_p = reinterpret_cast<Vec16*>(dynamic_shared()) + threadIdx.x;  // [kHeld], kBlock apart
#pragma unroll
  for (int k = 0; k < kHeld; ++k)
    if (share[k] < vectors) held[k] = load_vector<T, kWhole, true>(q_row(args, first, t), share[k]);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (!alike || share[k] >= vectors) break;
    if constexpr (kWhole) {
      copy16_async(held_p + k * kBlock, p.first + static_cast<std::int64_t>(share[k]) * 16);
    } else {
      held_p[k * kBlock] = load_vector<T, false, true>(p, share[k]);
    }
  }
  const double p_lse = args.p_lse ? args.p_lse[t] : streamed_lse(p, 0);
  const LogProbability log_p(p_lse);

  for (std::int64_t c = first; c < last; ++c) {
    const RowOfQ q = q_row(args, c, t);
    Terms terms;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (share[k] >= vectors) break;
      float y[n];
      unpack<T>(held[k], y);
      terms.add(y);
    }
    for (int k = kHeld; share[k] < vectors; ++k) {
      float y[n];
      unpack<T>(load_vector<T, kWhole, false>(q, share[k]), y);
      terms.add(y);
    }
    const double q_lse = combined_lse(terms, 1);

    wait_for_copies();  // of p, by this thread
    const LogProbability log_q(q_lse);
    const RowOfQ next = q_row(args, c + 1, t);
    Sums sums;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (share[k] >= vectors) break;
      float x[n], y[n];
      if (alike) {
        unpack<T>(held_p[k * kBlock], x);
      } else {
        gather_vector<T>(p, share[k], x);
      }
      unpack<T>(held[k], y);
      if (c + 1 < last) held[k] = load_vector<T, kWhole, true>(next, share[k]);
      sums.template add<kEsapOnly>(x, y, share[k] * n, log_p, log_q);
    }
    for (int k = kHeld; share[k] < vectors; ++k) {
      float x[n], y[n];
      if (alike) {
        unpack<T>(load_vector<T, kWhole, false>(p, share[k]), x);
      } else {
        gather_vector<T>(p, share[k], x);
      }
      unpack<T>(load_vector<T, kWhole, false>(q, share[k]), y);
      sums.template add<kEsapOnly>(x, y, share[k] * n, log_p, log_q);
    }
    combine<kEsapOnly>(sums);
    if (writes) write(args, t, c, p_lse, q_lse, weight);
  }
  cluster_sync();  // no block ends while another reads its shared memory
}

// One block per row.
__global__ void __launch_bounds__(kBlock) log_sum_exp_kernel(LogSumExpArgs args) {
  const std::int64_t r = blockIdx.x;
  const double lse = streamed_lse(Row<1>(args.logits, r * args.logits.stride[0]), 0);
  if (threadIdx.x == 0) args.lse[r] = lse;
}

// ---- accept

// The first token whose cumulative probability exceeds u, the last possible one where rounding keeps all below u;
// the same in every thread. The block adds up pieces of the row until one passes u, and one thread walks that one.
__device__ int draw(const RowOfQ& row, LogProbability log_prob, double u) {
  constexpr int kPiece = 4096;
  int& token = block_shared<int>();
  double below = 0;
  for (int start = 0; start < row.size(); start += kPiece) {
    const int end = start + kPiece < row.size() ? start + kPiece : row.size();
    double mass = 0;
    for (int i = start + static_cast<int>(threadIdx.x); i < end; i += kBlock) mass += expf(log_prob(row[i]));
    mass = block_reduce(mass, Sum());
    if (below + mass > u || end == row.size()) {  // the same decision in every thread
      if (threadIdx.x == 0) {
        token = -1;
        for (int i = start; token < 0 && i < end; ++i) {
          below += expf(log_prob(row[i]));
          if (below > u) token = i;
        }
        for (int i = end - 1; token < 0; --i)
          if (i == 0 || row[i] > -INFINITY) token = i;
      }
      break;
    }
    below += mass;
  }
  __syncthreads();
  return token;
}

// One block per row of q. A kernel of its own: hardly anyone asks for it, and it walks the row in order.
__global__ void __launch_bounds__(kBlock) accept_kernel(OverlapArgs args) {
  const std::int64_t n_candidates = args.q.shape[0], n_rows = args.p.shape[0];
  const std::int64_t t = blockIdx.x / n_candidates, c = blockIdx.x % n_candidates;
  const double weight = args.weight ? args.weight[t] : 1.0;
  double value = 0;
  if (weight != 0) {
    const RowOfP p = p_row(args, t);
    const RowOfQ q = q_row(args, c, t);
    const double p_lse = args.p_lse ? args.p_lse[t] : streamed_lse(p, 0), q_lse = streamed_lse(q, 1);
    const int token = draw(q, LogProbability(q_lse), args.uniform[t]);
    const double ratio = exp((p[token] - p_lse) - (q[token] - q_lse));
    value = weight * (ratio > 1 ? 1 : ratio);
    if (!isfinite(p_lse) || !isfinite(q_lse)) value = NAN;
  }
  if (threadIdx.x == 0) args.out[kAccept][c * n_rows + t] = static_cast<float>(value);
}

// ---- launching

struct Layout {
  int cluster;
  int held;
};

// As small a cluster as holds a row, hence the fewest barriers; depends on V, dtype and device only.
Layout layout_of(std::int64_t vectors, bool clusters) {
  const int largest = clusters ? kMaxCluster : 1;
  for (int cluster = 1; cluster <= largest; cluster *= 2)
    if (vectors <= static_cast<std::int64_t>(cluster) * kBlock * kFew) return {cluster, kFew};
  if (vectors <= static_cast<std::int64_t>(largest) * kBlock * kMany) return {largest, kMany};
  return {largest, kFew};
}

// Candidates of a cluster: all of a row's, unless that leaves the device idle. The results do not depend on it.
std::int64_t candidates_of_cluster(std::int64_t rows, std::int64_t candidates, int cluster) {
  const std::int64_t wanted = 8 * device_info().multiprocessors / cluster;  // four rounds of two blocks
  const std::int64_t groups = rows >= wanted ? 1 : (wanted + rows - 1) / rows;
  return groups >= candidates ? 1 : (candidates + groups - 1) / groups;
}

LaunchShape shape_of(std::int64_t rows, int cluster) {
  if (rows * cluster > 0x7FFFFFFF)
    throw std::invalid_argument("overlap: too many rows in one call on CUDA; 2^28 fit at any vocabulary");
  return {dim3(static_cast<unsigned>(rows * cluster)), kBlock, 0, cluster};
}

void check_vocabulary(std::int64_t size) {
  if (size > 0x7FFFFFFF / 2) throw std::invalid_argument("overlap: the CUDA kernels take rows of up to 2^30 logits");
}

// Whether all rows are whole vectors that can be loaded as they lie.
template <class T>
bool whole_vectors(const TensorView& tensor) {
  const int last = tensor.dim - 1;
  bool whole = tensor.dtype == T::dtype && tensor.stride[last] == 1 && tensor.shape[last] % kPerVector<T> == 0 &&
               reinterpret_cast<std::uintptr_t>(tensor.data) % 16 == 0;
  for (int i = 0; i < last; ++i) whole = whole && tensor.stride[i] % kPerVector<T> == 0;
  return whole;
}

template <class T, bool kEsapOnly>
void launch_overlap(const OverlapArgs& args) {
  const std::int64_t vectors = (args.q.shape[2] + kPerVector<T> - 1) / kPerVector<T>;
  const Layout layout = layout_of(vectors, clusters_in(overlap_kernel<T, true, kFew, kEsapOnly>));
  const bool whole = whole_vectors<T>(args.p) && whole_vectors<T>(args.q);
  const int held = whole ? layout.held : kFew;
  const std::int64_t rows = args.p.shape[0], candidates = args.q.shape[0];
  const std::int64_t each = candidates_of_cluster(rows, candidates, layout.cluster);
  LaunchShape shape = shape_of(rows * ((candidates + each - 1) / each), layout.cluster);
  shape.dynamic_shared_bytes = sizeof(Vec16) * kBlock * held;
  launch(!whole         ? overlap_kernel<T, false, kFew, kEsapOnly>
         : held == kFew ? overlap_kernel<T, true, kFew, kEsapOnly>
                        : overlap_kernel<T, true, kMany, kEsapOnly>,
         shape, args.stream, args, each);
}

template <class T>
void launch_overlap(const OverlapArgs& args) {
  const bool esap_only = !args.out[kKlPq] && !args.out[kKlQp] && !args.out[kTop1Agree];
  esap_only ? launch_overlap<T, true>(args) : launch_overlap<T, false>(args);
}

}  // namespace

void overlap_cuda(const OverlapArgs& args) {
  check_vocabulary(args.p.shape[1]);
  if (args.out[kAccept]) launch(accept_kernel, shape_of(args.p.shape[0] * args.q.shape[0], 1), args.stream, args);
  bool others = false;
  for (int metric = 0; metric < kAccept; ++metric) others = others || args.out[metric];
  if (!others) return;
  switch (args.q.dtype) {
    case DType::bfloat16:
      return launch_overlap<BFloat16>(args);
    case DType::float16:
      return launch_overlap<Float16>(args);
    default:
      return launch_overlap<Float32>(args);
  }
}

void log_sum_exp_cuda(const LogSumExpArgs& args) {
  check_vocabulary(args.logits.shape[1]);
  launch(log_sum_exp_kernel, shape_of(args.logits.shape[0], 1), args.stream, args);
}

}  // namespace moeprune
