// overlap on CUDA.
//
// A row of logits is long (V = 152k is 300 KB in bfloat16) and is needed twice: for its log-sum-exp, then for the
// metrics. So a row of q is read once and held: in the registers of one block or, on Hopper, of a cluster of up to
// eight, each of which has a share of every row's vectors of 16 bytes. What does not fit, on older chips or beyond
// 300k tokens, is read again, from the second-level cache if all goes well. p is read where the metrics are taken;
// the candidates of a row run side by side and find it in that cache.
//
// Blocks and clusters exchange a maximum and a sum, then the metrics' sums. Which thread takes an element depends on
// its index and on V only, never on addresses, so strided and unaligned rows give the bits of their copies. Sums run
// in float32 over at most some dozens of terms a thread, in float64 across threads, in a fixed order.
#include "cuda_utils.cuh"
#include "overlap.h"

namespace moeprune {
namespace {

constexpr int kBlock = 512;  // threads
constexpr int kMaxCluster = 8;
constexpr int kFew = 5, kMany = 10;  // vectors of q that a thread holds: few let two blocks share a multiprocessor
constexpr float kLog2E = 1.44269504f;

// ---- rows

// The bits of the elements, by dtype.
struct Float32 {
  using Bits = std::uint32_t;
  static constexpr DType dtype = DType::float32;
  static constexpr Bits minus_infinity = 0xFF800000u;
};
struct BFloat16 {
  using Bits = std::uint16_t;
  static constexpr DType dtype = DType::bfloat16;
  static constexpr Bits minus_infinity = 0xFF80u;
};
struct Float16 {
  using Bits = std::uint16_t;
  static constexpr DType dtype = DType::float16;
  static constexpr Bits minus_infinity = 0xFC00u;
};

template <class T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(typename T::Bits));

struct Row {
  const char* first;  // the first element
  std::int64_t stride;
  int size;
  DType dtype;
  int loadable;  // bytes that a vector of it can be loaded in at a time: 16, 4, or 0 for element by element

  __device__ Row(const TensorView& tensor, std::int64_t offset)
      : stride(tensor.stride[tensor.dim - 1]),
        size(static_cast<int>(tensor.shape[tensor.dim - 1])),
        dtype(tensor.dtype) {
    first = static_cast<const char*>(tensor.data) + offset * (dtype == DType::float32 ? 4 : 2);
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(first);
    loadable = stride != 1 ? 0 : address % 16 == 0 ? 16 : address % 4 == 0 ? 4 : 0;
  }

  template <class T>
  __device__ typename T::Bits bits(int i) const {
    return __ldg(reinterpret_cast<const typename T::Bits*>(first) + i * stride);
  }
  __device__ float operator[](int i) const {
    return dtype == DType::float32    ? __uint_as_float(bits<Float32>(i))
           : dtype == DType::bfloat16 ? bfloat16_to_float(bits<BFloat16>(i))
                                      : float16_to_float(bits<Float16>(i));
  }
};

__device__ Row p_row(const OverlapArgs& args, std::int64_t t) { return Row(args.p, t * args.p.stride[0]); }

__device__ Row q_row(const OverlapArgs& args, std::int64_t c, std::int64_t t) {
  return Row(args.q, c * args.q.stride[0] + t * args.q.stride[1]);
}

// Vector `v`, elements [v * kPerVector, ...), of a row of T; -inf beyond the row's end.
template <class T, bool kOnce>
__device__ Vec16 load_vector(const Row& row, int v) {
  constexpr int n = kPerVector<T>, width = 8 * static_cast<int>(sizeof(typename T::Bits));
  const char* from = row.first + static_cast<std::int64_t>(v) * 16;
  const bool whole = (v + 1) * n <= row.size;
  if (whole && row.loadable == 16) return kOnce ? load16_streaming(from) : load16(from);
  Vec16 vector;
  if (whole && row.loadable == 4) {
#pragma unroll
    for (int w = 0; w < 4; ++w) vector.word[w] = __ldg(reinterpret_cast<const std::uint32_t*>(from) + w);
    return vector;
  }
#pragma unroll
  for (int w = 0; w < 4; ++w) vector.word[w] = 0;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const std::uint32_t element = v * n + i < row.size ? row.bits<T>(v * n + i) : T::minus_infinity;
    vector.word[i * width / 32] |= element << (i * width % 32);
  }
  return vector;
}

