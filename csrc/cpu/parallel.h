// A parallel loop over independent items, on the OpenMP pool that torch uses too. Per instruction set for the
// reason given in simd.h; without OpenMP it is the plain loop.
#pragma once

#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace moeprune::MOEPRUNE_ISA {

// How many of the threads are worth waking for work that takes one thread about this long.
inline int useful_threads(double nanoseconds, int threads) {
  const double shares = nanoseconds / 50'000;
  return shares >= threads ? threads : shares < 1 ? 1 : static_cast<int>(shares);
}

// Of the calling thread, within a parallel_ranges.
inline int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// body(first, last) on consecutive ranges of at most `grain` items; which thread takes a range is not
// determined.
template <class Body>
void parallel_ranges(std::int64_t items, std::int64_t grain, [[maybe_unused]] int threads, const Body& body) {
  if (items == 0) return;
  const std::int64_t ranges = (items + grain - 1) / grain;
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && ranges > 1)
#endif
  for (std::int64_t range = 0; range < ranges; ++range) {
    const std::int64_t first = range * grain;
    body(first, first + grain < items ? first + grain : items);
  }
}

}  // namespace moeprune::MOEPRUNE_ISA
