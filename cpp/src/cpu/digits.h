// X W^T for very few rows of bf16 in integers, which an instruction multiplies and adds four at a
// time: AVX-512 with VNNI and VBMI.
//
// A group's activations become fixed-point numbers of 30 bits relative to the largest of them, cut
// into signed bytes, the digits of 256^0 to 256^3. All sums over a group are exact, products with
// zeros are, too, and rounding begins where digits are put together again. bf16 has 8 bits: what is
// less than 2^-22 of a group's largest number may have no such form. Rows with that are left to
// fp32.
#pragma once

#include "direct.h"

namespace lowbitcore {
namespace {

constexpr int kDigits = 4;
constexpr int kFours = kTileK / 4;  // of inputs, in a tile

// Of a group, whose sums of up to 255 times a digit have to fit into 32 bits.
constexpr int64_t kMostInputs = 1 << 16;

// The input of a tile whose integer is a byte of four number `four`.
template <int B>
constexpr int input_of(int four, int byte) {
  if (B == 3) return 4 * four + byte;
  constexpr int per = 8 / B;  // integers that a byte of a word holds
  return four / per * per * 4 + four % per + per * byte;
}

struct alignas(64) Bytes {
  uint8_t byte[64];
};

// Selects the words of two digits, kFours each, from 32 inputs of kDigits bytes.
template <int B>
constexpr Bytes two_digits(int first) {
  Bytes select = {};
  for (int i = 0; i < 64; ++i) {
    const int digit = first + i / (4 * kFours);
    select.byte[i] = static_cast<uint8_t>(input_of<B>(i / 4 % kFours, i % 4) * kDigits + digit);
  }
  return select;
}

// R rows as digits, [tiles][R][kDigits][kFours] words of four inputs; of each group and row the
// sums of every digit, and what a digit of 256^0 is worth.
template <int R>
struct DigitRows {
  uint32_t* digits;
  int32_t* sums;
  float* units;

  DigitRows(void* workspace, int64_t k, int64_t groups)
      : digits(static_cast<uint32_t*>(workspace)),
        sums(reinterpret_cast<int32_t*>(digits + k * R)),
        units(reinterpret_cast<float*>(sums + groups * R * kDigits)) {}