template <class T>
__device__ void unpack(const Vec16& vector, float (&x)[kPerVector<T>]) {
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) {
    if constexpr (T::dtype == DType::float32) {
      x[i] = __uint_as_float(vector.word[i]);
    } else if constexpr (T::dtype == DType::bfloat16) {
      x[i] = __uint_as_float(i % 2 ? vector.word[i / 2] & 0xFFFF0000u : vector.word[i / 2] << 16);
    } else {
      x[i] = float16_to_float(static_cast<std::uint16_t>(vector.word[i / 2] >> (i % 2 * 16)));
    }
  }
}

// The elements of vector `v` of a row of T in a row of another dtype.
template <class T>
__device__ void gather_vector(const Row& row, int v, float (&x)[kPerVector<T>]) {
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) {
    const int at = v * kPerVector<T> + i;
    x[i] = at < row.size ? row[at] : -INFINITY;
  }
}

template <int n>
__device__ float tree_sum(float (&x)[n]) {
#pragma unroll
  for (int width = n / 2; width > 0; width /= 2)
#pragma unroll
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

// The vectors of a row that are this thread's: neighbours in memory go to neighbouring threads, then to the
// cluster's blocks, then round again.
struct Share {
  int first, step;

  __device__ Share()
      : first(static_cast<int>(cluster_rank() * blockDim.x + threadIdx.x)),
        step(static_cast<int>(cluster_size() * blockDim.x)) {}
  __device__ int operator[](int k) const { return first + k * step; }
};

template <class T>
__device__ int vectors_of(const Row& row) {
  return (row.size + kPerVector<T> - 1) / kPerVector<T>;
}

// ---- log-sum-exp

// A thread's terms, relative to the largest of its elements.
struct Terms {
  float highest = -INFINITY;
  float sum = 0;

  template <int n>
  __device__ void add(const float (&x)[n]) {
    float raised = highest;
#pragma unroll
    for (int i = 0; i < n; ++i) raised = fmaxf(raised, x[i]);  // NaN is passed over here and kept in the sum
    if (raised > highest) sum = sum > 0 ? sum * exp2f((highest - raised) * kLog2E) : sum;
    highest = raised;
    const float offset = highest == -INFINITY ? 0 : highest;  // -inf only: terms 0, not NaN
    float term[n];
#pragma unroll
    for (int i = 0; i < n; ++i) term[i] = fast_exp2((x[i] - offset) * kLog2E);
    sum += tree_sum(term);
  }
};

struct BlockTerms {
  float highest;
  double sum;
};

// What the blocks of a cluster tell each other. A row's log-sum-exp is exchanged in a slot of its own, so that
// nobody writes what a neighbour may still be reading.
struct Exchange {
  BlockTerms terms[2];
  double lse[2];
  double sums[3];
  std::uint64_t best[2];
};

__device__ Exchange& exchange() { return block_shared<Exchange>(); }

// The log-sum-exp of the cluster's threads' terms, in every thread; NaN where no softmax exists.
__device__ double combined_lse(const Terms& terms, int slot) {
  const float highest = block_reduce(terms.highest, Max());
  const bool vanishes = terms.sum == 0 || highest == -INFINITY;  // exp(-inf - -inf) is no number
  const double scaled = vanishes ? terms.sum : terms.sum * exp2f((terms.highest - highest) * kLog2E);
  const double sum = block_reduce(scaled, Sum());
  Exchange& mine = exchange();
  if (threadIdx.x == 0) mine.terms[slot] = {highest, sum};
  cluster_sync();
  if (threadIdx.x == 0) {
    float top = -INFINITY;
    for (unsigned rank = 0; rank < cluster_size(); ++rank)
      top = fmaxf(top, cluster_shared(&mine, rank)->terms[slot].highest);
    double total = 0;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) {
      const BlockTerms theirs = cluster_shared(&mine, rank)->terms[slot];
      if (theirs.sum == 0) continue;
      total += theirs.highest == top ? theirs.sum : theirs.sum * exp(static_cast<double>(theirs.highest) - top);
    }
    const double lse = top + log(total);
    mine.lse[slot] = isfinite(lse) ? lse : static_cast<double>(NAN);
  }
  __syncthreads();
  return mine.lse[slot];
}

