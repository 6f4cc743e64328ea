// Register tiles of AMX: 16 rows of 16 pairs of bf16, or of 16 floats.
#pragma once

#include <cstring>

#include "pairs_avx512.h"

#ifdef LOWBITCORE_EMULATED_TILES
#include "tiles_emulated.h"
#endif

#define LOWBITCORE_TILES

namespace lowbitcore {
namespace {

// Tiles 0 to 3 accumulate 32 x 32, 4 and 5 are the left operand, 6 and 7 the right one. Releasing
// them afterwards keeps context switches cheap and leaves other libraries their own configuration.
struct TileScope {
  TileScope() {
    struct alignas(64) Config {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // of 8 tiles; the rest is 0
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    // Not a local: as far as GCC's optimizer knows the intrinsic reads 8 bytes, and it may drop
    // stores to the others.
    static constexpr Config config;
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// To be called between the stores of an operand and its loads as tiles: GCC's intrinsics do not say
// that they read memory.
LOWBITCORE_INLINE void operands_are_stored() { __asm__ volatile("" ::: "memory"); }

// Strips of two tiles' rows: [16 elements][2 tiles][16 rows][16 elements of the row].
struct TileStrip {
  static constexpr std::int64_t kHeight = 32;
  static constexpr std::int64_t kDepthMultiple = 16;
  static constexpr std::int64_t kTile = 256, kWidthOfC = 32;

  static std::int64_t stored(std::int64_t) { return kHeight; }

  static void store(const ConstMatrix& x, std::int64_t first, std::int64_t rows,
                    std::uint32_t* strip) {
    for (std::int64_t r = 0; r < rows; ++r) {
      const char* row = static_cast<const char*>(x.data) + (first + r) * x.stride * 2;
      std::uint32_t* out = strip + r / 16 * kTile + r % 16 * 16;
      for (std::int64_t k = 0; k < x.cols / 32; ++k) {
        std::memcpy(out + k * 2 * kTile, row + k * 64, 64);
      }
    }
  }

  // The columns of a panel [depth][32] as the rows of a strip.
  static void store_panel(const std::uint32_t* panel, std::int64_t depth, std::uint32_t* strip) {
    for (std::int64_t k = 0; k < depth; k += 16) {
      for (std::int64_t half = 0; half < 2; ++half) {
        __m512 r[16];
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(panel + (k + i) * 32 + half * 16);
        transpose_16x16(r);
        std::uint32_t* out = strip + (k / 8 + half) * kTile;
        for (int i = 0; i < 16; ++i) _mm512_storeu_ps(out + i * 16, r[i]);
      }
    }
  }

  static void tile(std::int64_t rows, std::int64_t depth, const std::uint32_t* a, std::int64_t,
                   const std::uint32_t* b, float* c, bool accumulate) {
    constexpr int kStride = kWidthOfC * 4;
    float* lower = c + 16 * kWidthOfC;
    const bool both = rows > 16;
    operands_are_stored();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (accumulate) {
      _tile_loadd(0, c, kStride);
      _tile_loadd(1, c + 16, kStride);
      if (both) {
        _tile_loadd(2, lower, kStride);
        _tile_loadd(3, lower + 16, kStride);
      }
    }
    for (std::int64_t k = 0; k < depth; k += 16) {
      const std::uint32_t* left = a + k * kHeight;
      const std::uint32_t* right = b + k * kWidthOfC;
      _tile_loadd(4, left, 64);
      _tile_loadd(6, right, kStride);
      _tile_loadd(7, right + 16, kStride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (both) {
        _tile_loadd(5, left + kTile, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, kStride);
    _tile_stored(1, c + 16, kStride);
    if (both) {
      _tile_stored(2, lower, kStride);
      _tile_stored(3, lower + 16, kStride);
    }
  }
};

}  // namespace
}  // namespace lowbitcore
