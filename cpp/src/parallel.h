// The one seam to the threading library.
#pragma once

#include <lowbitcore/types.h>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace lowbitcore {

// More of them only fail to start. OpenMP then ends the process.
constexpr int kMostThreads = 1024;

// Threads of a call: what the host asks for, else the library's setting. That is read anew each
// time: a call that needs the number twice asks once.
int resolve_threads(const Execution& exec);

// Calls body(i, thread) for every i in [0, count), each exactly once. Bodies write disjoint
// outputs, so results do not depend on the schedule; they must not throw. As many threads for
// little work as for much: of a smaller team GNU's OpenMP ends the others, and the next call starts
// them.
template <typename Body>
inline void parallel_for(std::int64_t count, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (std::int64_t i = 0; i < count; ++i) body(i, omp_get_thread_num());
    return;
  }
#endif
  (void)threads;
  for (std::int64_t i = 0; i < count; ++i) body(i, 0);
}

struct Range {
  std::int64_t first, end;
};

// Calls body(range, thread) for each thread's share of [0, count), which is the same one in each
// call: rows that a thread has written lie in its cache.
template <typename Body>
inline void parallel_ranges(std::int64_t count, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
#pragma omp parallel num_threads(threads)
    {
      const std::int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
      const Range share = {count * thread / team, count * (thread + 1) / team};
      if (share.first < share.end) body(share, static_cast<int>(thread));
    }
    return;
  }
#endif
  (void)threads;
  if (count > 0) body(Range{0, count}, 0);
}

}  // namespace lowbitcore
