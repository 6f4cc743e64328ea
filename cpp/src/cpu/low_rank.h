// Adapters: products of activations with factors W [rank, C], as A is, and B^T.
//
//   narrow   X [M,C] W^T   summed along the rows of both
//   widen    L [M,rank] W
//   outer    L^T X         summed over the rows of both
#pragma once

#include "elementwise.h"
#include "outer.h"

namespace lowbitcore {
namespace {

constexpr int64_t kUnpackedRows = 4;            // at most, for which B is read as it lies
constexpr int64_t kNarrowRows = 16;             // that share a piece of W
constexpr int64_t kNarrowCols = 512;            // of that piece
constexpr int64_t kWidenRows = 48;              // of a task
constexpr int64_t kWidenCols = 256;             // of a task
constexpr int64_t kOuterRows = 32;              // of X that are floats at a time
constexpr int64_t kOuterPanels = 4;             // of X, at most, of a task
constexpr int64_t kDotRows = 2, kDotRanks = 4;  // whose sums live in registers

// ---- few rows ----

void add_low_rank_to_few(const ConstMatrix& y, const ConstMatrix& x, const LowRank& adapter,
                         const View<float>& low, const Matrix& sum, const Resources& use) {
  constexpr int64_t kElements = 1 << 14;  // of a factor, about, that a thread takes at a time
  const int64_t rank = adapter.a.rows;
  float* row = static_cast<float*>(use.workspace);
  for (int64_t m = 0; m < x.rows; ++m) {
    for (int64_t k = 0; k < x.cols; k += kWidth) {
      load_as_float(row_pointer(x, m), x.dtype, k).store(row + k);
    }
    float* narrow = low.data + m * low.stride;
    const int64_t ranks = larger(1, kElements / x.cols);
    parallel_for(divide_up(rank, ranks), use.threads, [&](int64_t part, int) {
      for (int64_t r = part * ranks; r < smaller(rank, (part + 1) * ranks); ++r) {
        const float* a = adapter.a.data + r * adapter.a.stride;
        narrow[r] = adapter.scaling * row_sum(x.cols, [&](int64_t k) {
                      return Vec::load(row + k) * Vec::load(a + k);
                    });
      }
    });
    const int64_t vectors = larger(1, kElements / (larger(rank, 1) * kWidth));
    parallel_for(divide_up(y.cols, vectors * kWidth), use.threads, [&](int64_t part, int) {
      const int64_t end = smaller(y.cols, (part + 1) * vectors * kWidth);
      for (int64_t n = part * vectors * kWidth; n < end; n += kWidth) {
        alignas(64) float sums[kWidth];
        for (int i = 0; i < kWidth; ++i) {
          const float* b = adapter.b.data + (n + i) * adapter.b.stride;
          Vec total = Vec::broadcast(0.0f);
          int64_t r = 0;
          for (; r + kWidth <= rank; r += kWidth) {
            total = madd(Vec::load(b + r), Vec::load(narrow + r), total);
          }
          float rest = 0.0f;
          for (; r < rank; ++r) rest += b[r] * narrow[r];
          sums[i] = (rank < kWidth ? 0.0f : lane_sum(total)) + rest;
        }
        store_as(load_as_float(row_pointer(y, m), y.dtype, n) + Vec::load(sums),
                 row_pointer(sum, m), sum.dtype, n);
      }
    });
  }
}

inline View<const float> read_only(const View<float>& v) {
  return {v.data, v.rows, v.cols, v.stride};
}

// ---- factors ----

// B^T in panels of `width` columns, a divisor of N: [N/width][rank][width].
inline void transpose_factor(const View<const float>& b, int64_t width, float* out, int threads) {
  parallel_for(b.rows / kPanel, threads, [&](int64_t part, int) {
    for (int64_t n = part * kPanel; n < (part + 1) * kPanel; ++n) {
      float* to = out + n / width * width * b.cols + n % width;
      for (int64_t r = 0; r < b.cols; ++r) to[r * width] = b.data[n * b.stride + r];
    }
  });
}

// W [rank, C] in panels, [C/32][rank][32].
inline void pack_factor(const View<const float>& w, float* out, int threads) {
  parallel_for(w.cols / kPanel, threads, [&](int64_t panel, int) {
    float* to = out + panel * w.rows * kPanel;
    for (int64_t r = 0; r < w.rows; ++r, to += kPanel) {
      for (int64_t c = 0; c < kPanel; c += kWidth) {
        Vec::load(w.data + r * w.stride + panel * kPanel + c).store(to + c);
      }
    }
  });
}

// ---- products ----

// low [M, rank] = factor X W^T. A vector of sums for each row and rank goes along the columns; its
// lanes are added up at the end.
struct NarrowStrip {
  const ConstMatrix& x;
  const View<const float>& w;
  float factor;
  const View<float>& low;

  int64_t rank = w.rows, padded = round_up(rank, kDotRanks);

  static int64_t scratch(int64_t rank) {
    return kNarrowRows * (kNarrowCols + round_up(rank, kDotRanks) * kWidth);
  }

