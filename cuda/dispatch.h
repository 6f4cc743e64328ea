// Which kernel a product takes, and how the device is filled with it.
#pragma once

#include "kernels.h"

namespace lowbitcore::cuda {

enum class Op { nt, nn };

// The tensor-core tile by rows of the activations. A weight is read once for the rows of a block,
// and idle rows cost tensor time, so that the smallest tile that holds all rows wins; beyond the
// largest, blocks share it. Where the device has wgmma, that takes the products of RowClass::many,
// which keep the tensor cores busy: an H100 does 800 TFLOP/s with it, 520 with mma.sync.
constexpr RowClass row_class(std::int64_t rows) {
  return rows <= 16 ? RowClass::few : rows <= 64 ? RowClass::some : RowClass::many;
}

constexpr std::int64_t block_rows(RowClass kind) {
  return kind == RowClass::few ? 16 : kind == RowClass::some ? 64 : 128;
}

// Parts into which the contraction is cut so that `blocks` output tiles fill the device:
// `blocks_each` for each multiprocessor, but no fewer than four steps in a part, which is what
// fills its pipeline. No part is empty.
constexpr int choose_splits(std::int64_t blocks, std::int64_t steps, int multiprocessors,
                            int blocks_each) {
  constexpr std::int64_t kLeastSteps = 4;
  const std::int64_t wanted =
      std::int64_t{blocks_each} * multiprocessors / (blocks > 0 ? blocks : 1);
  const std::int64_t most = steps / kLeastSteps;
  const std::int64_t parts = wanted < most ? wanted : most;
  if (parts <= 1) return 1;
  const std::int64_t share = (steps + parts - 1) / parts;
  return static_cast<int>((steps + share - 1) / share);
}

}  // namespace lowbitcore::cuda