// Reading the row, holding nothing of it.
template <class T>
__device__ double streamed_lse(const Row& row, int slot) {
  constexpr int kAtOnce = 4;  // loads in flight
  const Share share;
  const int vectors = vectors_of<T>(row);
  Terms terms;
  for (int v = share.first; v < vectors; v += kAtOnce * share.step) {
    Vec16 loaded[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (v + u * share.step < vectors) loaded[u] = load_vector<T, false>(row, v + u * share.step);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (v + u * share.step < vectors) {
        float x[kPerVector<T>];
        unpack<T>(loaded[u], x);
        terms.add(x);
      }
    }
  }
  return combined_lse(terms, slot);
}

__device__ double streamed_lse(const Row& row, int slot) {
  switch (row.dtype) {
    case DType::bfloat16:
      return streamed_lse<BFloat16>(row, slot);
    case DType::float16:
      return streamed_lse<Float16>(row, slot);
    default:
      return streamed_lse<Float32>(row, slot);
  }
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

// The cluster's sums, in the exchange of its first block, which may read them until the next cluster_sync().
template <bool kEsapOnly>
__device__ void combine(const Sums& sums) {
  Exchange& mine = exchange();
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
  if (cluster_rank() != 0 || threadIdx.x != 0) return;
  for (unsigned rank = 1; rank < cluster_size(); ++rank) {
    const Exchange& theirs = *cluster_shared(&mine, rank);
    mine.sums[0] += theirs.sums[0];
    if constexpr (!kEsapOnly) {
      for (int i = 1; i < 3; ++i) mine.sums[i] += theirs.sums[i];
      for (int i = 0; i < 2; ++i) mine.best[i] = theirs.best[i] > mine.best[i] ? theirs.best[i] : mine.best[i];
    }
  }
}

// One cluster per row of q, in the order of t, then c. kHeld vectors of q stay in each thread's registers.
template <class T, int kHeld, bool kEsapOnly>
__global__ void __launch_bounds__(kBlock, kEsapOnly&& kHeld == kFew ? 2 : 1) overlap_kernel(OverlapArgs args) {
  constexpr int n = kPerVector<T>;
  const std::int64_t n_candidates = args.q.shape[0], n_rows = args.p.shape[0];
  const std::int64_t pair = blockIdx.x / cluster_size();
  const std::int64_t t = pair / n_candidates, c = pair % n_candidates;
  const bool writes = cluster_rank() == 0 && threadIdx.x == 0;
  const double weight = args.weight ? args.weight[t] : 1.0;
  if (weight == 0) {  // nothing is read
    for (int metric = 0; writes && metric < kAccept; ++metric)
      if (args.out[metric]) args.out[metric][c * n_rows + t] = 0;
    return;
  }
  const Row p = p_row(args, t), q = q_row(args, c, t);
  const bool alike = p.dtype == T::dtype;
  const Share share;
  const int vectors = vectors_of<T>(q);
  Vec16 held[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; ++k)
    if (share[k] < vectors) held[k] = load_vector<T, true>(q, share[k]);
  const double p_lse = args.p_lse ? args.p_lse[t] : streamed_lse(p, 0);

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
    unpack<T>(load_vector<T, false>(q, share[k]), y);
    terms.add(y);
  }
  Vec16 held_p[kHeld];  // on its way while the log-sum-exp is put together
#pragma unroll
  for (int k = 0; k < kHeld; ++k)
    if (alike && share[k] < vectors) held_p[k] = load_vector<T, false>(p, share[k]);
  const double q_lse = combined_lse(terms, 1);

  const LogProbability log_p(p_lse), log_q(q_lse);
  Sums sums;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (share[k] >= vectors) break;
    float x[n], y[n];
    if (alike) {
      unpack<T>(held_p[k], x);
    } else {
      gather_vector<T>(p, share[k], x);
    }
    unpack<T>(held[k], y);
    sums.template add<kEsapOnly>(x, y, share[k] * n, log_p, log_q);
  }
  for (int k = kHeld; share[k] < vectors; ++k) {
    float x[n], y[n];
    if (alike) {
      unpack<T>(load_vector<T, false>(p, share[k]), x);
    } else {
      gather_vector<T>(p, share[k], x);
    }
    unpack<T>(load_vector<T, false>(q, share[k]), y);
    sums.template add<kEsapOnly>(x, y, share[k] * n, log_p, log_q);
  }
  combine<kEsapOnly>(sums);
  if (writes) {
    const Exchange& total = exchange();
    double value[kAccept] = {total.sums[0], total.sums[1], total.sums[2], 0, 0};
    value[kTop1Agree] = total.best[0] << 32 == total.best[1] << 32;  // the same index
    if (args.out[kNll] && args.labels[t] >= 0) value[kNll] = q_lse - q[static_cast<int>(args.labels[t])];
    const bool exists = isfinite(p_lse) && isfinite(q_lse);
    for (int metric = 0; metric < kAccept; ++metric)
      if (args.out[metric])
        args.out[metric][c * n_rows + t] = static_cast<float>(exists ? value[metric] * weight : NAN);
  }
  cluster_sync();  // no block ends while another reads its shared memory
}