  // Rows from `first` on.
  void operator()(int64_t first, float* memory) const {
    float *rows = memory, *sums = rows + kNarrowRows * kNarrowCols;
    const int64_t count = smaller(kNarrowRows, x.rows - first);
    std::memset(sums, 0, static_cast<size_t>(kNarrowRows * padded * kWidth) * 4);
    for (int64_t c = 0; c < x.cols; c += kNarrowCols) {
      const int64_t cols = smaller(kNarrowCols, x.cols - c);
      with_dtype(x.dtype, [&](auto type) {
        for (int64_t r = 0; r < round_up(count, kDotRows); ++r) {
          const char* row = row_pointer(x, first + smaller(r, count - 1));
          for (int64_t i = 0; i < cols; i += kWidth) {
            load_as_float(row, decltype(type)::value, c + i).store(rows + r * kNarrowCols + i);
          }
        }
      });
      for (int64_t j = 0; j < rank; j += kDotRanks) {
        const float* factors[kDotRanks];
        for (int64_t i = 0; i < kDotRanks; ++i) {
          factors[i] = w.data + smaller(j + i, rank - 1) * w.stride + c;
        }
        for (int64_t r = 0; r < count; r += kDotRows) {
          add_dots(rows + r * kNarrowCols, factors, cols, sums + (r * padded + j) * kWidth);
        }
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = 0; j < rank; ++j) {
        low.data[(first + r) * low.stride + j] =
            factor * lane_sum(Vec::load(sums + (r * padded + j) * kWidth));
      }
    }
  }

  // Of `kDotRows` rows with `kDotRanks` of W.
  void add_dots(const float* rows, const float* const (&factors)[kDotRanks], int64_t cols,
                float* sums) const {
    Vec acc[kDotRows][kDotRanks];
    for (int64_t r = 0; r < kDotRows; ++r) {
      for (int64_t j = 0; j < kDotRanks; ++j) {
        acc[r][j] = Vec::load(sums + (r * padded + j) * kWidth);
      }
    }
    for (int64_t c = 0; c < cols; c += kWidth) {
      Vec values[kDotRows];
      for (int64_t r = 0; r < kDotRows; ++r) values[r] = Vec::load(rows + r * kNarrowCols + c);
      for (int64_t j = 0; j < kDotRanks; ++j) {
        const Vec f = Vec::load(factors[j] + c);
        for (int64_t r = 0; r < kDotRows; ++r) acc[r][j] = madd(values[r], f, acc[r][j]);
      }
    }
    for (int64_t r = 0; r < kDotRows; ++r) {
      for (int64_t j = 0; j < kDotRanks; ++j) acc[r][j].store(sums + (r * padded + j) * kWidth);
    }
  }
};

void narrow(const ConstMatrix& x, const View<const float>& w, float factor, const View<float>& low,
            float* scratch, int threads) {
  const NarrowStrip multiply{x, w, factor, low};
  parallel_for(divide_up(x.rows, kNarrowRows), threads, [&](int64_t strip, int thread) {
    multiply(strip * kNarrowRows, scratch + thread * NarrowStrip::scratch(w.rows));
  });
}

// out = L W, plus `add` if it has data; W in panels. A thread needs rank * kWidenRows floats. A few
// rows at a time go along the columns, as memory is read ahead.
void widen(const View<const float>& low, const float* panels, const ConstMatrix& add,
           const Matrix& out, float* scratch, int threads) {
  const int64_t rank = low.cols, across = divide_up(out.cols, kWidenCols);
  parallel_for(divide_up(out.rows, kWidenRows) * across, threads, [&](int64_t task, int thread) {
    const int64_t first = task / across * kWidenRows, col = task % across * kWidenCols;
    const int64_t rows = smaller(kWidenRows, out.rows - first);
    const int64_t end = smaller(out.cols, col + kWidenCols);
    float* left = scratch + thread * rank * kWidenRows;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < rank; ++j) {
        left[j * kWidenRows + r] = low.data[(first + r) * low.stride + j];
      }
    }
    with_dtype(out.dtype, [&](auto type) {
      constexpr DType dtype = decltype(type)::value;
      for (int64_t r = 0; r < rows; r += kRows) {
        const int64_t height = smaller(kRows, rows - r);
        for (int64_t c = col; c < end; c += kPanel) {
          alignas(64) float sums[kRows * kPanel];
          Left<float>::tile(height, rank, left + r, kWidenRows, panels + c * rank, sums, false);
          for (int64_t i = 0; i < height; ++i) {
            const bool more = add.data != nullptr;
            const char* before = more ? row_pointer(add, first + r + i) : nullptr;
            char* row = row_pointer(out, first + r + i);
            for (int64_t lane = 0; lane < kPanel; lane += kWidth) {
              Vec sum = Vec::load(sums + i * kPanel + lane);
              if (more) sum = sum + load_as_float(before, dtype, c + lane);
              store_as(sum, row, dtype, c + lane);
            }
          }
        }
      }
    });
  });
}

// Floats of a thread.
inline int64_t outer_scratch(int64_t rank) { return kOuterPanels * kPanel * (kOuterRows + rank); }

