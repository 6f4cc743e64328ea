// Every CPU kernel, written once over the vector type of a level. A kernels_*.cpp defines, in its
// anonymous namespace and before including this file:
//
//   Vec    kWidth floats: load, store, broadcast, from_bytes (kWidth uint8), load_bf16, load_f16,
//          store_bf16, store_f16, + - * /, madd(a,b,c) ~ a*b+c, fmadd and fnmadd (exactly fused),
//          min, max, round (ties to even), select_less(a,b,x,y) = a < b ? x : y, round_f16
//   VecI   kWidth 32-bit integers: load, >> and << by a constant, &, |, to_float
//   kRows, kCols          the register tile of the GEMM: kRows rows by kCols floats
//   transpose_tile        float [32][16] -> [16][32]
//
// Nothing here has external linkage, and nothing from the standard library that would: linking two
// levels must never let code of the higher one serve the lower (see CONTRIBUTING).

#include <cstdint>
#include <cstring>
#include <utility>

#include "../backend.h"
#include "../half.h"
#include "../layout.h"
#include "../parallel.h"

namespace lowbitcore {
namespace {

using std::int32_t;
using std::int64_t;
using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;

constexpr int64_t kPanel = 32;        // outputs that one thread computes at a time
constexpr int64_t kDepth = 128;       // reduction length of a panel: 16 KB, stays in L1
constexpr int64_t kRowBlock = 480;    // activations' rows that share a dequantised panel
constexpr int64_t kTokenBlock = 256;  // rows of X and dY per pass of the outer-product kernels
constexpr int kVecsPerBlock = kBlockN / kWidth;
constexpr int kColVecs = kCols / kWidth;

static_assert(kPanel % kCols == 0 && kCols % kWidth == 0 && kBlockN % kWidth == 0, "tile shape");

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// ---- activations ----

inline const char* row_pointer(const ConstMatrix& m, int64_t row) {
  return static_cast<const char*>(m.data) + row * m.stride * (m.dtype == DType::f32 ? 4 : 2);
}

inline Vec load_as_float(const char* row, DType dtype, int64_t col) {
  switch (dtype) {
    case DType::f32:
      return Vec::load(reinterpret_cast<const float*>(row) + col);
    case DType::bf16:
      return Vec::load_bf16(reinterpret_cast<const uint16_t*>(row) + col);
    default:
      return Vec::load_f16(reinterpret_cast<const uint16_t*>(row) + col);
  }
}

inline void store_as(const Vec& v, char* row, DType dtype, int64_t col) {
  switch (dtype) {
    case DType::f32:
      v.store(reinterpret_cast<float*>(row) + col);
      break;
    case DType::bf16:
      v.store_bf16(reinterpret_cast<uint16_t*>(row) + col);
      break;
    default:
      v.store_f16(reinterpret_cast<uint16_t*>(row) + col);
  }
}

// Rows of x as fp32 in strips of `height` rows, each strip stored [cols][rows of the strip].
inline void pack_rows(const ConstMatrix& x, int64_t first, int64_t count, float* packed,
                      int threads) {
  parallel_for(divide_up(count, kRows), threads, [&](int64_t strip, int) {
    const int64_t row0 = strip * kRows, rows = smaller(kRows, count - row0);
    float* out = packed + row0 * x.cols;
    for (int64_t r = 0; r < rows; ++r) {
      const char* row = row_pointer(x, first + row0 + r);
      for (int64_t c = 0; c < x.cols; c += kWidth) {
        alignas(64) float lane[kWidth];
        load_as_float(row, x.dtype, c).store(lane);
        for (int i = 0; i < kWidth; ++i) out[(c + i) * rows + r] = lane[i];
      }
    }
  });
}

// Columns [first_col, first_col + kPanel) of some rows of x as fp32, stored [rows][kPanel].
inline void copy_panel(const ConstMatrix& x, int64_t first_row, int64_t rows, int64_t first_col,
                       float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const char* row = row_pointer(x, first_row + r);
    for (int64_t c = 0; c < kPanel; c += kWidth) {
      load_as_float(row, x.dtype, first_col + c).store(out + r * kPanel + c);
    }
  }
}

// ---- register tile ----

// c[R][kCols] (+)= sum over i of a[i*a_step .. +R] (outer) b[i*kPanel .. +kCols]; rows of c lie
// kPanel apart.
template <int R>
void tile(int64_t depth, const float* a, int64_t a_step, const float* b, float* c,
          bool accumulate) {
  Vec acc[R][kColVecs];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kColVecs; ++v) {
      acc[r][v] = accumulate ? Vec::load(c + r * kPanel + v * kWidth) : Vec::broadcast(0.0f);
    }
  }
  for (int64_t i = 0; i < depth; ++i) {
    Vec bv[kColVecs];
    for (int v = 0; v < kColVecs; ++v) bv[v] = Vec::load(b + i * kPanel + v * kWidth);
    for (int r = 0; r < R; ++r) {
      const Vec av = Vec::broadcast(a[i * a_step + r]);
      for (int v = 0; v < kColVecs; ++v) acc[r][v] = madd(av, bv[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kColVecs; ++v) acc[r][v].store(c + r * kPanel + v * kWidth);
  }
}

using Tile = void (*)(int64_t, const float*, int64_t, const float*, float*, bool);

template <int... I>
constexpr Tile tile_of(int rows, std::integer_sequence<int, I...>) {
  constexpr Tile table[] = {tile<I + 1>...};
  return table[rows - 1];
}

// The whole panel for `rows` <= kRows rows.
inline void panel_tile(int64_t rows, int64_t depth, const float* a, int64_t a_step, const float* b,
                       float* c, bool accumulate) {
  const Tile kernel = tile_of(static_cast<int>(rows), std::make_integer_sequence<int, kRows>());
  for (int64_t col = 0; col < kPanel; col += kCols) {
    kernel(depth, a, a_step, b + col, c + col, accumulate);
  }
}

// ---- packed integers ----

// Integer i of a tile whose `B` words per lane are w. It may straddle two words (3 bits only).
template <int B, int I>
inline VecI code(const VecI (&w)[B]) {
  constexpr int bit = B * I, word = bit / 32, shift = bit % 32;
  VecI value = w[word].template right<shift>();
  if constexpr (shift + B > 32) value = value | w[word + 1].template left<32 - shift>();
  if constexpr (shift + B != 32) value = value & VecI::broadcast((1 << B) - 1);
  return value;
}

// Calls f(i, integers of input i) for the 32 inputs of a tile, for the outputs of one vector.
template <int B, typename F, int... I>
inline void for_each_code(const VecI (&w)[B], const F& f, std::integer_sequence<int, I...>) {
  (f(I, code<B, I>(w).to_float()), ...);
}

template <int B, typename F>
inline void for_each_code(const uint32_t* words, int lane, const F& f) {
  VecI w[B];
  for (int r = 0; r < B; ++r) w[r] = VecI::load(words + r * kBlockN + lane);
  for_each_code<B>(w, f, std::make_integer_sequence<int, 32>());
}

// One block of 16 outputs of a packed weight.
template <int B>
struct Block {
  const uint32_t* words;  // [K/32][B][16]
  const uint8_t* zeros;   // [G][16]
  const float* scales;    // [G] rows, `stride` apart
  int64_t stride;
  const int32_t* g_idx;
  int64_t group_size;

  Block(const QuantWeight& w, int64_t block)
      : words(static_cast<const uint32_t*>(w.packed) +
              block * (w.format.in_features / 32) * B * 16),
        zeros(static_cast<const uint8_t*>(w.packed) + packed_zeros_offset(w.format) +
              block * w.format.groups() * kBlockN),
        scales(w.scales.data == nullptr ? nullptr : w.scales.data + block * kBlockN),
        stride(w.scales.stride),
        g_idx(w.g_idx),
        group_size(w.format.group_size == -1 ? w.format.in_features : w.format.group_size) {}

  const uint32_t* tile_words(int64_t tile) const { return words + tile * B * kBlockN; }
  Vec zero(int64_t g, int lane) const { return Vec::from_bytes(zeros + g * kBlockN + lane); }
  Vec scale(int64_t g, int lane) const { return Vec::load(scales + g * stride + lane); }
};

// W^T of one tile: out[i*step + n] for 32 inputs i and 16 outputs n.
template <int B>
void dequantize_tile(const Block<B>& block, int64_t tile, float* out, int64_t step) {
  const int64_t k0 = tile * kTileK;
  for (int lane = 0; lane < kBlockN; lane += kWidth) {
    if (block.g_idx == nullptr) {
      const int64_t g = k0 / block.group_size;
      const Vec s = block.scale(g, lane), z = block.zero(g, lane);
      for_each_code<B>(block.tile_words(tile), lane,
                       [&](int i, const Vec& q) { ((q - z) * s).store(out + i * step + lane); });
    } else {
      for_each_code<B>(block.tile_words(tile), lane, [&](int i, const Vec& q) {
        const int64_t g = block.g_idx[k0 + i];
        ((q - block.zero(g, lane)) * block.scale(g, lane)).store(out + i * step + lane);
      });
    }
  }
}

// The width of a layer becomes a constant of the kernel.
template <typename F>
inline void with_bits(int bits, const F& f) {
  switch (bits) {
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 8:
      return f(std::integral_constant<int, 8>());
  }
  unsupported_bits(bits);
}

// ---- X W^T and dY W ----

constexpr int64_t kPanelFloats = kDepth * kPanel;

inline size_t gemm_workspace(int64_t m, int64_t depth, int threads) {
  const int64_t rows = smaller(m, kRowBlock);
  const int64_t shared = round_up(rows * depth, 16);
  return static_cast<size_t>(shared + threads * (kPanelFloats + rows * kPanel)) * sizeof(float);
}

// out [M,cols] = a [M,depth] P, where fill(panel, first, count, p) writes rows [first, first+count)
// of columns [panel*32, +32) of P to p [count][32].
template <typename Fill>
void panel_gemm(const ConstMatrix& a, const float* bias, const Matrix& out, int threads,
                void* workspace, const Fill& fill) {
  const int64_t depth = a.cols;
  const int64_t block_rows = smaller(a.rows, kRowBlock);
  float* packed = static_cast<float*>(workspace);
  float* scratch = packed + round_up(block_rows * depth, 16);
  const int64_t scratch_floats = kPanelFloats + block_rows * kPanel;
  for (int64_t row0 = 0; row0 < a.rows; row0 += kRowBlock) {
    const int64_t rows = smaller(kRowBlock, a.rows - row0);
    pack_rows(a, row0, rows, packed, threads);
    parallel_for(out.cols / kPanel, threads, [&](int64_t panel, int thread) {
      float* p = scratch + thread * scratch_floats;
      float* c = p + kPanelFloats;
      for (int64_t d = 0; d < depth; d += kDepth) {
        const int64_t count = smaller(kDepth, depth - d);
        fill(panel, d, count, p);
        for (int64_t r = 0; r < rows; r += kRows) {
          const int64_t height = smaller(kRows, rows - r);
          panel_tile(height, count, packed + r * depth + d * height, height, p, c + r * kPanel,
                     d > 0);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        char* y = const_cast<char*>(row_pointer(out, row0 + r));
        for (int64_t col = 0; col < kPanel; col += kWidth) {
          Vec v = Vec::load(c + r * kPanel + col);
          if (bias != nullptr) v = v + Vec::load(bias + panel * kPanel + col);
          store_as(v, y, out.dtype, panel * kPanel + col);
        }
      }
    });
  }
}

void qgemm_nt(ConstMatrix x, const QuantWeight& w, const float* bias, Matrix y, int threads,
              void* workspace) {
  with_bits(w.format.bits, [&](auto bits) {
    constexpr int B = decltype(bits)::value;
    panel_gemm(x, bias, y, threads, workspace,
               [&](int64_t panel, int64_t first, int64_t count, float* p) {
                 for (int64_t half = 0; half < kPanel; half += kBlockN) {
                   const Block<B> block(w, (panel * kPanel + half) / kBlockN);
                   for (int64_t k = 0; k < count; k += kTileK) {
                     dequantize_tile(block, (first + k) / kTileK, p + k * kPanel + half, kPanel);
                   }
                 }
               });
  });
}

void qgemm_nn(ConstMatrix dy, const QuantWeight& w, Matrix dx, int threads, void* workspace) {
  with_bits(w.format.bits, [&](auto bits) {
    constexpr int B = decltype(bits)::value;
    panel_gemm(dy, nullptr, dx, threads, workspace,
               [&](int64_t panel, int64_t first, int64_t count, float* p) {
                 alignas(64) float t[kTileK * kBlockN];
                 for (int64_t n = 0; n < count; n += kBlockN) {
                   dequantize_tile(Block<B>(w, (first + n) / kBlockN), panel, t, kBlockN);
                   transpose_tile(t, p + n * kPanel);
                 }
               });
  });
}

size_t qgemm_nt_workspace(const QuantFormat& f, int64_t m, int threads) {
  return gemm_workspace(m, f.in_features, threads);
}

size_t qgemm_nn_workspace(const QuantFormat& f, int64_t m, int threads) {
  return gemm_workspace(m, f.out_features, threads);
}

// ---- outer products: scale gradients and Hessians ----

// x as fp32 in column panels: [cols/32][rows][32].
inline void pack_panels(const ConstMatrix& x, int64_t first, int64_t rows, float* packed,
                        int threads) {
  parallel_for(x.cols / kPanel, threads, [&](int64_t panel, int) {
    copy_panel(x, first, rows, panel * kPanel, packed + panel * rows * kPanel);
  });
}

// c [32][32] = a^T b over `rows` rows of two panels.
inline void outer_tile(int64_t rows, const float* a, const float* b, float* c) {
  for (int64_t i = 0; i < kPanel; i += kRows) {
    panel_tile(smaller(kRows, kPanel - i), rows, a + i, kPanel, b, c + i * kPanel, false);
  }
}

size_t qgemm_grad_scales_workspace(const QuantFormat& f, int64_t m, int threads) {
  const int64_t rows = smaller(m, kTokenBlock);
  return static_cast<size_t>(rows * f.in_features + threads * (rows + kPanel) * kPanel) *
         sizeof(float);
}

// ds[g, 16 outputs] += sum over the inputs of one tile of (q - z) * dw
template <int B>
void contract_tile(const Block<B>& block, int64_t tile, const float* dw, float* ds,
                   int64_t stride) {
  const int64_t k0 = tile * kTileK;
  for (int lane = 0; lane < kBlockN; lane += kWidth) {
    if (block.g_idx == nullptr) {
      const int64_t g = k0 / block.group_size;
      const Vec z = block.zero(g, lane);
      Vec sum = Vec::broadcast(0.0f);
      for_each_code<B>(block.tile_words(tile), lane, [&](int i, const Vec& q) {
        sum = madd(q - z, Vec::load(dw + i * kPanel + lane), sum);
      });
      float* out = ds + g * stride + lane;
      (Vec::load(out) + sum).store(out);
    } else {
      for_each_code<B>(block.tile_words(tile), lane, [&](int i, const Vec& q) {
        const int64_t g = block.g_idx[k0 + i];
        float* out = ds + g * stride + lane;
        madd(q - block.zero(g, lane), Vec::load(dw + i * kPanel + lane), Vec::load(out)).store(out);
      });
    }
  }
}

void qgemm_grad_scales(ConstMatrix dy, ConstMatrix x, const QuantWeight& w, View<float> ds,
                       int threads, void* workspace) {
  const int64_t groups = w.format.groups(), k = w.format.in_features;
  for (int64_t g = 0; g < groups; ++g) {
    std::memset(ds.data + g * ds.stride, 0, static_cast<size_t>(ds.cols) * sizeof(float));
  }
  const int64_t block_rows = smaller(dy.rows, kTokenBlock);
  float* xp = static_cast<float*>(workspace);
  float* scratch = xp + block_rows * k;
  const int64_t scratch_floats = (block_rows + kPanel) * kPanel;
  with_bits(w.format.bits, [&](auto bits) {
    constexpr int B = decltype(bits)::value;
    for (int64_t row0 = 0; row0 < dy.rows; row0 += kTokenBlock) {
      const int64_t rows = smaller(kTokenBlock, dy.rows - row0);
      pack_panels(x, row0, rows, xp, threads);
      parallel_for(ds.cols / kPanel, threads, [&](int64_t panel, int thread) {
        float* dyp = scratch + thread * scratch_floats;
        float* dw = dyp + block_rows * kPanel;
        copy_panel(dy, row0, rows, panel * kPanel, dyp);
        const Block<B> left(w, panel * 2), right(w, panel * 2 + 1);
        for (int64_t tile = 0; tile < k / kTileK; ++tile) {
          outer_tile(rows, xp + tile * rows * kPanel, dyp, dw);
          float* out = ds.data + panel * kPanel;
          contract_tile(left, tile, dw, out, ds.stride);
          contract_tile(right, tile, dw + kBlockN, out + kBlockN, ds.stride);
        }
      });
    }
  });
}

size_t accumulate_hessian_workspace(int64_t m, int64_t k) {
  return static_cast<size_t>(smaller(m, kTokenBlock) * k) * sizeof(float);
}

size_t accumulate_cross_workspace(int64_t m, int64_t k) {
  return 2 * accumulate_hessian_workspace(m, k);
}

// Row panel i of out += a^T b, from column panel `from` on; a and b as packed by pack_panels.
inline void accumulate_panel_row(const float* a, const float* b, int64_t rows, int64_t i,
                                 int64_t from, const View<float>& out) {
  alignas(64) float c[kPanel * kPanel];
  for (int64_t j = from; j < out.cols / kPanel; ++j) {
    outer_tile(rows, a + i * rows * kPanel, b + j * rows * kPanel, c);
    for (int64_t r = 0; r < kPanel; ++r) {
      float* at = out.data + (i * kPanel + r) * out.stride + j * kPanel;
      for (int64_t v = 0; v < kPanel; v += kWidth) {
        (Vec::load(at + v) + Vec::load(c + r * kPanel + v)).store(at + v);
      }
    }
  }
}

void accumulate_hessian(ConstMatrix x, View<float> h, int threads, void* workspace) {
  float* xp = static_cast<float*>(workspace);
  const int64_t panels = x.cols / kPanel;
  for (int64_t row0 = 0; row0 < x.rows; row0 += kTokenBlock) {
    const int64_t rows = smaller(kTokenBlock, x.rows - row0);
    pack_panels(x, row0, rows, xp, threads);
    parallel_for(panels, threads,
                 [&](int64_t i, int) { accumulate_panel_row(xp, xp, rows, i, i, h); });
  }
  // The lower triangle mirrors the upper one.
  parallel_for(panels, threads, [&](int64_t i, int) {
    for (int64_t r = i * kPanel; r < (i + 1) * kPanel; ++r) {
      for (int64_t c = 0; c < r; ++c) h.data[r * h.stride + c] = h.data[c * h.stride + r];
    }
  });
}

void accumulate_cross(ConstMatrix a, ConstMatrix b, View<float> cross, int threads,
                      void* workspace) {
  float* ap = static_cast<float*>(workspace);
  for (int64_t row0 = 0; row0 < a.rows; row0 += kTokenBlock) {
    const int64_t rows = smaller(kTokenBlock, a.rows - row0);
    float* bp = ap + rows * a.cols;
    pack_panels(a, row0, rows, ap, threads);
    pack_panels(b, row0, rows, bp, threads);
    parallel_for(a.cols / kPanel, threads,
                 [&](int64_t i, int) { accumulate_panel_row(ap, bp, rows, i, 0, cross); });
  }
}

void dequantize(const QuantWeight& w, Matrix out, int threads) {
  with_bits(w.format.bits, [&](auto bits) {
    constexpr int B = decltype(bits)::value;
    parallel_for(w.format.out_features / kBlockN, threads, [&](int64_t n, int) {
      const Block<B> block(w, n);
      for (int64_t tile = 0; tile < w.format.in_features / kTileK; ++tile) {
        alignas(64) float t[kTileK * kBlockN];
        alignas(64) float rows[kBlockN * kTileK];
        dequantize_tile(block, tile, t, kBlockN);
        transpose_tile(t, rows);
        for (int64_t r = 0; r < kBlockN; ++r) {
          char* y = const_cast<char*>(row_pointer(out, n * kBlockN + r));
          for (int64_t c = 0; c < kTileK; c += kWidth) {
            store_as(Vec::load(rows + r * kTileK + c), y, out.dtype, tile * kTileK + c);
          }
        }
      }
    });
  });
}

// ---- quantization ----
//
// Rows of these buffers are input columns, lanes are outputs: every output is quantized by the same
// sequence of exactly rounded operations, whatever the width of a vector.

struct Grid {
  Vec scale, zero;
};

// The smallest positive fp16: where a tiny range would round to a scale of zero.
constexpr float kSmallestScale = 5.9604644775390625e-8f;

// Columns of a whole group: no more than there are.
inline int64_t group_columns(const QuantFormat& f) {
  return f.group_size == -1 ? f.in_features : smaller(f.group_size, f.in_features);
}

inline Vec quantize_lane(const Vec& w, const Grid& grid, const Vec& max_code) {
  const Vec q = round(w / grid.scale) + grid.zero;
  return min(max(q, Vec::broadcast(0.0f)), max_code);
}

inline Grid make_grid(const Vec& low, const Vec& high, const Vec& max_code, const GridOptions& o) {
  const Vec zero = Vec::broadcast(0.0f), one = Vec::broadcast(1.0f);
  const Vec range = high - low;
  const Vec scale = max(round_f16(range / max_code), Vec::broadcast(kSmallestScale));
  Grid grid;
  grid.scale = select_less(zero, range, scale, one);
  if (o.sym) {
    grid.zero = round((max_code + one) * Vec::broadcast(0.5f));
  } else {
    const Vec z = round((zero - low) / grid.scale);
    grid.zero = min(max(z, zero), max_code);
  }
  return grid;
}

// The grid of `count` rows. Row i is w + rows[i]*kLanes, or w + i*kLanes without `rows`; its
// squared errors count importance[i] times, or once without.
inline Grid find_grid(const float* w, const int32_t* rows, const float* importance, int64_t count,
                      int bits, const GridOptions& options) {
  const auto row = [&](int64_t i) {
    return Vec::load(w + (rows != nullptr ? rows[i] : i) * kLanes);
  };
  const Vec zero = Vec::broadcast(0.0f);
  const Vec max_code = Vec::broadcast(static_cast<float>((1 << bits) - 1));
  Vec low = zero, high = zero;
  for (int64_t i = 0; i < count; ++i) {
    low = min(low, row(i));
    high = max(high, row(i));
  }
  if (options.sym) {
    high = max(zero - low, high);
    low = zero - high;
  }
  Grid best = make_grid(low, high, max_code, options);
  if (!options.mse) return best;

  const auto error_of = [&](const Grid& grid) {
    Vec error = zero;
    for (int64_t i = 0; i < count; ++i) {
      const Vec x = row(i);
      const Vec e = fnmadd(grid.scale, quantize_lane(x, grid, max_code) - grid.zero, x);
      const Vec weighted = importance != nullptr ? e * Vec::broadcast(importance[i]) : e;
      error = fmadd(weighted, e, error);
    }
    return error;
  };
  Vec best_error = error_of(best);
  const auto consider = [&](const Grid& grid) {
    const Vec error = error_of(grid);
    best.scale = select_less(error, best_error, grid.scale, best.scale);
    best.zero = select_less(error, best_error, grid.zero, best.zero);
    best_error = min(error, best_error);
  };
  // Both ends are clipped alike, down to a fifth of the range; then scale and zero move apart.
  for (int step = 1; step <= 40; ++step) {
    const Vec shrink = Vec::broadcast(1.0f - 0.02f * static_cast<float>(step));
    consider(make_grid(low * shrink, high * shrink, max_code, options));
  }
  const Grid centre = best;
  const int reach = options.sym ? 0 : 2;
  for (int shift = -reach; shift <= reach; ++shift) {
    for (int step = -6; step <= 6; ++step) {
      const Vec factor = Vec::broadcast(1.0f + 0.025f * static_cast<float>(step));
      const Vec z = centre.zero + Vec::broadcast(static_cast<float>(shift));
      consider({max(round_f16(centre.scale * factor), Vec::broadcast(kSmallestScale)),
                min(max(z, zero), max_code)});
    }
  }
  return best;
}

// Outputs [first, first + count) of a weight as fp32, transposed to [K][kLanes]; missing lanes are
// 0.
inline void load_strip(const ConstMatrix& w, int64_t first, int64_t count, float* out) {
  if (count < kLanes) {
    std::memset(out, 0, static_cast<size_t>(w.cols * kLanes) * sizeof(float));
  }
  for (int64_t n = 0; n < count; ++n) {
    const char* row = row_pointer(w, first + n);
    for (int64_t k = 0; k < w.cols; k += kWidth) {
      alignas(64) float lane[kWidth];
      load_as_float(row, w.dtype, k).store(lane);
      for (int i = 0; i < kWidth; ++i) out[(k + i) * kLanes + n] = lane[i];
    }
  }
}

inline void store_grid(const Grid& grid, int64_t g, int64_t first, int64_t lane, int64_t count,
                       const View<float>& scales, const View<uint8_t>& zeros) {
  alignas(64) float s[kWidth], z[kWidth];
  grid.scale.store(s);
  grid.zero.store(z);
  for (int64_t i = 0; i < kWidth && lane + i < count; ++i) {
    scales.data[g * scales.stride + first + lane + i] = s[i];
    zeros.data[g * zeros.stride + first + lane + i] = static_cast<uint8_t>(z[i]);
  }
}

// One input column of a strip's integers into codes [N,K].
inline void store_codes(const float* q, int64_t column, int64_t first, int64_t count,
                        const View<uint8_t>& codes) {
  for (int64_t n = 0; n < count; ++n) {
    codes.data[(first + n) * codes.stride + column] = static_cast<uint8_t>(q[n]);
  }
}

void quantize_rtn(ConstMatrix weight, const QuantFormat& f, const GridOptions& options,
                  View<uint8_t> codes, View<float> scales, View<uint8_t> zeros, int threads) {
  const int64_t group = group_columns(f);
  const Vec max_code = Vec::broadcast(static_cast<float>((1 << f.bits) - 1));
  // Allocated here, since nothing may throw inside the parallel region.
  float* scratch = new float[static_cast<size_t>(threads * group * kLanes)];
  parallel_for(divide_up(f.out_features, kLanes), threads, [&](int64_t strip, int thread) {
    const int64_t first = strip * kLanes, count = smaller(kLanes, f.out_features - first);
    float* w = scratch + thread * group * kLanes;
    for (int64_t g = 0; g < f.groups(); ++g) {
      const int64_t k0 = g * group, columns = smaller(group, f.in_features - k0);
      ConstMatrix part = weight;
      part.data = row_pointer(weight, 0) + k0 * (weight.dtype == DType::f32 ? 4 : 2);
      part.cols = columns;
      load_strip(part, first, count, w);
      for (int64_t lane = 0; lane < kLanes; lane += kWidth) {
        const Grid grid = find_grid(w + lane, nullptr, nullptr, columns, f.bits, options);
        store_grid(grid, g, first, lane, count, scales, zeros);
        for (int64_t k = 0; k < columns; ++k) {
          float* at = w + k * kLanes + lane;
          quantize_lane(Vec::load(at), grid, max_code).store(at);
        }
      }
      for (int64_t k = 0; k < columns; ++k) {
        store_codes(w + k * kLanes, k0 + k, first, count, codes);
      }
    }
  });
  delete[] scratch;
}

// ---- GPTQ ----

constexpr int64_t kGptqBlock = 128;  // columns whose errors are applied to the rest together

// w[row(i)] -= sum over j in [begin, end) of u[j,i] * error[j - begin], in rising j, for the rows
// i in [from, to). Four rows and two vectors at a time; the order of the sum is that of a column at
// a time, so how columns are blocked does not change a bit.
inline void apply_errors(const View<const float>& u, int64_t begin, int64_t end, int64_t from,
                         int64_t to, const float* error, const int32_t* order, float* w) {
  constexpr int kRowsAtOnce = 4, kVecs = 2;
  for (int64_t lane = 0; lane < kLanes; lane += kVecs * kWidth) {
    int64_t i = from;
    for (; i + kRowsAtOnce <= to; i += kRowsAtOnce) {
      Vec acc[kRowsAtOnce][kVecs];
      for (int r = 0; r < kRowsAtOnce; ++r) {
        for (int v = 0; v < kVecs; ++v) {
          acc[r][v] = Vec::load(w + order[i + r] * kLanes + lane + v * kWidth);
        }
      }
      for (int64_t j = begin; j < end; ++j) {
        Vec e[kVecs];
        for (int v = 0; v < kVecs; ++v) {
          e[v] = Vec::load(error + (j - begin) * kLanes + lane + v * kWidth);
        }
        for (int r = 0; r < kRowsAtOnce; ++r) {
          const Vec c = Vec::broadcast(u.data[j * u.stride + i + r]);
          for (int v = 0; v < kVecs; ++v) acc[r][v] = fnmadd(c, e[v], acc[r][v]);
        }
      }
      for (int r = 0; r < kRowsAtOnce; ++r) {
        for (int v = 0; v < kVecs; ++v) {
          acc[r][v].store(w + order[i + r] * kLanes + lane + v * kWidth);
        }
      }
    }
    for (; i < to; ++i) {
      for (int v = 0; v < kVecs; ++v) {
        float* at = w + order[i] * kLanes + lane + v * kWidth;
        Vec acc = Vec::load(at);
        for (int64_t j = begin; j < end; ++j) {
          acc = fnmadd(Vec::broadcast(u.data[j * u.stride + i]),
                       Vec::load(error + (j - begin) * kLanes + lane + v * kWidth), acc);
        }
        acc.store(at);
      }
    }
  }
}

// The grids of a strip, kept as floats: [G][kLanes / kWidth][scale, zero][kWidth].
inline Grid load_grid(const float* grids, int64_t at) {
  const float* p = grids + at * 2 * kWidth;
  return {Vec::load(p), Vec::load(p + kWidth)};
}

inline void keep_grid(const Grid& grid, float* grids, int64_t at) {
  grid.scale.store(grids + at * 2 * kWidth);
  grid.zero.store(grids + at * 2 * kWidth + kWidth);
}

inline void gptq_strip(const GptqProblem& p, int64_t strip, float* w, float* error, float* grids) {
  const QuantFormat& f = p.format;
  const int64_t k = f.in_features, group = group_columns(f);
  const int64_t first = strip * kLanes, count = smaller(kLanes, f.out_features - first);
  constexpr int kVecs = kLanes / kWidth;
  const Vec max_code = Vec::broadcast(static_cast<float>((1 << f.bits) - 1));

  load_strip(p.weight, first, count, w);
  for (int64_t i = 0; i < k; ++i) {
    if (p.dead[i]) std::memset(w + i * kLanes, 0, kLanes * sizeof(float));
  }
  if (p.options.static_groups) {
    for (int64_t g = 0; g < f.groups(); ++g) {
      const int64_t k0 = g * group;
      for (int v = 0; v < kVecs; ++v) {
        const Grid grid = find_grid(w + k0 * kLanes + v * kWidth, nullptr, p.importance + k0,
                                    smaller(group, k - k0), f.bits, p.options.grid);
        keep_grid(grid, grids, g * kVecs + v);
        store_grid(grid, g, first, v * kWidth, count, p.scales, p.zeros);
      }
    }
  }

  double loss = 0.0;
  // A block never straddles the start of a group that was not complete before it, so that grids
  // found on the way see every earlier error: whole groups where they are shorter than a block,
  // else pieces.
  const int64_t whole = group <= kGptqBlock ? kGptqBlock / group * group : 0;
  for (int64_t begin = 0; begin < k;) {
    const int64_t block = whole > 0 ? whole : smaller(kGptqBlock, group - begin % group);
    const int64_t end = smaller(begin + block, k);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = (p.options.static_groups ? p.order[i] : i) / group;
      if (!p.options.static_groups && i % group == 0) {
        for (int v = 0; v < kVecs; ++v) {
          const Grid grid = find_grid(w + v * kWidth, p.order + i, p.importance + i,
                                      smaller(group, k - i), f.bits, p.options.grid);
          keep_grid(grid, grids, g * kVecs + v);
          store_grid(grid, g, first, v * kWidth, count, p.scales, p.zeros);
        }
      }
      float* column = w + p.order[i] * kLanes;
      float* e = error + (i - begin) * kLanes;
      alignas(64) float q[kLanes];
      const Vec diagonal = Vec::broadcast(p.u.data[i * p.u.stride + i]);
      for (int v = 0; v < kVecs; ++v) {
        const Grid grid = load_grid(grids, g * kVecs + v);
        const Vec x = Vec::load(column + v * kWidth);
        const Vec code = quantize_lane(x, grid, max_code);
        code.store(q + v * kWidth);
        (fnmadd(grid.scale, code - grid.zero, x) / diagonal).store(e + v * kWidth);
      }
      store_codes(q, p.order[i], first, count, p.codes);
      for (int64_t n = 0; n < count; ++n) loss += static_cast<double>(e[n]) * e[n];
      apply_errors(p.u, i, i + 1, i + 1, end, e, p.order, w);
    }
    apply_errors(p.u, begin, end, end, k, error, p.order, w);
    begin = end;
  }
  p.loss[strip] = loss;
}

void gptq(const GptqProblem& p, int threads) {
  const int64_t floats = (p.format.in_features + kGptqBlock) * kLanes;
  const int64_t grid_floats = p.format.groups() * 2 * kLanes;
  float* scratch = new float[static_cast<size_t>(threads * (floats + grid_floats))];
  parallel_for(divide_up(p.format.out_features, kLanes), threads, [&](int64_t strip, int thread) {
    float* w = scratch + thread * floats;
    gptq_strip(p, strip, w, w + p.format.in_features * kLanes,
               scratch + threads * floats + thread * grid_floats);
  });
  delete[] scratch;
}

constexpr Backend make_backend(const char* name) {
  return {name,
          qgemm_nt,
          qgemm_nn,
          qgemm_grad_scales,
          qgemm_nt_workspace,
          qgemm_nn_workspace,
          qgemm_grad_scales_workspace,
          dequantize,
          quantize_rtn,
          accumulate_hessian,
          accumulate_hessian_workspace,
          accumulate_cross,
          accumulate_cross_workspace,
          gptq};
}

}  // namespace
}  // namespace lowbitcore
