// Products with large weights, which are dequantised a piece of a panel at a time.
//
// The second-level cache holds a thread's sums, of some rows and panels, and of these rows' packed
// activations a piece of the reduction, which all of these panels meet before the next piece; the
// first level holds a panel's piece, dequantised there.
#pragma once

#include "tiles.h"

namespace lowbitcore {
namespace {

constexpr int64_t kMostActivations = 1 << 17;  // words of a piece: 512 KB
constexpr int64_t kMostSums = (3 << 18) / 4;   // that a thread holds: 768 KB

// How the product of a large weight is cut.
struct Streamed {
  int64_t rows, panels;  // of a thread's sums
  int64_t steps;         // of a piece
  int64_t together;      // panels that are dequantised at once

  Streamed(int64_t m, int64_t depth, int64_t outputs, int64_t most_together, int threads) {
    const int64_t all = outputs / kPanel;
    steps = piece_steps(depth);
    const int64_t most_rows = kMostActivations / (steps * kStepWords) * kStrip;
    rows = round_up(divide_up(m, divide_up(m, most_rows)), kStrip);
    const int64_t most = larger(kMostSums / (rows * kPanel), 1);
    panels = divide_up(all, round_up(divide_up(all, most), threads));
    together = smaller(panels, most_together);
  }

  int64_t activation_words(int64_t depth) const { return rows * depth / 2; }
  int64_t piece_words() const { return together * kPieceWords; }
  int64_t sums() const { return panels * sums_of_all(rows / kStrip); }
};

// For writing, of 32 columns of some rows.
LOWBITCORE_INLINE void prefetch_outputs(const Matrix& out, int64_t first, int64_t rows,
                                        int64_t panel) {
  for (int64_t r = 0; r < rows; ++r) {
    __builtin_prefetch(row_pointer(out, first + r) + panel * kPanel * 2, 1);
  }
}

// Product::pack(x, first row, rows, first step, steps, out) packs a strip of activations;
// fill(panel, panels, first step, steps, out) dequantises a piece of panels, [panels][kPieceSteps];
// multiply(rows, ...) is multiply_tiles for a strip of so many rows, of which the first-level cache
// is not to keep the activations; store(c, rows, row, panel) takes a strip's result.
template <typename Product>
void multiply_streamed(const ConstMatrix& x, int64_t outputs, int64_t most_together,
                       const Resources& use, const Product& product) {
  const Streamed streamed(x.rows, x.cols, outputs, most_together, use.threads);
  auto* packed = static_cast<uint32_t*>(use.workspace);
  uint32_t* weights = packed + streamed.activation_words(x.cols);
  auto* results = reinterpret_cast<float*>(weights + use.threads * streamed.piece_words());
  const int64_t all_steps = x.cols / kTileK, all_panels = outputs / kPanel;
  for (int64_t row0 = 0; row0 < x.rows; row0 += streamed.rows) {
    const int64_t rows = smaller(streamed.rows, x.rows - row0), strips = divide_up(rows, kStrip);
    // A strip's activations from a piece's first step on.
    const auto strip_of = [&](int64_t step, int64_t strip) {
      const int64_t steps = smaller(streamed.steps, all_steps - step);
      return packed + (step * strips + strip * steps) * kStepWords;
    };
    parallel_for(strips, use.threads, [&](int64_t strip, int) {
      const int64_t row = strip * kStrip;
      for (int64_t step = 0; step < all_steps; step += streamed.steps) {
        product.pack(x, row0 + row, smaller(kStrip, rows - row), step,
                     smaller(streamed.steps, all_steps - step), strip_of(step, strip));
      }
    });
    parallel_for(divide_up(all_panels, streamed.panels), use.threads, [&](int64_t i, int thread) {
      const TileScope scope;
      const int64_t panel0 = i * streamed.panels;
      const int64_t panels = smaller(streamed.panels, all_panels - panel0);
      uint32_t* w = weights + thread * streamed.piece_words();
      float* c = results + thread * streamed.sums();
      const auto sums_of = [&](int64_t panel, int64_t strip) {
        return c + panel * sums_of_all(strips) + sums_at(strip);
      };
      for (int64_t step = 0; step < all_steps; step += streamed.steps) {
        const int64_t steps = smaller(streamed.steps, all_steps - step), end = step + steps;
        // The next piece of activations comes from beyond the second level: each product asks for
        // a part of it.
        Ahead activations = {reinterpret_cast<const char*>(strip_of(end == all_steps ? 0 : end, 0)),
                             divide_up(kStepWords / kLineWords, panels)};
        const int64_t sum_lines =
            divide_up(2 * kTileWords / kLineWords, steps);  // of a half, a step
        for (int64_t first = 0; first < panels; first += streamed.together) {
          const int64_t together = smaller(streamed.together, panels - first);
          product.fill(panel0 + first, together, step, steps, w);
          for (int64_t p = first; p < first + together; ++p) {
            const uint32_t* piece = w + (p - first) * kPieceWords;
            for (int64_t strip = 0; strip < strips; ++strip) {
              float* sums = sums_of(p, strip);
              const float* next = sums_of(p, strip + 1);
              Ahead upper = {reinterpret_cast<const char*>(next), sum_lines};
              Ahead lower = {reinterpret_cast<const char*>(next + kLowerSums), sum_lines};
              product.multiply(smaller(kStrip, rows - strip * kStrip), steps, strip_of(step, strip),
                               piece, sums, step > 0, [&] {
                                 upper.ask<3>();
                                 lower.ask<3>();
                                 activations.ask<2>();
                               });
            }
          }
        }
      }
      // A row's results are stored side by side: each row lies in a page of its own.
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t row = strip * kStrip, count = smaller(kStrip, rows - row);
        for (int64_t p = 0; p < panels; ++p) {
          if (p + 1 < panels) prefetch_outputs(product.out, row0 + row, count, panel0 + p + 1);
          product.store(sums_of(p, strip), count, row0 + row, panel0 + p);
        }
      }
    });
  }
}

}  // namespace
}  // namespace lowbitcore
