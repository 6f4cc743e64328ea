// X W^T and dY W of bf16 activations on tiles: which way a product goes, and what each way needs of
// a weight. X W^T has large weights on its left, so that its results come out transposed, and small
// ones on its right, so that rows are used as they lie.
#pragma once

#include "tiles_few.h"
#include "tiles_resident.h"
#include "tiles_streamed.h"

namespace lowbitcore {
namespace {

constexpr int64_t kPanelsTogether = 4;  // of dY W, whose groups lie across panels
static_assert(kMostTiles >= kPanelsTogether, "runs of tiles");

inline Vec bias_or_zero(const float* bias, int64_t n) {
  return bias == nullptr ? Vec::broadcast(0.0f) : Vec::load(bias + n);
}

template <int B>
struct StreamedForward {
  const QuantWeight& w;
  const float* bias;
  Matrix out;

  void pack(const ConstMatrix& x, int64_t row, int64_t rows, int64_t step, int64_t steps,
            uint32_t* to) const {
    pack_right<B>(x, row, rows, step, steps, to);
  }

  void fill(int64_t panel, int64_t, int64_t step, int64_t steps, uint32_t* out) const {
    for (int64_t half = 0; half < 2; ++half) {
      const Block<B> block(w, panel * 2 + half);
      uint32_t* tiles = out + half * kTileWords;
      for_each_group(block, step, steps, [&](int64_t tile, int64_t count, const auto& weights) {
        weights.left_tiles(block, tile, count, tiles + (tile - step) * kStepWords, kStepWords);
      });
    }
  }

  template <typename Between>
  void multiply(int64_t rows, int64_t steps, const uint32_t* activations, const uint32_t* weights,
                float* c, bool accumulate, const Between& between) const {
    if (rows > 16) {
      multiply_tiles<false, true, true>(steps, LeftTiles(weights), activations, c, accumulate,
                                        between, [] {});
    } else {
      multiply_tiles<false, true, false>(steps, LeftTiles(weights), activations, c, accumulate,
                                         between, [] {});
    }
  }

  void store(const float* c, int64_t rows, int64_t row, int64_t panel) const {
    const int64_t n = panel * kPanel;
    const Vec b[2] = {bias_or_zero(bias, n), bias_or_zero(bias, n + 16)};
    for (int64_t first = 0; first < rows; first += 16, c += kTileWords) {
      __m512 low[16], high[16];
      for (int i = 0; i < 16; ++i) {
        low[i] = _mm512_load_ps(c + i * 16);
        high[i] = _mm512_load_ps(c + kLowerSums + i * 16);
      }
      transpose_16x16(low);
      transpose_16x16(high);
      for (int64_t i = 0; i < smaller(16, rows - first); ++i) {
        store_line(Vec{low[i]} + b[0], Vec{high[i]} + b[1], out, row + first + i, n);
      }
    }
  }
};

// Of resident weights.
template <int B>
struct ResidentForward {
  const QuantWeight& w;
  const float* bias;
  Matrix out;

  void fill(int64_t panel, int64_t, int64_t step, int64_t steps, uint32_t* out) const {
    for (int64_t half = 0; half < 2; ++half) {
      const Block<B> block(w, panel * 2 + half);
      for (int64_t s = 0; s < steps; ++s) {
        dequantize_tile(block, step + s, out + s * kStepWords + half * kTileWords, 16);
      }
    }
  }

  void store(const float* c, int64_t rows, int64_t row, int64_t panel) const {
    const int64_t n = panel * kPanel;
    const Vec b[2] = {bias_or_zero(bias, n), bias_or_zero(bias, n + 16)};
    for (int64_t r = 0; r < rows; ++r) {
      const float* left = row_of_sums(c, r);
      store_line(Vec::load(left) + b[0], Vec::load(left + kTileWords) + b[1], out, row + r, n);
    }
  }
};

template <int B>
struct Backward {
  const QuantWeight& w;
  Matrix out;