// Calls put(column, sums [rank][32]) with the columns of L^T X from `column` on.
template <typename Put>
void outer(const View<const float>& low, const ConstMatrix& x, float* scratch, int threads,
           const Put& put) {
  const int64_t rank = low.cols, panels = x.cols / kPanel;
  const int64_t wide = larger(1, smaller(kOuterPanels, panels / (2 * threads)));
  parallel_for(divide_up(panels, wide), threads, [&](int64_t task, int thread) {
    float* values = scratch + thread * outer_scratch(rank);  // [panels][kOuterRows][32]
    float* sums = values + kOuterPanels * kOuterRows * kPanel;
    const int64_t first = task * wide, count = smaller(wide, panels - first);
    std::memset(sums, 0, static_cast<size_t>(count * rank * kPanel) * 4);
    for (int64_t row = 0; row < x.rows; row += kOuterRows) {
      const int64_t rows = smaller(kOuterRows, x.rows - row);
      with_dtype(x.dtype, [&](auto type) {
        for (int64_t r = 0; r < rows; ++r) {
          const char* from = row_pointer(x, row + r);
          for (int64_t c = 0; c < count * kPanel; c += kWidth) {
            load_as_float(from, decltype(type)::value, first * kPanel + c)
                .store(values + (c / kPanel * kOuterRows + r) * kPanel + c % kPanel);
          }
        }
      });
      for (int64_t p = 0; p < count; ++p) {
        multiply_panels(rank, rows, low.data + row * low.stride, low.stride,
                        values + p * kOuterRows * kPanel, sums + p * rank * kPanel, true);
      }
    }
    for (int64_t p = 0; p < count; ++p) put((first + p) * kPanel, sums + p * rank * kPanel);
  });
}

// ---- forward and backward ----

// Floats of all threads, which products take in turn.
inline int64_t low_rank_scratch(int64_t rank, int threads) {
  return threads *
         larger(NarrowStrip::scratch(rank), larger(rank * kWidenRows, outer_scratch(rank)));
}

size_t add_low_rank_workspace(const LowRankShape& s, int threads) {
  if (s.rows <= kUnpackedRows) return static_cast<size_t>(s.in_features) * 4;
  return static_cast<size_t>(s.rank * s.out_features + low_rank_scratch(s.rank, threads)) * 4;
}

void add_low_rank(ConstMatrix y, ConstMatrix x, const LowRank& adapter, View<float> low, Matrix sum,
                  const Resources& use) {
  if (x.rows <= kUnpackedRows) return add_low_rank_to_few(y, x, adapter, low, sum, use);
  float* panels = static_cast<float*>(use.workspace);
  float* scratch = panels + adapter.b.rows * adapter.b.cols;
  transpose_factor(adapter.b, kPanel, panels, use.threads);
  narrow(x, adapter.a, adapter.scaling, low, scratch, use.threads);
  widen(read_only(low), panels, y, sum, scratch, use.threads);
}

size_t add_low_rank_backward_workspace(const LowRankShape& s, int threads) {
  const int64_t factors = s.rank * (s.in_features + s.out_features);
  return static_cast<size_t>(factors + low_rank_scratch(s.rank, threads) + s.rows * s.rank) * 4;
}

void add_low_rank_backward(ConstMatrix dy, ConstMatrix x, View<const float> low,
                           const LowRank& adapter, const LowRankGrads& grads,
                           const Resources& use) {
  const int64_t rank = adapter.a.rows, inputs = adapter.a.cols, outputs = dy.cols;
  float* b_transposed = static_cast<float*>(use.workspace);
  float* panels = b_transposed + rank * outputs;
  float* scratch = panels + rank * inputs;
  const View<float> d_low{scratch + low_rank_scratch(rank, use.threads), dy.rows, rank, rank};
  if (grads.dx.data != nullptr || grads.da.data != nullptr) {
    transpose_factor(adapter.b, outputs, b_transposed, use.threads);
    narrow(dy, {b_transposed, rank, outputs, outputs}, adapter.scaling, d_low, scratch,
           use.threads);
  }
  if (grads.dx.data != nullptr) {
    pack_factor(adapter.a, panels, use.threads);
    widen(read_only(d_low), panels, {}, grads.dx, scratch, use.threads);
  }
  if (grads.da.data != nullptr) {
    outer(read_only(d_low), x, scratch, use.threads, [&](int64_t col, const float* sums) {
      for (int64_t r = 0; r < rank; ++r) {
        std::memcpy(grads.da.data + r * grads.da.stride + col, sums + r * kPanel, kPanel * 4);
      }
    });
  }
  if (grads.db.data != nullptr) {
    outer(low, dy, scratch, use.threads, [&](int64_t col, const float* sums) {
      for (int64_t n = 0; n < kPanel; ++n) {
        float* row = grads.db.data + (col + n) * grads.db.stride;
        for (int64_t r = 0; r < rank; ++r) row[r] = sums[r * kPanel + n];
      }
    });
  }
}

}  // namespace
}  // namespace lowbitcore
