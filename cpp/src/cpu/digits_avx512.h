// Products of bytes, four at a time: AVX-512 with VNNI and VBMI.
#pragma once

#include <utility>

#include "pairs_avx512.h"

#define LOWBITCORE_DIGITS

namespace lowbitcore {
namespace {

constexpr int kByteChains = 2;
constexpr int kMostDigitBits = 8;

inline VecI nearest(const Vec& v) { return {_mm512_cvtps_epi32(v.v)}; }
inline Vec to_float(const VecI& v) { return {_mm512_cvtepi32_ps(v.v)}; }
inline VecI operator+(const VecI& a, const VecI& b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline VecI operator-(const VecI& a, const VecI& b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline VecI operator*(const VecI& a, const VecI& b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline VecI operator^(const VecI& a, const VecI& b) { return {_mm512_xor_si512(a.v, b.v)}; }

// Sums of products of integers of B bits with digits.
template <int B>
class ByteSum {
  __m512i all_ = _mm512_setzero_si512();

 public:
  LOWBITCORE_INLINE void add(const VecI& integers, const VecI& digits) {
    all_ = _mm512_dpbusd_epi32(all_, integers.v, digits.v);
  }
  LOWBITCORE_INLINE void settle() {}
  LOWBITCORE_INLINE VecI value() const { return {all_}; }
};

// The input of a tile whose integer is a byte of four number `four`.
template <int B>
constexpr int input_of(int four, int byte) {
  if (B == 3) return 4 * four + byte;
  constexpr int per = 8 / B;  // integers that a byte of a word holds
  return four / per * per * 4 + four % per + per * byte;
}

// Integers of input_of<B>(S, 0 to 3) as bytes.
template <int B, int S>
LOWBITCORE_INLINE VecI four(const VecI (&w)[B]) {
  if constexpr (B == 8) {
    return w[S];
  } else if constexpr (B == 3) {
    // 12 bits from one word, or from where two meet.
    constexpr int from = S / 2 == 3 ? 8 + S % 2 * 12 : S % 2 * 12;
    constexpr int64_t low = 0x09060300, each = 0x01010101;
    constexpr int64_t both = low + from * each + ((low + (32 + from) * each) << 32);
    VecI bits = w[S / 2 == 3 ? 2 : 0];
    if constexpr (S / 2 == 1) bits = w[0].template right<24>() | w[1].template left<8>();
    if constexpr (S / 2 == 2) bits = w[1].template right<16>() | w[2].template left<16>();
    const __m512i integers = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(both), bits.v);
    return {_mm512_and_si512(integers, _mm512_set1_epi8(7))};
  } else {
    constexpr int per = 8 / B;
    const VecI bits = w[S / per].template right<S % per * B>();
    return {_mm512_and_si512(bits.v, _mm512_set1_epi8((1 << B) - 1))};
  }
}

template <int B, typename F, int... S>
LOWBITCORE_INLINE void for_each_four(const uint32_t* words, const F& f,
                                     std::integer_sequence<int, S...>) {
  VecI w[B];
  load_words(words, w);
  (f(S, four<B, S>(w)), ...);
}

// Calls f(four, integers) for the eight fours of a tile.
template <int B, typename F>
LOWBITCORE_INLINE void for_each_four(const uint32_t* words, const F& f) {
  for_each_four<B>(words, f, std::make_integer_sequence<int, kFours>());
}

struct alignas(64) Bytes {
  uint8_t byte[64];
};

// Selects the words of four fours from 32 numbers of kDigits bytes.
template <int B>
constexpr Bytes half_of_fours(int first) {
  Bytes select = {};
  for (int i = 0; i < 64; ++i) {
    const int word = i / 4;
    select.byte[i] =
        static_cast<uint8_t>(input_of<B>(first + word / kDigits, i % 4) * kDigits + word % kDigits);
  }
  return select;
}

// 32 numbers of kDigits bytes -> words of a digit of four inputs each, [kFours][kDigits].
template <int B>
inline void spread_digits(const uint32_t* numbers, uint32_t* words) {
  static constexpr Bytes kHalves[2] = {half_of_fours<B>(0), half_of_fours<B>(kFours / 2)};
  const VecI low = VecI::load(numbers), high = VecI::load(numbers + kWidth);
  for (int half = 0; half < 2; ++half) {
    const __m512i select = _mm512_load_si512(&kHalves[half]);
    const VecI spread = {_mm512_permutex2var_epi8(low.v, select, high.v)};
    spread.store(words + half * kWidth);
  }
}

}  // namespace
}  // namespace lowbitcore
