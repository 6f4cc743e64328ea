// X W^T of up to 16 rows on tiles: weights are not rounded. Groups are summed with exact
// differences, and scales multiply the sums.
#pragma once

#include "tiles_weights.h"

namespace lowbitcore {
namespace {

constexpr int64_t kFewRows = 16;

inline size_t few_workspace(int64_t depth) { return static_cast<size_t>(depth * kStrip / 2) * 4; }

// total [16 outputs][16 rows] += a group's part; activations are packed by pack_right.
template <int B>
void add_group_of_few(const Block<B>& block, int64_t g, int64_t first, int64_t end,
                      const uint32_t* activations, float (&total)[kBlockN][16]) {
  alignas(64) uint32_t tiles[kMostTiles][kTileWords];
  alignas(64) float sums[kBlockN][16], scale[kBlockN];
  GroupWeights<B, Values::kExact> weights;
  weights.fill(block, g);
  _tile_zero(0);
  for (int64_t tile = first; tile < end; tile += kMostTiles) {
    const int64_t count = smaller(kMostTiles, end - tile);
    weights.left_tiles(block, tile, count, tiles[0], kTileWords);
    operands_are_stored();
    for (int64_t t = 0; t < count; ++t) {
      _tile_loadd(4, tiles[t], 64);
      _tile_loadd(6, activations + (tile + t) * kStepWords, 64);
      _tile_dpbf16ps(0, 4, 6);
      prefetch_weights(block, tile + t + kMostTiles);
    }
  }
  _tile_stored(0, sums, 64);
  block.scale(g, 0).store(scale);
  for (int n = 0; n < kBlockN; ++n) {
    madd(Vec::broadcast(scale[n]), Vec::load(sums[n]), Vec::load(total[n])).store(total[n]);
  }
}

template <int B>
void tiles_nt_few(const ConstMatrix& x, const QuantWeight& w, const float* bias, const Matrix& y,
                  const Resources& use) {
  auto* packed = static_cast<uint32_t*>(use.workspace);
  const int64_t tiles = x.cols / kTileK;
  pack_right<B>(x, 0, x.rows, 0, tiles, packed);
  parallel_for(y.cols / kBlockN, use.threads, [&](int64_t n, int) {
    const TileScope scope;
    const Block<B> block(w, n);
    const int64_t group_tiles = block.group_size / kTileK;
    alignas(64) float total[kBlockN][16] = {};
    for (int64_t first = 0, g = 0; first < tiles; first += group_tiles, ++g) {
      add_group_of_few(block, g, first, smaller(first + group_tiles, tiles), packed, total);
    }
    __m512 r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_ps(total[i]);
    transpose_16x16(r);
    alignas(64) float rows[kFewRows][kBlockN];
    for (int i = 0; i < 16; ++i) _mm512_store_ps(rows[i], r[i]);
    store_outputs(rows[0], x.rows, kBlockN, bias, y, 0, n * kBlockN);
  });
}

}  // namespace
}  // namespace lowbitcore
