// X W^T and dY W by panels of dequantised weights.
//
// A panel, `kPanel` columns wide and up to `kDepth` elements deep, is dequantised into L1 and
// multiplied with a block of rows before the next one: its cost is shared by all those rows.
#pragma once

#include "common.h"

namespace lowbitcore {
namespace {

// Elements of a panel's reduction.
#ifdef LOWBITCORE_TILES
constexpr int64_t kDepth = 256;  // tiles go to memory and back once a panel: the deeper, the rarer
#else
constexpr int64_t kDepth = 128;  // 16 KB, stays in L1
#endif
constexpr int64_t kRowBlock = 480;  // activations' rows that share a dequantised panel
constexpr int kColVecs = kCols / kWidth;

static_assert(kPanel % kCols == 0 && kCols % kWidth == 0 && kBlockN % kWidth == 0, "tile shape");

// ---- register tile ----

// c[R][kCols] (+)= sum over i of a[i*a_step .. +R] (outer) b[i*kPanel .. +kCols]; rows of c lie
// kPanel apart.
template <typename Element, int R>
void tile(int64_t depth, const Element* a, int64_t a_step, const Element* b, float* c,
          bool accumulate) {
  using Register = typename Operand<Element>::Register;
  Vec acc[R][kColVecs];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kColVecs; ++v) {
      acc[r][v] = accumulate ? Vec::load(c + r * kPanel + v * kWidth) : Vec::broadcast(0.0f);
    }
  }
  for (int64_t i = 0; i < depth; ++i) {
    Register bv[kColVecs];
    for (int v = 0; v < kColVecs; ++v) bv[v] = Register::load(b + i * kPanel + v * kWidth);
    for (int r = 0; r < R; ++r) {
      const Register av = Register::broadcast(a[i * a_step + r]);
      for (int v = 0; v < kColVecs; ++v) acc[r][v] = multiply_add(av, bv[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kColVecs; ++v) acc[r][v].store(c + r * kPanel + v * kWidth);
  }
}

template <typename Element>
using Tile = void (*)(int64_t, const Element*, int64_t, const Element*, float*, bool);

template <typename Element, int... I>
constexpr Tile<Element> tile_of(int rows, std::integer_sequence<int, I...>) {
  constexpr Tile<Element> table[] = {tile<Element, I + 1>...};
  return table[rows - 1];
}

// ---- left operands ----

// A strip of rows of x as [elements][rows].
inline void pack_strip(const ConstMatrix& x, int64_t first, int64_t rows, float* out) {
  load_columns(x, first, rows, rows, out);
}

#ifdef LOWBITCORE_PAIRS
inline void pack_strip(const ConstMatrix& x, int64_t first, int64_t rows, uint32_t* out) {
  transpose_pairs(row_pointer(x, first), x.stride * 2, rows, x.cols / 2, out);
}
#endif

// How the left operand is stored: in strips of kHeight rows, each [elements][stored(rows)]. `tile`
// multiplies a strip of `rows` rows with a panel.
template <typename Element>
struct Left {
  static constexpr int64_t kHeight = kRows;
  static constexpr int64_t kDepthMultiple = 1;  // elements of a reduction come in these numbers
  static constexpr bool kTakesPanels = true;    // a panel's columns can be rows as they lie

  static int64_t stored(int64_t rows) { return rows; }

  static void tile(int64_t rows, int64_t depth, const Element* a, int64_t a_step, const Element* b,
                   float* c, bool accumulate) {
    const Tile<Element> kernel =
        tile_of<Element>(static_cast<int>(rows), std::make_integer_sequence<int, kRows>());
    for (int64_t col = 0; col < kPanel; col += kCols) {
      kernel(depth, a, a_step, b + col, c + col, accumulate);
    }
  }

  static void store(const ConstMatrix& x, int64_t first, int64_t rows, Element* strip) {
    pack_strip(x, first, rows, strip);
  }
};

#ifdef LOWBITCORE_TILES
template <>
struct Left<uint32_t> : TileStrip {
  static constexpr bool kTakesPanels = false;
};
#else
// What a thread holds while it uses tiles.
struct TileScope {
  TileScope() {}
};
#endif

// c [rows][32] (+)= a^T b, where a is [depth][a_step], of which `rows` columns, and b [depth][32]:
// in strips of much the same height, as sums of a low one wait for one another.
template <typename Element>
inline void multiply_panels(int64_t rows, int64_t depth, const Element* a, int64_t a_step,
                            const Element* b, float* c, bool accumulate) {
  using L = Left<Element>;
  int64_t strips = divide_up(rows, L::kHeight);
  for (int64_t r = 0; r < rows; --strips) {
    const int64_t height = divide_up(rows - r, strips);
    L::tile(height, depth, a + r, a_step, b, c + r * kPanel, accumulate);
    r += height;
  }
}

template <typename Element>
void pack_rows(const ConstMatrix& x, int64_t first, int64_t count, Element* packed, int threads) {
  using L = Left<Element>;
  const int64_t depth = x.cols / Operand<Element>::kPer;
  parallel_for(divide_up(count, L::kHeight), threads, [&](int64_t strip, int) {
    const int64_t row0 = strip * L::kHeight, rows = smaller(L::kHeight, count - row0);
    L::store(x, first + row0, rows, packed + row0 * depth);
  });
}

// ---- weights ----

// W^T of one tile: out[i*step + n] for 32 inputs i and 16 outputs n.
template <int B>
void dequantize_tile(const Block<B>& block, int64_t tile, float* out, int64_t step) {
  for (int lane = 0; lane < kBlockN; lane += kWidth) {
    for_each_weight(block, tile, lane,
                    [&](int i, const Vec& w) LOWBITCORE_LAMBDA { w.store(out + i * step + lane); });
  }
}

#ifdef LOWBITCORE_PAIRS
// The same, rounded to bf16, two inputs to an element.
template <int B>
void dequantize_tile(const Block<B>& block, int64_t tile, uint32_t* out, int64_t step) {
  for (int lane = 0; lane < kBlockN; lane += kWidth) {
    Vec even;
    for_each_weight(block, tile, lane, [&](int i, const Vec& w) LOWBITCORE_LAMBDA {
      if (i % 2 == 0) {
        even = w;
      } else {
        bf16_pairs(even, w).store(out + i / 2 * step + lane);
      }
    });
  }
}
#endif

// W of one tile: 16 outputs by 32 inputs; as pairs, 8 elements by 32.
template <int B>
void dequantize_transposed(const Block<B>& block, int64_t tile, float* out) {
  alignas(64) float t[kTileK * kBlockN];
  dequantize_tile(block, tile, t, kBlockN);
  transpose_tile(t, out);
}

#ifdef LOWBITCORE_PAIRS
template <int B>
void dequantize_transposed(const Block<B>& block, int64_t tile, uint32_t* out) {
  alignas(64) float t[kTileK * kBlockN];
  dequantize_tile(block, tile, t, kBlockN);
  transpose_tile_pairs(t, out);
}
#endif

// ---- products ----

constexpr int64_t kTilesAhead = 8;

// Asks for the tile of a block `ahead` of this one; harmless past the end of a weight. Inline like
// all that does nothing but prefetch: to GCC a call of it has no effect and may go.
template <int B>
LOWBITCORE_INLINE void prefetch_tile(const Block<B>& block, int64_t tile, int64_t ahead) {
  const char* p = reinterpret_cast<const char*>(block.tile_words(tile) + ahead * block.words_step);
  for (int line = 0; line < B; ++line) __builtin_prefetch(p + line * 64);
}

constexpr int64_t kPanelElements = kDepth * kPanel;

// Rows come in whole strips, of whichever element has the higher ones.
#ifdef LOWBITCORE_PAIRS
constexpr int64_t kStripRows = Left<uint32_t>::kHeight > kRows ? Left<uint32_t>::kHeight : kRows;
#else
constexpr int64_t kStripRows = kRows;
#endif

inline size_t gemm_workspace(int64_t m, int64_t depth, int threads) {
  const int64_t rows = round_up(smaller(m, kRowBlock), kStripRows);
  const int64_t shared = round_up(rows * depth, 16);
  return static_cast<size_t>(shared + threads * (kPanelElements + rows * kPanel)) * 4;
}

// c [rows][32] (+)= a p, of elements [first, first + count) of packed rows of `depth`; p
// [count][32].
template <typename Element>
void multiply_strips(int64_t rows, int64_t depth, const Element* packed, int64_t first,
                     int64_t count, const Element* p, float* c, bool accumulate) {
  using L = Left<Element>;
  for (int64_t r = 0; r < rows; r += L::kHeight) {
    const int64_t height = smaller(L::kHeight, rows - r), step = L::stored(height);
    L::tile(height, count, packed + r * depth + first * step, step, p, c + r * kPanel, accumulate);
  }
}

// out [M,cols] = a [M,depth] P, where fill(panel, first, count, p) writes elements [first, first +
// count) of columns [panel*32, +32) of P to p [count][32].
template <typename Element, typename Fill>
void panel_gemm(const ConstMatrix& a, const float* bias, const Matrix& out, int threads,
                void* workspace, const Fill& fill) {
  const int64_t depth = a.cols / Operand<Element>::kPer;
  const int64_t block_rows = round_up(smaller(a.rows, kRowBlock), kStripRows);
  Element* packed = static_cast<Element*>(workspace);
  Element* scratch = packed + round_up(block_rows * depth, 16);
  const int64_t scratch_elements = kPanelElements + block_rows * kPanel;
  for (int64_t row0 = 0; row0 < a.rows; row0 += kRowBlock) {
    const int64_t rows = smaller(kRowBlock, a.rows - row0);
    pack_rows(a, row0, rows, packed, threads);
    parallel_for(out.cols / kPanel, threads, [&](int64_t panel, int thread) {
      Element* p = scratch + thread * scratch_elements;
      float* c = reinterpret_cast<float*>(p + kPanelElements);
      const TileScope scope;
      for (int64_t d = 0; d < depth; d += kDepth) {
        const int64_t count = smaller(kDepth, depth - d);
        fill(panel, d, count, p);
        multiply_strips(rows, depth, packed, d, count, p, c, d > 0);
      }
      store_outputs(c, rows, kPanel, bias, out, row0, panel * kPanel);
    });
  }
}

template <int B, typename Element>
void panel_nt(ConstMatrix x, const QuantWeight& w, const float* bias, Matrix y, int threads,
              void* workspace) {
  panel_gemm<Element>(x, bias, y, threads, workspace,
                      [&](int64_t panel, int64_t first, int64_t count, Element* p) {
                        for (int64_t half = 0; half < kPanel; half += kBlockN) {
                          const Block<B> block(w, (panel * kPanel + half) / kBlockN);
                          for (int64_t k = 0; k < count; k += kTileElements<Element>) {
                            dequantize_tile(block, (first + k) / kTileElements<Element>,
                                            p + k * kPanel + half, kPanel);
                          }
                        }
                      });
}

template <int B, typename Element>
void panel_nn(ConstMatrix dy, const QuantWeight& w, Matrix dx, int threads, void* workspace) {
  constexpr int64_t kBlockElements = kBlockN / Operand<Element>::kPer;
  panel_gemm<Element>(dy, nullptr, dx, threads, workspace,
                      [&](int64_t panel, int64_t first, int64_t count, Element* p) {
                        for (int64_t n = 0; n < count; n += kBlockElements) {
                          const Block<B> block(w, (first + n) / kBlockElements);
                          // The tiles of a panel lie far apart, beyond what the processor
                          // prefetches itself.
                          prefetch_tile(block, panel, kTilesAhead);
                          dequantize_transposed(block, panel, p + n * kPanel);
                        }
                      });
}

void dequantize(const QuantWeight& w, Matrix out, int64_t first_output, const Resources& use) {
  with_bits(w.format.bits, [&](auto bits) {
    constexpr int B = decltype(bits)::value;
    parallel_for(out.rows / kBlockN, use.threads, [&](int64_t n, int) {
      const Block<B> block(w, first_output / kBlockN + n);
      for (int64_t tile = 0; tile < w.format.in_features / kTileK; ++tile) {
        alignas(64) float rows[kBlockN * kTileK];
        dequantize_transposed(block, tile, rows);
        for (int64_t r = 0; r < kBlockN; ++r) {
          char* y = row_pointer(out, n * kBlockN + r);
          for (int64_t c = 0; c < kTileK; c += kWidth) {
            store_as(Vec::load(rows + r * kTileK + c), y, out.dtype, tile * kTileK + c);
          }
        }
      }
    });
  });
}

}  // namespace
}  // namespace lowbitcore
