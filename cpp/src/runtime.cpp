// Threads, and the version.
#include <lowbitcore/runtime.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "check.h"
#include "parallel.h"

namespace lowbitcore {

namespace {

std::atomic<int> threads_setting{0};

void check_threads(const char* op, int num_threads) {
  if (num_threads < 0 || num_threads > kMostThreads) {
    check::fail(op, "num_threads", "0 to " + std::to_string(kMostThreads),
                std::to_string(num_threads));
  }
}

}  // namespace

void set_num_threads(int num_threads) {
  check_threads("set_num_threads", num_threads);
  threads_setting.store(num_threads);
}

int get_num_threads() {
  const int setting = threads_setting.load();
  if (setting > 0) return setting;
#ifdef _OPENMP
  return std::min(omp_get_max_threads(), kMostThreads);
#else
  return 1;
#endif
}

int resolve_threads(const Execution& exec) {
  check_threads("execution", exec.num_threads);
  return exec.num_threads > 0 ? exec.num_threads : get_num_threads();
}

std::string version() { return LOWBITCORE_VERSION; }

}  // namespace lowbitcore
