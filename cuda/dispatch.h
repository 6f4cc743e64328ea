// Which kernel a product takes, and how the device is filled with it.
#pragma once

#include "kernels.h"

namespace lowbitcore::cuda {

enum class Op { nt, nn };

// Tensor-core tiles by rows of the activations: the first entry of an operation whose max_rows is
// not exceeded. A weight is read once for the rows of a block, and idle rows cost tensor time, so
// that the smallest tile that holds all rows wins; beyond the largest, blocks share it.
struct TileRule {
  Op op;
  std::int64_t max_rows;
  Tile tile;
};

constexpr std::int64_t kAnyRows = std::int64_t{1} << 62;
constexpr TileRule kTileRules[] = {
    {Op::nt, 16, Tile::few}, {Op::nt, 64, Tile::some}, {Op::nt, kAnyRows, Tile::many},
    {Op::nn, 16, Tile::few}, {Op::nn, 64, Tile::some}, {Op::nn, kAnyRows, Tile::many},
};

constexpr std::int64_t tile_rows(Tile tile) {
  return tile == Tile::few ? 16 : tile == Tile::some ? 64 : 128;
}

constexpr Tile choose_tile(Op op, std::int64_t rows) {
  for (const TileRule& rule : kTileRules) {
    if (rule.op == op && rows <= rule.max_rows) return rule.tile;
  }
  return Tile::many;
}

// Where the device has it, wgmma takes products of more rows than this: those of Tile::many, which
// keep the tensor cores busy. An H100 does 800 TFLOP/s with it, 520 with mma.sync.
struct WgmmaRule {
  Op op;
  std::int64_t rows;
};
constexpr WgmmaRule kWgmmaRules[] = {{Op::nt, 64}, {Op::nn, 64}};

constexpr bool choose_wgmma(Op op, std::int64_t rows) {
  for (const WgmmaRule& rule : kWgmmaRules) {
    if (rule.op == op) return rows > rule.rows;
  }
  return false;
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
