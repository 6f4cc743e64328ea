// Products of bf16 two at a time: AVX-512 with BF16.
#pragma once

#include <utility>

#include "layout.h"
#include "vec_avx512.h"

#define LOWBITCORE_PAIRS

namespace lowbitcore {
namespace {

// Subnormal inputs count as zero here, and subnormal sums become zero: the instruction does so.
inline Vec dot_pairs(const VecI& a, const VecI& b, const Vec& c) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}

inline VecI bf16_pairs(const Vec& low, const Vec& high) {
  alignas(64) static constexpr std::uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
  return {_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), halves)};
}

// Up to 16 rows of pairs, `step` bytes apart -> [pairs][rows]; pairs come in sixteens.
inline void transpose_pairs(const char* rows, std::int64_t step, std::int64_t count,
                            std::int64_t pairs, std::uint32_t* out) {
  const auto lanes = static_cast<__mmask16>((1u << count) - 1);
  for (std::int64_t p = 0; p < pairs; p += 16) {
    __m512 r[16];
    for (int i = 0; i < 16; ++i) {
      r[i] = i < count ? _mm512_loadu_ps(rows + i * step + p * 4) : _mm512_setzero_ps();
    }
    transpose_16x16(r);
    for (int i = 0; i < 16; ++i) _mm512_mask_storeu_ps(out + (p + i) * count, lanes, r[i]);
  }
}

// float [32 inputs][16 outputs] -> pairs of outputs [8][32]
inline void transpose_tile_pairs(const float* in, std::uint32_t* out) {
  // Inputs i and i + 16 share a register, 8 pairs of outputs each.
  __m512 r[16];
  for (int i = 0; i < 16; ++i) {
    const __m512 low = _mm512_loadu_ps(in + i * 16), high = _mm512_loadu_ps(in + (i + 16) * 16);
    r[i] = reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(high, low));
  }
  transpose_16x16(r);
  for (int p = 0; p < 8; ++p) {
    _mm512_storeu_ps(out + p * 32, r[p]);
    _mm512_storeu_ps(out + p * 32 + 16, r[8 + p]);
  }
}

}  // namespace
}  // namespace lowbitcore

#include "common.h"

namespace lowbitcore {
namespace {

// The words of a tile, with what pairs up 16 bits apart. So it lies in memory, but for 3 bits:
// there inputs 0 to 15 go into the lower halves and inputs 16 to 31 into the upper ones.
template <int B>
LOWBITCORE_INLINE void load_pair_words(const std::uint32_t* words, VecI (&w)[B]) {
  load_words(words, w);
  if constexpr (B == 3) {
    constexpr __mmask32 kUpper = 0xaaaaaaaau;
    const VecI middle = w[0].template right<16>() | w[2].template left<16>();
    w[0].v = _mm512_mask_blend_epi16(kUpper, w[0].v, w[1].v);
    w[2].v = _mm512_mask_blend_epi16(kUpper, w[1].v, w[2].v);
    w[1] = middle;
  }
}

// Pair P of a tile as 16-bit integers, from words whose halves are two streams of bits.
template <int B, int P>
LOWBITCORE_INLINE __m512i code_pair(const VecI (&w)[B]) {
  constexpr int bit = B * P, word = bit / 16, shift = bit % 16;
  __m512i value = _mm512_srli_epi16(w[word].v, shift);
  if constexpr (shift + B > 16) {
    value = _mm512_or_si512(value, _mm512_slli_epi16(w[word + 1].v, 16 - shift));
  }
  return _mm512_and_si512(value, _mm512_set1_epi16((1 << B) - 1));
}

// The integers -16..15 as bf16.
alignas(64) constexpr std::uint16_t kSmallIntegers[32] = {
    0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130, 0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0,
    0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
    0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};

// Zeros as 16-bit integers twice, less so much that differences of up to 4 bits count entries of
// kSmallIntegers.
template <int B>
struct PairZeros {
  static constexpr int kOffset = B <= 4 ? 16 : 0;
  __m512i v;

  explicit PairZeros(const Vec& zero) {
    const __m512i z = _mm512_cvtps_epi32(zero.v);
    v = _mm512_sub_epi16(_mm512_or_si512(z, _mm512_slli_epi32(z, 16)), _mm512_set1_epi16(kOffset));
  }
};

// Differences of 16-bit codes and lessened zeros, as bf16: all are exact.
template <int B>
LOWBITCORE_INLINE VecI bf16_difference(__m512i codes, __m512i zeros) {
  const __m512i d = _mm512_sub_epi16(codes, zeros);
  if constexpr (B <= 4) {
    return {_mm512_permutexvar_epi16(d, _mm512_load_si512(kSmallIntegers))};
  } else {
    const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(d, 16), 16);
    const __m512 l = _mm512_cvtepi32_ps(low), h = _mm512_cvtepi32_ps(_mm512_srai_epi32(d, 16));
    return {_mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(_mm512_castps_si512(l), 16),
                                    _mm512_castps_si512(h))};
  }
}

template <int B, typename F, int... P>
LOWBITCORE_INLINE void for_each_difference(const VecI (&w)[B], const PairZeros<B>& zeros,
                                           const F& f, std::integer_sequence<int, P...>) {
  (f(P, bf16_difference<B>(code_pair<B, P>(w), zeros.v)), ...);
}

// Calls f(p, q - z of pair p) for the 16 pairs of a tile.
template <int B, typename F>
LOWBITCORE_INLINE void for_each_difference(const std::uint32_t* words, const PairZeros<B>& zeros,
                                           const F& f) {
  VecI w[B];
  load_pair_words(words, w);
  for_each_difference<B>(w, zeros, f, std::make_integer_sequence<int, 16>());
}

}  // namespace
}  // namespace lowbitcore