  uint32_t* tile(int64_t t, int r) const { return digits + (t * R + r) * kDigits * kFours; }
  int32_t* sums_of(int64_t g, int r) const { return sums + (g * R + r) * kDigits; }
  float& unit(int64_t g, int r) const { return units[g * R + r]; }
};

inline float power_of_two(int biased_exponent) {
  const uint32_t bits = static_cast<uint32_t>(biased_exponent) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// Row r of group g, which tiles [first, last) are; false where numbers have no such form.
template <int B, int R>
bool pack_digits(const uint16_t* row, int64_t first, int64_t last, int64_t g, int r,
                 const DigitRows<R>& out) {
  static constexpr Bytes kLow = two_digits<B>(0), kHigh = two_digits<B>(2);
  __m512i most = _mm512_setzero_si512();
  for (int64_t t = first; t < last; ++t) {
    const __m512i size =
        _mm512_and_si512(_mm512_loadu_si512(row + t * kTileK), _mm512_set1_epi16(0x7fff));
    most = _mm512_max_epu16(most, size);
  }
  most = _mm512_max_epu16(most, _mm512_srli_epi32(most, 16));
  most = _mm512_and_si512(most, _mm512_set1_epi32(0xffff));
  const int largest = _mm512_reduce_max_epi32(most), exponent = largest == 0 ? 127 : largest >> 7;
  constexpr int kSmallest = 30, kNotFinite = 255;
  if (exponent < kSmallest || exponent == kNotFinite) return false;
  const Vec up = Vec::broadcast(power_of_two(254 + 29 - exponent));
  __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t t = first; t < last; ++t) {
    __m512i fixed[2];
    for (int half = 0; half < 2; ++half) {
      const Vec x = Vec::load_bf16(row + t * kTileK + half * 16) * up;
      const __m512i integer = _mm512_cvtps_epi32(x.v);
      if (_mm512_cmp_ps_mask(_mm512_cvtepi32_ps(integer), x.v, _CMP_NEQ_UQ) != 0) return false;
      // Digits of 128 and more become those less 256, and the next one is one more.
      const __m512i carry = _mm512_set1_epi32(0x00808080);
      fixed[half] = _mm512_xor_si512(_mm512_add_epi32(integer, carry), carry);
    }
    for (int i = 0; i < 2; ++i) {
      const __m512i select = _mm512_load_si512(i == 0 ? &kLow : &kHigh);
      const __m512i words = _mm512_permutex2var_epi8(fixed[0], select, fixed[1]);
      _mm512_storeu_si512(out.tile(t, r) + i * 2 * kFours, words);
      sums[i] = _mm512_dpbusd_epi32(sums[i], _mm512_set1_epi8(1), words);
    }
  }
  for (int p = 0; p < kDigits; ++p) {
    const auto lanes = static_cast<__mmask16>(p % 2 == 0 ? 0x00ff : 0xff00);
    out.sums_of(g, r)[p] = _mm512_mask_reduce_add_epi32(lanes, sums[p / 2]);
  }
  out.unit(g, r) = power_of_two(exponent - 29);
  return true;
}

// Integers of input_of<B>(S, 0 to 3) as bytes.
template <int B, int S>
LOWBITCORE_INLINE __m512i four(const VecI (&w)[B]) {
  if constexpr (B == 8) {
    return w[S].v;
  } else if constexpr (B == 3) {
    // 12 bits from one word, or from where two meet.
    constexpr int from = S / 2 == 3 ? 8 + S % 2 * 12 : S % 2 * 12;
    constexpr int64_t low = 0x09060300, each = 0x01010101;
    constexpr int64_t both = low + from * each + ((low + (32 + from) * each) << 32);
    __m512i bits = w[S / 2 == 3 ? 2 : 0].v;
    if constexpr (S / 2 == 1) {
      bits = _mm512_or_si512(_mm512_srli_epi32(w[0].v, 24), _mm512_slli_epi32(w[1].v, 8));
    }
    if constexpr (S / 2 == 2) {
      bits = _mm512_or_si512(_mm512_srli_epi32(w[1].v, 16), _mm512_slli_epi32(w[2].v, 16));
    }
    const __m512i bytes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(both), bits);
    return _mm512_and_si512(bytes, _mm512_set1_epi8(7));
  } else {
    constexpr int per = 8 / B;
    return _mm512_and_si512(_mm512_srli_epi32(w[S / per].v, S % per * B),
                            _mm512_set1_epi8((1 << B) - 1));
  }
}

template <int B, typename F, int... S>
LOWBITCORE_INLINE void for_each_four(const uint32_t* words, const F& f,
                                     std::integer_sequence<int, S...>) {
  VecI w[B];
  load_words(words, w);
  (f(S, four<B, S>(w)), ...);
}

// total[r] += the sums of group g, which tiles [first, last) are.
template <int B, int R>
LOWBITCORE_INLINE void add_digits(const Block<B>& block, int64_t g, int64_t first, int64_t last,
                                  const DigitRows<R>& x, Vec (&total)[R]) {
  constexpr int C = R == 1 ? 2 : 1;  // sums that do not wait for one another
  __m512i acc[R][kDigits][C];
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < kDigits; ++p) {
      for (int c = 0; c < C; ++c) acc[r][p][c] = _mm512_setzero_si512();
    }
  }
  for (int64_t tile = first; tile < last; ++tile) {
    fetch_ahead(block, tile);
    const uint32_t* digits = x.tile(tile, 0);
    for_each_four<B>(
        block.tile_words(tile),
        [&](int s, const __m512i& integers) LOWBITCORE_LAMBDA {
          for (int i = 0; i < R * kDigits; ++i) {
            __m512i& sum = acc[i / kDigits][i % kDigits][s % C];
            const auto digit = static_cast<int>(digits[i * kFours + s]);
            sum = _mm512_dpbusd_epi32(sum, integers, _mm512_set1_epi32(digit));
          }
        },
        std::make_integer_sequence<int, kFours>());
  }
  const Vec scale = block.scale(g, 0);
  const __m512i zero = _mm512_cvtps_epi32(block.zero(g, 0).v);
  for (int r = 0; r < R; ++r) {
    Vec sum = Vec::broadcast(0.0f);
    for (int p = kDigits - 1; p >= 0; --p) {
      for (int c = 1; c < C; ++c) acc[r][p][0] = _mm512_add_epi32(acc[r][p][0], acc[r][p][c]);
      const __m512i of_zero = _mm512_mullo_epi32(zero, _mm512_set1_epi32(x.sums_of(g, r)[p]));
      const Vec part = {_mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r][p][0], of_zero))};
      sum = madd(sum, Vec::broadcast(256.0f), part);
    }
    total[r] = madd(scale, sum * Vec::broadcast(x.unit(g, r)), total[r]);
  }
}

template <int B, int R>
bool digits_strip(const ConstMatrix& x, const QuantWeight& w, const float* bias, const Matrix& y,
                  const Resources& use) {
  const int64_t tiles = x.cols / kTileK, groups = w.format.groups();
  const int64_t group_tiles = Block<B>(w, 0).group_size / kTileK;
  const DigitRows<R> packed(use.workspace, x.cols, groups);
  for (int r = 0; r < R; ++r) {
    // A row too many repeats the last one, and is not stored.
    const auto* row = reinterpret_cast<const uint16_t*>(row_pointer(x, smaller(r, x.rows - 1)));
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * group_tiles, last = smaller(first + group_tiles, tiles);
      if (!pack_digits<B>(row, first, last, g, r, packed)) return false;
    }
  }
  for_each_block(y.cols / kBlockN, use.threads, [&](int64_t n) {
    const Block<B> block(w, n);
    alignas(64) float out[R * kBlockN];
    Vec total[R];
    for (int r = 0; r < R; ++r) total[r] = Vec::broadcast(0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * group_tiles;
      fetch_group(block, g, groups);
      add_digits(block, g, first, smaller(first + group_tiles, tiles), packed, total);
    }
    for (int r = 0; r < R; ++r) total[r].store(out + r * kBlockN);
    store_outputs(out, x.rows, kBlockN, bias, y, 0, n * kBlockN);
  });
  return true;
}

// X W^T of up to four rows of bf16; false, and nothing done, where they do not fit.
template <int B>
bool digits_nt(const ConstMatrix& x, const QuantWeight& w, const float* bias, const Matrix& y,
               const Resources& use) {
  if (Block<B>(w, 0).group_size > kMostInputs) return false;
  if (x.rows == 1) return digits_strip<B, 1>(x, w, bias, y, use);
  if (x.rows == 2) return digits_strip<B, 2>(x, w, bias, y, use);
  return digits_strip<B, 4>(x, w, bias, y, use);
}

}  // namespace
}  // namespace lowbitcore
