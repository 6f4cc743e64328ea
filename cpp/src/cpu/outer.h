// Products of two activations summed over tokens (SYRK, and X^T Y): Hessians, cross terms, scale
// gradients.
#pragma once

#include "gemm.h"

namespace lowbitcore {
namespace {

constexpr int64_t kPassElements = 512;  // at most, of the reduction in one pass over tokens

template <typename Element>
constexpr int64_t kPassRows = kPassElements * Operand<Element>::kPer;

// Elements that a pass over `m` rows may take of any type.
constexpr int64_t pass_elements(int64_t m) {
  const int64_t rows = smaller(m, kPassElements);
#ifdef LOWBITCORE_PAIRS
  return rows + Left<uint32_t>::kDepthMultiple;
#else
  return rows;
#endif
}

template <typename Element>
constexpr int64_t token_elements(int64_t rows) {
  return round_up(divide_up(rows, Operand<Element>::kPer), Left<Element>::kDepthMultiple);
}

// Columns [first_col, first_col + kPanel) of some rows of x, stored [elements][kPanel].
inline void copy_panel(const ConstMatrix& x, int64_t first_row, int64_t rows, int64_t first_col,
                       float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const char* row = row_pointer(x, first_row + r);
    for (int64_t c = 0; c < kPanel; c += kWidth) {
      load_as_float(row, x.dtype, first_col + c).store(out + r * kPanel + c);
    }
  }
}

#ifdef LOWBITCORE_PAIRS
// Two tokens to an element; missing ones are zeros.
inline void copy_panel(const ConstMatrix& x, int64_t first_row, int64_t rows, int64_t first_col,
                       uint32_t* out) {
  const auto at = [&](int64_t r, int64_t c) {
    if (r >= rows) return VecI::broadcast(0);
    const char* row = row_pointer(x, first_row + r);
    return VecI::load_u16(reinterpret_cast<const uint16_t*>(row) + first_col + c);
  };
  for (int64_t p = 0; p < token_elements<uint32_t>(rows); ++p) {
    for (int64_t c = 0; c < kPanel; c += kWidth) {
      (at(2 * p, c) | at(2 * p + 1, c).template left<16>()).store(out + p * kPanel + c);
    }
  }
}
#endif

// x in column panels: [cols/32][elements][32].
template <typename Element>
void pack_panels(const ConstMatrix& x, int64_t first, int64_t rows, Element* packed, int threads) {
  parallel_for(x.cols / kPanel, threads, [&](int64_t panel, int) {
    copy_panel(x, first, rows, panel * kPanel,
               packed + panel * token_elements<Element>(rows) * kPanel);
  });
}

// The same as left operands, the columns of x being their rows.
template <typename Element>
void pack_left_panels(const ConstMatrix& x, int64_t first, int64_t rows, Element* packed,
                      int threads) {
  if constexpr (Left<Element>::kTakesPanels) {
    pack_panels(x, first, rows, packed, threads);
  } else {
    const int64_t depth = token_elements<Element>(rows);
    parallel_for(x.cols / kPanel, threads, [&](int64_t panel, int) {
      alignas(64) Element columns[kPassElements * kPanel];
      copy_panel(x, first, rows, panel * kPanel, columns);
      Left<Element>::store_panel(columns, depth, packed + panel * depth * kPanel);
    });
  }
}

// ---- scale gradients ----

size_t qgemm_grad_scales_workspace(const QuantFormat& f, int64_t m, int threads) {
  const int64_t activations = pass_elements(m) * (f.in_features + f.out_features);
  return static_cast<size_t>(activations + threads * kPanel * kPanel) * 4;
}

// ds[g, 16 outputs] += sum over the inputs of one tile of (q - z) * dw
template <int B>
void contract_tile(const Block<B>& block, int64_t tile, const float* dw, float* ds,
                   int64_t stride) {
  const int64_t k0 = tile * kTileK;
  for (int lane = 0; lane < kBlockN; lane += kWidth) {
    const uint32_t* words = block.tile_words(tile) + lane;
    if (block.g_idx == nullptr) {
      const int64_t g = k0 / block.group_size;
      Vec sum = Vec::broadcast(0.0f);
      for_each_difference(words, Zeros<B>(block.zero(g, lane)), [&](int i, const Vec& d) {
        sum = madd(d, Vec::load(dw + i * kPanel + lane), sum);
      });
      float* out = ds + g * stride + lane;
      (Vec::load(out) + sum).store(out);
    } else {
      for_each_code<B>(words, [&](int i, const Vec& q) {
        const int64_t g = block.g_idx[k0 + i];
        float* out = ds + g * stride + lane;
        madd(q - block.zero(g, lane), Vec::load(dw + i * kPanel + lane), Vec::load(out)).store(out);
      });
    }
  }
}

// Elements of x that stay in the second-level cache while all panels of dY meet them.
constexpr int64_t kCachedElements = (1 << 20) / 4;

template <int B, typename Element>
void grad_scales(const ConstMatrix& dy, const ConstMatrix& x, const QuantWeight& w,
                 const View<float>& ds, int threads, Element* xp) {
  const int64_t tiles = w.format.in_features / kTileK, most = pass_elements(dy.rows);
  Element* dyp = xp + most * x.cols;
  auto* scratch = reinterpret_cast<float*>(dyp + most * dy.cols);
  for (int64_t row0 = 0; row0 < dy.rows; row0 += kPassRows<Element>) {
    const int64_t rows = smaller(kPassRows<Element>, dy.rows - row0);
    const int64_t depth = token_elements<Element>(rows);
    pack_left_panels(x, row0, rows, xp, threads);
    pack_panels(dy, row0, rows, dyp, threads);
    const int64_t cached_tiles = larger(kCachedElements / (depth * kTileK), 1);
    for (int64_t tile0 = 0; tile0 < tiles; tile0 += cached_tiles) {
      parallel_for(ds.cols / kPanel, threads, [&](int64_t panel, int thread) {
        const TileScope scope;
        float* dw = scratch + thread * kPanel * kPanel;
        const Block<B> left(w, panel * 2), right(w, panel * 2 + 1);
        for (int64_t tile = tile0; tile < smaller(tile0 + cached_tiles, tiles); ++tile) {
          multiply_panels(kPanel, depth, xp + tile * depth * kPanel, kPanel,
                          dyp + panel * depth * kPanel, dw, false);
          float* out = ds.data + panel * kPanel;
          contract_tile(left, tile, dw, out, ds.stride);
          contract_tile(right, tile, dw + kBlockN, out + kBlockN, ds.stride);
        }
      });
    }
  }
}

void qgemm_grad_scales(ConstMatrix dy, ConstMatrix x, const QuantWeight& w, View<float> ds,
                       const Resources& use) {
  for (int64_t g = 0; g < w.format.groups(); ++g) {
    std::memset(ds.data + g * ds.stride, 0, static_cast<size_t>(ds.cols) * sizeof(float));
  }
  with_bits(w.format.bits, [&](auto bits) {
    with_element(dy.dtype == DType::bf16 && x.dtype == DType::bf16, [&](auto element) {
      grad_scales<decltype(bits)::value>(dy, x, w, ds, use.threads,
                                         static_cast<decltype(element)*>(use.workspace));
    });
  });
}

// ---- Hessians ----

size_t accumulate_cross_workspace(int64_t m, int64_t k) {
  return 2 * static_cast<size_t>(pass_elements(m) * k) * 4;
}

// As a left operand x needs a copy of its own on some levels.
size_t accumulate_hessian_workspace(int64_t m, int64_t k) {
#ifdef LOWBITCORE_TILES
  return accumulate_cross_workspace(m, k);
#else
  return accumulate_cross_workspace(m, k) / 2;
#endif
}

// Column panels [from, to) of row panel i of out += a^T b; a and b as packed by pack_panels.
template <typename Element>
void accumulate_panels(const Element* a, const Element* b, int64_t depth, int64_t i, int64_t from,
                       int64_t to, const View<float>& out) {
  alignas(64) float c[kPanel * kPanel];
  const TileScope scope;
  for (int64_t j = from; j < to; ++j) {
    multiply_panels(kPanel, depth, a + i * depth * kPanel, kPanel, b + j * depth * kPanel, c,
                    false);
    for (int64_t r = 0; r < kPanel; ++r) {
      float* at = out.data + (i * kPanel + r) * out.stride + j * kPanel;
      for (int64_t v = 0; v < kPanel; v += kWidth) {
        (Vec::load(at + v) + Vec::load(c + r * kPanel + v)).store(at + v);
      }
    }
  }
}

// out += a^T b, or of a symmetric result its upper triangle. Some panels of b stay in the
// second-level cache while all of a meet them.
template <typename Element>
void accumulate_outer(const Element* a, const Element* b, int64_t depth, bool upper,
                      const View<float>& out, int threads) {
  const int64_t panels = out.cols / kPanel;
  const int64_t cached = larger(kCachedElements / (depth * kPanel), 1);
  for (int64_t from = 0; from < panels; from += cached) {
    const int64_t to = smaller(from + cached, panels);
    parallel_for(upper ? to : out.rows / kPanel, threads, [&](int64_t i, int) {
      accumulate_panels(a, b, depth, i, upper ? larger(i, from) : from, to, out);
    });
  }
}

void accumulate_hessian(ConstMatrix x, View<float> h, const Resources& use) {
  const int64_t panels = x.cols / kPanel;
  with_element(x.dtype == DType::bf16, [&](auto element) {
    using Element = decltype(element);
    Element* xp = static_cast<Element*>(use.workspace);
    for (int64_t row0 = 0; row0 < x.rows; row0 += kPassRows<Element>) {
      const int64_t rows = smaller(kPassRows<Element>, x.rows - row0);
      const int64_t depth = token_elements<Element>(rows);
      pack_panels(x, row0, rows, xp, use.threads);
      Element* left = xp;
      if constexpr (!Left<Element>::kTakesPanels) {
        left = xp + depth * x.cols;
        pack_left_panels(x, row0, rows, left, use.threads);
      }
      accumulate_outer(left, xp, depth, true, h, use.threads);
    }
  });
  // The lower triangle mirrors the upper one.
  parallel_for(panels, use.threads, [&](int64_t i, int) {
    for (int64_t r = i * kPanel; r < (i + 1) * kPanel; ++r) {
      for (int64_t c = 0; c < r; ++c) h.data[r * h.stride + c] = h.data[c * h.stride + r];
    }
  });
}

void accumulate_cross(ConstMatrix a, ConstMatrix b, View<float> cross, const Resources& use) {
  with_element(a.dtype == DType::bf16 && b.dtype == DType::bf16, [&](auto element) {
    using Element = decltype(element);
    Element* ap = static_cast<Element*>(use.workspace);
    for (int64_t row0 = 0; row0 < a.rows; row0 += kPassRows<Element>) {
      const int64_t rows = smaller(kPassRows<Element>, a.rows - row0);
      const int64_t depth = token_elements<Element>(rows);
      Element* bp = ap + depth * a.cols;
      pack_left_panels(a, row0, rows, ap, use.threads);
      pack_panels(b, row0, rows, bp, use.threads);
      accumulate_outer(ap, bp, depth, false, cross, use.threads);
    }
  });
}

}  // namespace
}  // namespace lowbitcore
