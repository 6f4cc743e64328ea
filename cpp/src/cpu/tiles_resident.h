// Products with small weights: the second-level cache holds many panels of them, dequantised at
// their whole depth, and rows come by, a strip's piece at a time in the first level.
#pragma once

#include "tiles.h"

namespace lowbitcore {
namespace {

constexpr int64_t kMostResident = 1 << 18;  // words of a thread's dequantised panels: 1 MB
constexpr int64_t kMostCopies = 3 << 18;    // of all threads' together
constexpr int64_t kFewestResident = 8;      // panels, or rows would come by too often
constexpr int64_t kFewestStrips = 8;        // of a thread; of fewer rows threads share the outputs

// How the product of a small weight is cut. Each thread dequantises what it multiplies by itself:
// what another one has written takes longer to fetch than to compute.
struct Resident {
  int64_t panels;         // that a thread has at a time
  int64_t steps, pieces;  // of the reduction

  Resident(int64_t depth, int64_t outputs, int threads)
      : steps(piece_steps(depth)), pieces(pieces_of(depth)) {
    const int64_t all = outputs / kPanel;
    const int64_t most = most_panels(depth, smaller(kMostResident, kMostCopies / threads));
    panels = divide_up(all, divide_up(all, most));
  }

  // Says the same for any number of rows and threads: sums are added up in another order here.
  static bool serves(int64_t depth, int64_t outputs) {
    return most_panels(depth, kMostResident) >= smaller(kFewestResident, outputs / kPanel);
  }

  int64_t weight_words() const { return pieces * panels * kPieceWords; }
  int64_t sums() const { return sums_of_all(pieces == 1 ? 2 : panels); }
  int64_t words() const { return weight_words() + kPieceWords + sums(); }

 private:
  static int64_t pieces_of(int64_t depth) { return divide_up(depth / kTileK, piece_steps(depth)); }

  static int64_t most_panels(int64_t depth, int64_t words) {
    return larger(words / (pieces_of(depth) * kPieceWords), 1);
  }
};

// Whether tiles are read from rows as they lie: in whole lines, which the first-level cache does
// not hold to a few of its sets.
inline bool tiles_as_they_lie(const ConstMatrix& x) {
  const auto address = reinterpret_cast<std::uintptr_t>(x.data);
  return address % 64 == 0 && x.stride % 32 == 0 && x.stride % 1024 != 0;
}

// A thread's share of strips and panels. Of a Product this wants fill and store alone, as of
// streamed weights; it dequantises right operands.
template <typename Product>
void multiply_share(const ConstMatrix& x, const Resident& resident, Range strips, Range all_panels,
                    int64_t most_together, uint32_t* weights, const Product& product) {
  const TileScope scope;
  uint32_t* packed = weights + resident.weight_words();
  auto* results = reinterpret_cast<float*>(packed + kPieceWords);
  const int64_t pieces = resident.pieces;
  const auto step_of = [&](int64_t piece) { return piece * resident.steps; };
  const auto steps_of = [&](int64_t piece) {
    return smaller(resident.steps, x.cols / kTileK - step_of(piece));
  };
  for (int64_t panel0 = all_panels.first; panel0 < all_panels.end; panel0 += resident.panels) {
    const int64_t panels = smaller(resident.panels, all_panels.end - panel0);
    const auto weights_of = [&](int64_t piece, int64_t panel) {
      return weights + (piece * panels + panel) * kPieceWords;
    };
    const auto sums_of = [&](int64_t panel) {
      return results + sums_at(pieces == 1 ? panel % 2 : panel);
    };
    for (int64_t piece = 0; piece < pieces; ++piece) {
      for (int64_t first = 0; first < panels; first += most_together) {
        product.fill(panel0 + first, smaller(most_together, panels - first), step_of(piece),
                     steps_of(piece), weights_of(piece, first));
      }
    }
    for (int64_t strip = strips.first; strip < strips.end; ++strip) {
      const int64_t row = strip * kStrip, rows = smaller(kStrip, x.rows - row);
      const bool direct = rows == kStrip && tiles_as_they_lie(x);
      // The next strip, where rows follow each other in memory.
      Ahead next = {nullptr, 0};
      if (strip + 1 < strips.end && x.stride == x.cols) {
        next = {row_pointer(x, row + kStrip), divide_up(kStrip, panels)};
      }
      const auto between = [&] { next.ask<2>(); };
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t step = step_of(piece), steps = steps_of(piece);
        if (!direct) pack_left(x, row, rows, step, steps, packed);
        const LeftTiles left = direct ? LeftTiles(x, row, step) : LeftTiles(packed);
        const bool last = piece + 1 == pieces;
        const auto multiply = [&](auto lower, int64_t p) {
          multiply_tiles<false, decltype(lower)::value, true>(
              steps, left, weights_of(piece, p), sums_of(p), piece > 0, between, [&] {
                if (last && p > 0) product.store(sums_of(p - 1), rows, row, panel0 + p - 1);
              });
        };
        for (int64_t p = 0; p < panels; ++p) {
          rows > 16 ? multiply(std::true_type(), p) : multiply(std::false_type(), p);
        }
        if (last) product.store(sums_of(panels - 1), rows, row, panel0 + panels - 1);
      }
    }
  }
}

template <typename Product>
void multiply_resident(const ConstMatrix& x, int64_t outputs, int64_t most_together,
                       const Resources& use, const Product& product) {
  const Resident resident(x.cols, outputs, use.threads);
  const Range strips = {0, divide_up(x.rows, kStrip)}, panels = {0, outputs / kPanel};
  const auto multiply = [&](Range some_strips, Range some_panels, int thread) {
    multiply_share(x, resident, some_strips, some_panels, most_together,
                   static_cast<uint32_t*>(use.workspace) + thread * resident.words(), product);
  };
  // By rows the next operation, if it does so too, finds its own in the cache of its thread. Of few
  // rows the weights cost more, and each thread takes some.
  if (strips.end >= kFewestStrips * use.threads) {
    parallel_ranges(strips.end, use.threads,
                    [&](Range share, int thread) { multiply(share, panels, thread); });
  } else {
    parallel_ranges(panels.end, use.threads,
                    [&](Range share, int thread) { multiply(strips, share, thread); });
  }
}

}  // namespace
}  // namespace lowbitcore
