// GEMV and skinny GEMM: X W^T for few rows, straight from the packed integers.
//
// Where bytes and decoding bound the time, each integer is decoded once for all rows, multiplied as
// the exact q - z, and a group's scale is applied to its sums. With a g_idx there are no runs of
// inputs with one scale: each weight is scaled, in fp32.
#pragma once

#include "common.h"

namespace lowbitcore {
namespace {

// Rows that share one decoding; more rows are cut into such strips.
constexpr int kDirectStrip = 8;

// How far ahead words are fetched: caches do not look across a page, nor past a block's end.
constexpr int64_t kFetchAhead = 4096;

// Fewer rows need several sums each, or additions would wait for one another.
constexpr int chains(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

// What for_each_difference subtracts to come to this type of elements.
template <int B>
LOWBITCORE_INLINE Zeros<B> zeros_of(const Vec& z, float) {
  return Zeros<B>(z);
}

#ifdef LOWBITCORE_PAIRS
template <int B>
LOWBITCORE_INLINE PairZeros<B> zeros_of(const Vec& z, uint32_t) {
  return PairZeros<B>(z);
}

// Element p of a tile pairs input pair_first(p) with the one kPairStep after it.
template <int B>
constexpr int64_t kPairStep = B == 3 ? 16 : 16 / B;

template <int B>
constexpr int64_t pair_first(int64_t p) {
  return p / kPairStep<B> * 2 * kPairStep<B> + p % kPairStep<B>;
}
#endif

// Calls f with a value of the element type that serves these activations here.
template <typename F>
void with_direct_element([[maybe_unused]] bool bf16, const F& f) {
#ifdef LOWBITCORE_PAIRS
  if constexpr (kDirectPairs) {
    if (bf16) return f(uint32_t{});
  }
#endif
  f(float{});
}

// `rows` rows of x as [elements][R], rows beyond it zero.
template <int B, int R>
void pack_few(const ConstMatrix& x, int64_t first, int64_t rows, float* out) {
  load_columns(x, first, rows, R, out);
}

#ifdef LOWBITCORE_PAIRS
template <int B, int R>
void pack_few(const ConstMatrix& x, int64_t first, int64_t rows, uint32_t* out) {
  for (int64_t r = 0; r < R; ++r) {
    const auto* row = reinterpret_cast<const uint16_t*>(row_pointer(x, first + r));
    for (int64_t tile = 0; tile < x.cols / kTileK; ++tile) {
      for (int64_t p = 0; p < kTileK / 2; ++p) {
        const int64_t k = tile * kTileK + pair_first<B>(p);
        out[(tile * kTileK / 2 + p) * R + r] =
            r < rows ? row[k] | static_cast<uint32_t>(row[k + kPairStep<B>]) << 16 : 0;
      }
    }
  }
}
#endif

// Asks for the scales and zeros that this thread's next block but one has of a group. They lie a
// row of scales apart, where no cache expects them.
template <int B>
LOWBITCORE_INLINE void fetch_group(const Block<B>& block, int64_t g, int64_t groups) {
  constexpr int64_t kBlocks = 2;
  __builtin_prefetch(block.scales + g * block.stride + kBlocks * kBlockN);
  __builtin_prefetch(block.zeros + (kBlocks * groups + g) * kBlockN);
}

// Asks for words of the tiles to come, into the second level: of what waits for the first there are
// too few places to keep up with memory.
template <int B>
LOWBITCORE_INLINE void fetch_ahead(const Block<B>& block, int64_t tile) {
  const char* ahead = reinterpret_cast<const char*>(block.tile_words(tile)) + kFetchAhead;
  for (int r = 0; r < B; ++r) __builtin_prefetch(ahead + r * kBlockN * 4, 0, 2);
}

// Calls f(block) for every block of outputs. Blocks that follow each other are one stream of bytes:
// long runs of them, but enough for threads to share.
template <typename F>
void for_each_block(int64_t blocks, int threads, const F& f) {
  const int64_t run = larger(blocks / (4 * threads), 1);
  parallel_for(divide_up(blocks, run), threads, [&](int64_t i, int) {
    for (int64_t n = i * run; n < smaller((i + 1) * run, blocks); ++n) f(n);
  });
}

// total[r] += the sums of one group over tiles [first, last), for one vector of outputs.
template <int B, int R, typename Element>
LOWBITCORE_INLINE void add_group(const Block<B>& block, int64_t g, int64_t first, int64_t last,
                                 int lane, const Element* x, Vec (&total)[R]) {
  using Register = typename Operand<Element>::Register;
  constexpr int C = chains(R);
  const auto zeros = zeros_of<B>(block.zero(g, lane), Element{});
  const Vec s = block.scale(g, lane);
  Vec acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = Vec::broadcast(0.0f);
  }
  for (int64_t tile = first; tile < last; ++tile) {
    fetch_ahead(block, tile);
    const Element* xt = x + tile * kTileElements<Element> * R;
    for_each_difference(
        block.tile_words(tile) + lane, zeros, [&](int i, const Register& w) LOWBITCORE_LAMBDA {
          for (int r = 0; r < R; ++r) {
            acc[r][i % C] = multiply_add(w, Register::broadcast(xt[i * R + r]), acc[r][i % C]);
          }
        });
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 1; c < C; ++c) acc[r][0] = acc[r][0] + acc[r][c];
    total[r] = madd(s, acc[r][0], total[r]);
  }
}

// y [R][16] = x W^T for one block of outputs.
template <int B, int R, typename Element>
void direct_block(const Block<B>& block, int64_t tiles, const Element* x, float* y) {
  const int64_t group_tiles = block.group_size / kTileK, groups = divide_up(tiles, group_tiles);
  for (int lane = 0; lane < kBlockN; lane += kWidth) {
    Vec total[R];
    for (int r = 0; r < R; ++r) total[r] = Vec::broadcast(0.0f);
    for (int64_t first = 0, g = 0; first < tiles; first += group_tiles, ++g) {
      fetch_group(block, g, groups);
      add_group(block, g, first, smaller(first + group_tiles, tiles), lane, x, total);
    }
    for (int r = 0; r < R; ++r) total[r].store(y + r * kBlockN + lane);
  }
}

// The integers of a tile for one vector of outputs, [32][kWidth].
template <int B>
void store_codes(const uint32_t* words, float* out) {
  for_each_code<B>(words,
                   [&](int i, const Vec& q) LOWBITCORE_LAMBDA { q.store(out + i * kWidth); });
}

// The same where inputs may be of any groups. A loop over them: to write it out for each number of
// rows, as above, would take half of all compile time.
template <int B, int R>
void permuted_block(const Block<B>& block, int64_t tiles, const float* x, float* y) {
  constexpr int C = chains(R);
  for (int lane = 0; lane < kBlockN; lane += kWidth) {
    Vec total[R][C];
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) total[r][c] = Vec::broadcast(0.0f);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      alignas(64) float codes[kTileK * kWidth];
      store_codes<B>(block.tile_words(tile) + lane, codes);
      const float* xt = x + tile * kTileK * R;
      for (int i = 0; i < kTileK; i += C) {
        for (int c = 0; c < C; ++c) {
          const int64_t g = block.g_idx[tile * kTileK + i + c];
          const Vec q = Vec::load(codes + (i + c) * kWidth);
          const Vec w = (q - block.zero(g, lane)) * block.scale(g, lane);
          for (int r = 0; r < R; ++r) {
            total[r][c] = madd(w, Vec::broadcast(xt[(i + c) * R + r]), total[r][c]);
          }
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int c = 1; c < C; ++c) total[r][0] = total[r][0] + total[r][c];
      total[r][0].store(y + r * kBlockN + lane);
    }
  }
}

