// Products with dense weights, whose elements become fp32 in panels: X W^T and X W.
#pragma once

#include "elementwise.h"
#include "gemm.h"

namespace lowbitcore {
namespace {

constexpr int64_t kFewDenseRows = 8;  // up to so many, X W^T reads weights as they lie
constexpr int64_t kDotInputs = 2, kDotOutputs = 4;  // whose sums live in registers
constexpr int64_t kSlice = 512;  // of X's columns, in X W, that are packed at a time, for the cache
// How far ahead weights are prefetched; past their end that does nothing.
constexpr int64_t kBytesAhead = 5120;  // where they are read as they lie
constexpr int64_t kRowsAhead = 16;     // where a panel takes a little of each row
static_assert(kSlice % kDepth == 0, "panels end where slices do");

// ---- X W^T of few rows, or few outputs ----

// Sums of `R` rows of x with `kDotOutputs` rows of W.
template <DType Type, int R>
void dots(const char* const (&x)[kDotInputs], const char* const (&w)[kDotOutputs], int64_t cols,
          float (&sums)[kDotInputs][kDotOutputs]) {
  Vec acc[R][kDotOutputs];
  for (int r = 0; r < R; ++r) {
    for (Vec& sum : acc[r]) sum = Vec::broadcast(0.0f);
  }
  for (int64_t k = 0; k < cols; k += kWidth) {
    Vec values[R];
    for (int r = 0; r < R; ++r) values[r] = load_as_float(x[r], Type, k);
    for (int j = 0; j < kDotOutputs; ++j) {
      __builtin_prefetch(w[j] + kBytesAhead + k * bytes_of(Type));
      const Vec weight = load_as_float(w[j], Type, k);
      for (int r = 0; r < R; ++r) acc[r][j] = madd(values[r], weight, acc[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kDotOutputs; ++j) sums[r][j] = lane_sum(acc[r][j]);
  }
}

// Weights are read as they lie, once for every `kDotInputs` rows.
void dense_dots(const ConstMatrix& x, const ConstMatrix& weight, const float* bias, const Matrix& y,
                int64_t first_output, int threads) {
  constexpr int64_t kElements = 1 << 15;  // of a weight, about, that a thread takes at a time
  const int64_t outputs = y.cols - first_output;
  const int64_t part = round_up(larger(1, kElements / x.cols), kWidth);
  parallel_for(divide_up(outputs, part), threads, [&](int64_t index, int) {
    const int64_t begin = first_output + index * part, end = smaller(y.cols, begin + part);
    with_dtype(x.dtype, [&](auto type) {
      constexpr DType dtype = decltype(type)::value;
      for (int64_t n = begin; n < end; n += kDotOutputs) {
        const char* w[kDotOutputs];
        for (int64_t j = 0; j < kDotOutputs; ++j) {
          w[j] = row_pointer(weight, smaller(n + j, end - 1));
        }
        for (int64_t m = 0; m < x.rows; m += kDotInputs) {
          const int64_t rows = smaller(kDotInputs, x.rows - m);
          const char* in[kDotInputs];
          for (int64_t r = 0; r < kDotInputs; ++r) in[r] = row_pointer(x, m + smaller(r, rows - 1));
          float sums[kDotInputs][kDotOutputs];
          (rows == 1 ? dots<dtype, 1> : dots<dtype, kDotInputs>)(in, w, x.cols, sums);
          for (int64_t r = 0; r < rows; ++r) {
            char* row = row_pointer(y, m + r);
            for (int64_t j = 0; j < smaller(kDotOutputs, end - n); ++j) {
              store_scalar(sums[r][j] + (bias == nullptr ? 0.0f : bias[n + j]), row, dtype, n + j);
            }
          }
        }
      }
    });
  });
}

// ---- products ----

size_t gemm_nt_workspace(int64_t m, int64_t cols, int threads) {
  return gemm_workspace(m, cols, threads);
}

void gemm_nt(ConstMatrix x, ConstMatrix weight, const float* bias, Matrix y, const Resources& use) {
  const int64_t panels = x.rows <= kFewDenseRows ? 0 : y.cols / kPanel;
  if (panels > 0) {
    const Matrix whole{y.data, y.dtype, y.rows, panels * kPanel, y.stride};
    panel_gemm<float>(x, bias, whole, use.threads, use.workspace,
                      [&](int64_t panel, int64_t first, int64_t count, float* p) {
                        with_dtype(weight.dtype, [&](auto type) {
                          for (int64_t k = 0; k < count; k += kBlockN) {
                            alignas(64) float rows[kPanel * kBlockN];
                            for (int64_t n = 0; n < kPanel; ++n) {
                              const char* row = row_pointer(weight, panel * kPanel + n);
                              for (int64_t c = 0; c < kBlockN; c += kWidth) {
                                load_as_float(row, decltype(type)::value, first + k + c)
                                    .store(rows + n * kBlockN + c);
                              }
                            }
                            transpose_tile(rows, p + k * kPanel);
                          }
                        });
                      });
  }
  if (panels * kPanel < y.cols) dense_dots(x, weight, bias, y, panels * kPanel, use.threads);
}

// Sums of a block of rows [K/32][rows][32], a slice of x in strips, and a thread's panel.
size_t gemm_nn_workspace(int64_t m, int64_t cols, int threads) {
  const int64_t rows = round_up(smaller(m, kRowBlock), kStripRows);
  return static_cast<size_t>(rows * (cols + kSlice) + threads * kPanelElements) * 4;
}

void gemm_nn(ConstMatrix x, ConstMatrix weight, const float* bias, Matrix y, const Resources& use) {
  const int64_t block = round_up(smaller(x.rows, kRowBlock), kStripRows);
  float* sums = static_cast<float*>(use.workspace);
  float* packed = sums + block * y.cols;
  float* scratch = packed + block * kSlice;
  for (int64_t row0 = 0; row0 < x.rows; row0 += kRowBlock) {
    const int64_t rows = smaller(kRowBlock, x.rows - row0);
    for (int64_t n0 = 0; n0 < x.cols; n0 += kSlice) {
      const int64_t depth = smaller(kSlice, x.cols - n0);
      const ConstMatrix slice{row_pointer(x, 0) + n0 * bytes_of(x.dtype), x.dtype, x.rows, depth,
                              x.stride};
      pack_rows(slice, row0, rows, packed, use.threads);
      parallel_for(y.cols / kPanel, use.threads, [&](int64_t panel, int thread) {
        float* p = scratch + thread * kPanelElements;
        float* c = sums + panel * rows * kPanel;
        for (int64_t d = 0; d < depth; d += kDepth) {
          const int64_t count = smaller(kDepth, depth - d);
          with_dtype(weight.dtype, [&](auto type) {
            constexpr DType dtype = decltype(type)::value;
            const int64_t ahead = kRowsAhead * weight.stride + panel * kPanel;
            for (int64_t n = 0; n < count; ++n) {
              const char* row = row_pointer(weight, n0 + d + n);
              __builtin_prefetch(row + ahead * bytes_of(dtype));
              for (int64_t k = 0; k < kPanel; k += kWidth) {
                load_as_float(row, dtype, panel * kPanel + k).store(p + n * kPanel + k);
              }
            }
          });
          multiply_strips(rows, depth, packed, d, count, p, c, n0 + d > 0);
        }
        if (n0 + depth == x.cols) {
          store_outputs(c, rows, kPanel, bias, y, row0, panel * kPanel);
        }
      });
    }
  }
}

}  // namespace
}  // namespace lowbitcore
