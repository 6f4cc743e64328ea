// What cuda/dispatch.h decides, asked from outside: lines "blocks steps multiprocessors
// blocks_each" on standard input, the number of parts of the contraction on standard output.
#include <cstdio>

#include "dispatch.h"

int main() {
  long long blocks = 0, steps = 0;
  int multiprocessors = 0, each = 0;
  while (std::scanf("%lld %lld %d %d", &blocks, &steps, &multiprocessors, &each) == 4) {
    std::printf("%d\n", lowbitcore::cuda::choose_splits(blocks, steps, multiprocessors, each));
  }
}