template <int B, int R, typename Element>
void direct_strip(const ConstMatrix& x, int64_t first, int64_t rows, const QuantWeight& w,
                  const float* bias, const Matrix& y, int threads, Element* packed) {
  pack_few<B, R>(x, first, rows, packed);
  for_each_block(y.cols / kBlockN, threads, [&](int64_t n) {
    alignas(64) float out[R * kBlockN];
    const Block<B> block(w, n);
    if (w.g_idx == nullptr) {
      direct_block<B, R>(block, x.cols / kTileK, packed, out);
    } else if constexpr (Operand<Element>::kPer == 1) {
      permuted_block<B, R>(block, x.cols / kTileK, packed, out);
    }
    store_outputs(out, rows, kBlockN, bias, y, first, n * kBlockN);
  });
}

inline size_t direct_workspace(int64_t k) { return static_cast<size_t>(k * kDirectStrip) * 4; }

template <int B, typename Element>
void direct_nt(const ConstMatrix& x, const QuantWeight& w, const float* bias, const Matrix& y,
               int threads, void* workspace) {
  Element* packed = static_cast<Element*>(workspace);
  for (int64_t first = 0; first < x.rows; first += kDirectStrip) {
    const int64_t rows = smaller(kDirectStrip, x.rows - first);
    if (rows == 1) {
      direct_strip<B, 1>(x, first, rows, w, bias, y, threads, packed);
    } else if (rows == 2) {
      direct_strip<B, 2>(x, first, rows, w, bias, y, threads, packed);
    } else if (rows <= 4) {
      direct_strip<B, 4>(x, first, rows, w, bias, y, threads, packed);
    } else {
      direct_strip<B, kDirectStrip>(x, first, rows, w, bias, y, threads, packed);
    }
  }
}

}  // namespace
}  // namespace lowbitcore
