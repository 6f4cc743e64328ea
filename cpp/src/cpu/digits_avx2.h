// Products of bytes without an instruction that adds four of them: AVX2.
#pragma once

#include <utility>

#include "vec_avx2.h"

#include "common.h"  // over these vectors

#define LOWBITCORE_DIGITS

namespace lowbitcore {
namespace {

constexpr int kByteChains = 1;
constexpr int kMostDigitBits = 4;  // products of longer ones overflow 16 bits

inline VecI nearest(const Vec& v) { return {_mm256_cvtps_epi32(v.v)}; }
inline Vec to_float(const VecI& v) { return {_mm256_cvtepi32_ps(v.v)}; }
inline VecI operator+(const VecI& a, const VecI& b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline VecI operator-(const VecI& a, const VecI& b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline VecI operator*(const VecI& a, const VecI& b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
inline VecI operator^(const VecI& a, const VecI& b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline VecI operator&(const VecI& a, const VecI& b) { return {_mm256_and_si256(a.v, b.v)}; }

// Sums of products of integers of B bits with digits, in 16 bits over a tile at most:
// 8 x 2 x 15 x 128 < 2^15.
template <int B>
class ByteSum {
  __m256i tile_ = _mm256_setzero_si256(), all_ = _mm256_setzero_si256();

 public:
  LOWBITCORE_INLINE void add(const VecI& integers, const VecI& digits) {
    tile_ = _mm256_add_epi16(tile_, _mm256_maddubs_epi16(integers.v, digits.v));
    // Else GCC sums in another order, for which it keeps a tile's products in memory.
    asm("" : "+x"(tile_));
  }
  LOWBITCORE_INLINE void settle() {
    all_ = _mm256_add_epi32(all_, _mm256_madd_epi16(tile_, _mm256_set1_epi16(1)));
    tile_ = _mm256_setzero_si256();
  }
  LOWBITCORE_INLINE VecI value() const { return {all_}; }
};

// The input of a tile whose integer is a byte of four number `four`. 32 of 3 bits are four times
// eight, each in a byte of three registers, see below.
template <int B>
constexpr int input_of(int four, int byte) {
  if (B == 3) return four + 8 * ((4 - byte) % 4);
  constexpr int per = 8 / B;  // integers that a byte of a word holds
  return four / per * per * 4 + four % per + per * byte;
}

LOWBITCORE_INLINE VecI bytes(int value) { return {_mm256_set1_epi8(static_cast<char>(value))}; }

// Byte i of each word of the result is byte (i + By) % 4 of it.
template <int By>
LOWBITCORE_INLINE VecI rotate_bytes(const VecI& v) {
  return v.template right<8 * By>() | v.template left<32 - 8 * By>();
}

// Of each byte, from a in those that `mask` selects.
LOWBITCORE_INLINE VecI select(std::uint32_t mask, const VecI& a, const VecI& b) {
  return {_mm256_blendv_epi8(b.v, a.v, VecI::broadcast(mask).v)};
}

// Calls f(four, integers) for the eight fours of a tile, for one vector of outputs.
template <int B, typename F, int... S>
LOWBITCORE_INLINE void fours(const VecI (&w)[B], const F& f, std::integer_sequence<int, S...>) {
  constexpr int per = 8 / B;
  (f(S, w[S / per].template right<S % per * B>() & bytes((1 << B) - 1)), ...);
}

// 3 bits: of 12 bytes, those whose number is 0, 1 or 2 more than a multiple of 3 go to a register
// each, so that a byte of the three has eight integers of 24 bits in a row.
template <typename F, int... S>
LOWBITCORE_INLINE void fours(const VecI (&w)[3], const F& f, std::integer_sequence<int, S...>) {
  const VecI low = select(0xff0000ff, w[0], select(0x00ff0000, w[1], w[2]));
  const VecI middle = rotate_bytes<1>(select(0x0000ff00, w[0], select(0xff0000ff, w[1], w[2])));
  const VecI high = rotate_bytes<2>(select(0x00ff0000, w[0], select(0x0000ff00, w[1], w[2])));
  const VecI seven = bytes(7);
  f(0, low & seven);
  f(1, low.right<3>() & seven);
  f(2, (low.right<6>() & bytes(3)) | (middle.left<2>() & bytes(4)));
  f(3, middle.right<1>() & seven);
  f(4, middle.right<4>() & seven);
  f(5, (middle.right<7>() & bytes(1)) | (high.left<1>() & bytes(6)));
  f(6, high.right<2>() & seven);
  f(7, high.right<5>() & seven);
}

template <int B, typename F>
LOWBITCORE_INLINE void for_each_four(const uint32_t* words, const F& f) {
  VecI w[B];
  load_words(words, w);
  fours(w, f, std::make_integer_sequence<int, kFours>());
}

// 32 numbers of kDigits bytes -> words of a digit of four inputs each, [kFours][kDigits].
template <int B>
inline void spread_digits(const uint32_t* numbers, uint32_t* words) {
  const __m128i transpose = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int s = 0; s < kFours; ++s) {
    uint32_t four[4];
    for (int i = 0; i < 4; ++i) four[i] = numbers[input_of<B>(s, i)];
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(four));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words + s * kDigits),
                     _mm_shuffle_epi8(v, transpose));
  }
}

}  // namespace
}  // namespace lowbitcore
