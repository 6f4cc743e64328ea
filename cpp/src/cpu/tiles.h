// Products of register tiles: how operands and results lie, and the loops over a reduction.
#pragma once

#include "gemm.h"

namespace lowbitcore {
namespace {

// Operands lie as [steps][2 tiles][16][16] words of two bf16; a step is 32 terms of the reduction,
// the tiles are 32 rows of the left operand or 32 columns of the right one.
constexpr int64_t kTileWords = 256;
constexpr int64_t kStepWords = 2 * kTileWords;
constexpr int64_t kStrip = 32;      // rows of activations
constexpr int64_t kLineWords = 16;  // of the cache

// A piece of the reduction, at most: 36 KB of a panel.
constexpr int64_t kPieceSteps = 18;
constexpr int64_t kPieceWords = kPieceSteps * kStepWords;

// Of a piece of the reduction: even ones, as sums travel once a piece.
constexpr int64_t piece_steps(int64_t depth) {
  const int64_t all = depth / kTileK;
  return divide_up(all, divide_up(all, kPieceSteps));
}

// Rows as a left operand: a tile's rows are theirs.
inline void pack_left(const ConstMatrix& x, int64_t first, int64_t rows, int64_t step,
                      int64_t steps, uint32_t* out) {
  for (int64_t r = 0; r < kStrip; ++r) {
    uint32_t* to = out + r * 16;
    if (r < rows) {
      const char* row = row_pointer(x, first + r) + step * 64;
      for (int64_t s = 0; s < steps; ++s) std::memcpy(to + s * kStepWords, row + s * 64, 64);
    } else {
      for (int64_t s = 0; s < steps; ++s) std::memset(to + s * kStepWords, 0, 64);
    }
  }
}

// Where the tiles of a left operand are, in bytes: `step` from one to the next of the reduction,
// `lower` to the second one of a step; their rows are `stride` apart.
struct LeftTiles {
  const char* first;
  int64_t stride, step, lower;

  explicit LeftTiles(const uint32_t* packed)
      : first(reinterpret_cast<const char*>(packed)),
        stride(64),
        step(kStepWords * 4),
        lower(kTileWords * 4) {}

  // Of rows as they lie, from a step of the reduction on.
  LeftTiles(const ConstMatrix& x, int64_t row, int64_t from)
      : first(row_pointer(x, row) + from * 64),
        stride(x.stride * 2),
        step(64),
        lower(16 * stride) {}
};

// Results of a strip and a panel are [2][2 tiles] whose halves lie kLowerSums apart, and those of
// the next strip or panel between them: a load waits for earlier stores that agree with it in the
// low 12 bits of their addresses, and so it meets none of the product before.
constexpr int64_t kLowerSums = 4 * kTileWords;

constexpr int64_t sums_at(int64_t i) { return i / 2 * 2 * kLowerSums + i % 2 * 2 * kTileWords; }
constexpr int64_t sums_of_all(int64_t count) { return round_up(count, 2) * kLowerSums; }

// A row of such results: its columns of the second tile lie kTileWords behind.
inline const float* row_of_sums(const float* c, int64_t row) {
  return c + row / 16 * kLowerSums + row % 16 * 16;
}

// c (+)= a b; Lower and Right say whether the second tiles of a and of b count, LeftStreams which
// operand the first-level cache is not to keep, as it would displace the other. That one is loaded
// first: its tiles take longer. between() comes before each step, meanwhile() before results are
// stored, which wait for the last step.
template <bool LeftStreams, bool Lower, bool Right, typename Between, typename Meanwhile>
void multiply_tiles(int64_t steps, LeftTiles a, const uint32_t* b, float* c, bool accumulate,
                    const Between& between, const Meanwhile& meanwhile) {
  operands_are_stored();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (accumulate) {
    _tile_loadd(0, c, 64);
    if (Right) _tile_loadd(1, c + kTileWords, 64);
    if (Lower) _tile_loadd(2, c + kLowerSums, 64);
    if (Lower && Right) _tile_loadd(3, c + kLowerSums + kTileWords, 64);
  }
  for (int64_t s = 0; s < steps; ++s, a.first += a.step, b += kStepWords) {
    between();
    if (LeftStreams) {
      _tile_stream_loadd(4, a.first, a.stride);
      if (Lower) _tile_stream_loadd(5, a.first + a.lower, a.stride);
      _tile_loadd(6, b, 64);
      if (Right) _tile_loadd(7, b + kTileWords, 64);
    } else {
      _tile_stream_loadd(6, b, 64);
      if (Right) _tile_stream_loadd(7, b + kTileWords, 64);
      _tile_loadd(4, a.first, a.stride);
      if (Lower) _tile_loadd(5, a.first + a.lower, a.stride);
    }
    _tile_dpbf16ps(0, 4, 6);
    if (Right) _tile_dpbf16ps(1, 4, 7);
    if (Lower) _tile_dpbf16ps(2, 5, 6);
    if (Lower && Right) _tile_dpbf16ps(3, 5, 7);
  }
  meanwhile();
  _tile_stored(0, c, 64);
  if (Right) _tile_stored(1, c + kTileWords, 64);
  if (Lower) _tile_stored(2, c + kLowerSums, 64);
  if (Lower && Right) _tile_stored(3, c + kLowerSums + kTileWords, 64);
}

// Asks for `each` lines, and the same number of those behind them the next time.
struct Ahead {
  const char* lines;
  int64_t each;

  template <int Level>
  LOWBITCORE_INLINE void ask() {
    for (int64_t i = 0; i < each; ++i, lines += 64) __builtin_prefetch(lines, 0, Level);
  }
};

// Two registers of results as one line of bf16.
LOWBITCORE_INLINE void store_bf16_line(const __m512& low, const __m512& high, void* to) {
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

LOWBITCORE_INLINE void store_line(const Vec& low, const Vec& high, const Matrix& out, int64_t row,
                                  int64_t col) {
  store_bf16_line(low.v, high.v, row_pointer(out, row) + col * 2);
}

}  // namespace
}  // namespace lowbitcore