// One cluster per row.
__global__ void __launch_bounds__(kBlock) log_sum_exp_kernel(LogSumExpArgs args) {
  const std::int64_t r = blockIdx.x / cluster_size();
  const Row row(args.logits, r * args.logits.stride[0]);
  const double lse = streamed_lse(row, 0);
  if (cluster_rank() == 0 && threadIdx.x == 0) args.lse[r] = lse;
  cluster_sync();
}

// ---- accept

// The first token whose cumulative probability exceeds u, the last possible one where rounding keeps all below u;
// the same in every thread. The block adds up pieces of the row until one passes u, and one thread walks that one.
__device__ int draw(const Row& row, LogProbability log_prob, double u) {
  constexpr int kPiece = 4096;
  int& token = block_shared<int>();
  double below = 0;
  for (int start = 0; start < row.size; start += kPiece) {
    const int end = start + kPiece < row.size ? start + kPiece : row.size;
    double mass = 0;
    for (int i = start + static_cast<int>(threadIdx.x); i < end; i += kBlock) mass += expf(log_prob(row[i]));
    mass = block_reduce(mass, Sum());
    if (below + mass > u || end == row.size) {  // the same decision in every thread
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
    const Row p = p_row(args, t), q = q_row(args, c, t);
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
Layout layout_of(std::int64_t vectors) {
  const int largest = device_info().major >= 9 ? kMaxCluster : 1;
  for (int cluster = 1; cluster <= largest; cluster *= 2)
    if (vectors <= static_cast<std::int64_t>(cluster) * kBlock * kFew) return {cluster, kFew};
  if (vectors <= static_cast<std::int64_t>(largest) * kBlock * kMany) return {largest, kMany};
  return {largest, kFew};
}

LaunchShape shape_of(std::int64_t rows, int cluster) {
  if (rows * cluster > 0x7FFFFFFF)
    throw std::invalid_argument("overlap: too many rows in one call on CUDA; 2^28 fit at any vocabulary");
  return {dim3(static_cast<unsigned>(rows * cluster)), kBlock, 0, cluster};
}

void check_vocabulary(std::int64_t size) {
  if (size > 0x7FFFFFFF / 2) throw std::invalid_argument("overlap: the CUDA kernels take rows of up to 2^30 logits");
}

template <class T>
void launch_overlap(const OverlapArgs& args) {
  const std::int64_t vectors = (args.q.shape[2] + kPerVector<T> - 1) / kPerVector<T>;
  const Layout layout = layout_of(vectors);
  const LaunchShape shape = shape_of(args.p.shape[0] * args.q.shape[0], layout.cluster);
  const bool esap_only = !args.out[kKlPq] && !args.out[kKlQp] && !args.out[kTop1Agree];
  if (layout.held == kFew) {
    launch(esap_only ? overlap_kernel<T, kFew, true> : overlap_kernel<T, kFew, false>, shape, args.stream, args);
  } else {
    launch(esap_only ? overlap_kernel<T, kMany, true> : overlap_kernel<T, kMany, false>, shape, args.stream, args);
  }
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