  void pack(const ConstMatrix& dy, int64_t row, int64_t rows, int64_t step, int64_t steps,
            uint32_t* to) const {
    pack_left(dy, row, rows, step, steps, to);
  }

  void fill(int64_t panel, int64_t panels, int64_t step, int64_t steps, uint32_t* out) const {
    constexpr int64_t kApart = kPieceWords;
    for (int64_t n = 0; n < 2 * steps; ++n) {
      const Block<B> block(w, 2 * step + n);
      uint32_t* to = out + n / 2 * kStepWords + n % 2 * kTileWords / 2;
      for_each_group(block, panel, panels, [&](int64_t tile, int64_t count, const auto& weights) {
        weights.right_tiles(block, tile, count, to + (tile - panel) * kApart, kApart);
      });
    }
  }

  template <typename Between>
  void multiply(int64_t rows, int64_t steps, const uint32_t* activations, const uint32_t* weights,
                float* c, bool accumulate, const Between& between) const {
    if (rows > 16) {
      multiply_tiles<true, true, true>(steps, LeftTiles(activations), weights, c, accumulate,
                                       between, [] {});
    } else {
      multiply_tiles<true, false, true>(steps, LeftTiles(activations), weights, c, accumulate,
                                        between, [] {});
    }
  }

  void store(const float* c, int64_t rows, int64_t row, int64_t panel) const {
    static constexpr Lanes32 kColumns[2] = {columns_in_lanes<B>(0), columns_in_lanes<B>(1)};
    for (int64_t r = 0; r < rows; ++r) {
      const float* left = row_of_sums(c, r);
      const __m512 a = _mm512_load_ps(left), b = _mm512_load_ps(left + kTileWords);
      Vec v[2];
      for (int half = 0; half < 2; ++half) {
        v[half].v = _mm512_permutex2var_ps(a, _mm512_load_si512(&kColumns[half]), b);
      }
      store_line(v[0], v[1], out, row + r, panel * kPanel);
    }
  }
};

inline size_t tiles_workspace(int64_t m, int64_t depth, int64_t outputs, int64_t together,
                              int threads) {
  if (m == 0) return 0;
  if (Resident::serves(depth, outputs)) {
    return static_cast<size_t>(threads * Resident(depth, outputs, threads).words()) * 4;
  }
  const Streamed streamed(m, depth, outputs, together, threads);
  return static_cast<size_t>(streamed.activation_words(depth) +
                             threads * (streamed.piece_words() + streamed.sums())) *
         4;
}

inline size_t tiles_nt_workspace(const QuantFormat& f, int64_t m, int threads) {
  if (m <= kFewRows) return few_workspace(f.in_features);
  return tiles_workspace(m, f.in_features, f.out_features, 1, threads);
}

inline size_t tiles_nn_workspace(const QuantFormat& f, int64_t m, int threads) {
  return tiles_workspace(m, f.out_features, f.in_features, kPanelsTogether, threads);
}

template <int B>
void tiles_nt(ConstMatrix x, const QuantWeight& w, const float* bias, Matrix y,
              const Resources& use) {
  if (x.rows <= kFewRows) return tiles_nt_few<B>(x, w, bias, y, use);
  if (Resident::serves(x.cols, y.cols)) {
    multiply_resident(x, y.cols, 1, use, ResidentForward<B>{w, bias, y});
  } else {
    multiply_streamed(x, y.cols, 1, use, StreamedForward<B>{w, bias, y});
  }
}

template <int B>
void tiles_nn(ConstMatrix dy, const QuantWeight& w, Matrix dx, const Resources& use) {
  const Backward<B> product{w, dx};
  if (Resident::serves(dy.cols, dx.cols)) {
    multiply_resident(dy, dx.cols, kPanelsTogether, use, product);
  } else {
    multiply_streamed(dy, dx.cols, kPanelsTogether, use, product);
  }
}

}  // namespace
}  // namespace lowbitcore
