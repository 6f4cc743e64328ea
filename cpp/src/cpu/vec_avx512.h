// The vector types of AVX-512 F, BW, VL, DQ: sixteen lanes, thirty-two registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace lowbitcore {
namespace {

constexpr int kWidth = 16;
constexpr int kRows = 12;  // 12 x 2 accumulators, 2 of b and 1 of a: 27 registers of 32
constexpr int kCols = 32;
constexpr int kDoubleWidth = 8;
constexpr int kDoubleRows = 8;

// The bits of v, moved so that to cut off their lower half rounds to bf16, ties to even; not of
// NaN.
inline __m512i before_cut_to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

struct Vec {
  __m512 v;

  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Vec from_bytes(const std::uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
  }
  static Vec load_bf16(const std::uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static Vec load_f16(const std::uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_bf16(std::uint16_t* p) const {
    const __m512i top = _mm512_srli_epi32(_mm512_castps_si512(v), 16);
    const __m512i rounded = _mm512_srli_epi32(before_cut_to_bf16(v), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i half = _mm512_mask_or_epi32(rounded, nan, top, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(half));
  }
  void store_f16(std::uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

inline Vec operator+(const Vec& a, const Vec& b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(const Vec& a, const Vec& b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(const Vec& a, const Vec& b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(const Vec& a, const Vec& b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec min(const Vec& a, const Vec& b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec max(const Vec& a, const Vec& b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec fmadd(const Vec& a, const Vec& b, const Vec& c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline Vec madd(const Vec& a, const Vec& b, const Vec& c) { return fmadd(a, b, c); }
inline Vec fnmadd(const Vec& a, const Vec& b, const Vec& c) {
  return {_mm512_fnmadd_ps(a.v, b.v, c.v)};
}
inline Vec round(const Vec& a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec round_f16(const Vec& a) {
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
inline Vec select_less(const Vec& a, const Vec& b, const Vec& x, const Vec& y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}

struct VecD {
  __m512d v;

  static VecD load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static VecD broadcast(double x) { return {_mm512_set1_pd(x)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
};

inline VecD fnmadd(const VecD& a, const VecD& b, const VecD& c) {
  return {_mm512_fnmadd_pd(a.v, b.v, c.v)};
}

struct VecI {
  __m512i v;

  static VecI load(const std::uint32_t* p) { return {_mm512_loadu_si512(p)}; }
  static VecI broadcast(std::uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  static VecI load_u16(const std::uint16_t* p) {
    return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(std::uint32_t* p) const { _mm512_storeu_si512(p, v); }
  template <int S>
  VecI right() const {
    return {_mm512_srli_epi32(v, S)};
  }
  template <int S>
  VecI left() const {
    return {_mm512_slli_epi32(v, S)};
  }
  Vec as_float() const { return {_mm512_castsi512_ps(v)}; }
};

inline VecI as_int(const Vec& a) { return {_mm512_castps_si512(a.v)}; }
inline Vec round_bf16(const Vec& a) {
  const __m512i top = _mm512_set1_epi32(-65536);
  return {_mm512_castsi512_ps(_mm512_and_si512(before_cut_to_bf16(a.v), top))};
}

inline VecI and_or(const VecI& a, const VecI& mask, const VecI& b) {
  return {_mm512_ternarylogic_epi32(a.v, mask.v, b.v, 0xea)};
}
inline VecI operator|(const VecI& a, const VecI& b) { return {_mm512_or_si512(a.v, b.v)}; }

// 16 x 16 in registers: pairs within 128-bit lanes, then twice among the lanes.
inline void transpose_16x16(__m512 (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  // r[4a+b] lane c holds column 4c+b of rows 4a..4a+3.
  for (int b = 0; b < 4; ++b) {
    const __m512 lo = _mm512_shuffle_f32x4(r[b], r[4 + b], 0x88);
    const __m512 hi = _mm512_shuffle_f32x4(r[b], r[4 + b], 0xdd);
    const __m512 lo2 = _mm512_shuffle_f32x4(r[8 + b], r[12 + b], 0x88);
    const __m512 hi2 = _mm512_shuffle_f32x4(r[8 + b], r[12 + b], 0xdd);
    t[b] = _mm512_shuffle_f32x4(lo, lo2, 0x88);
    t[4 + b] = _mm512_shuffle_f32x4(hi, hi2, 0x88);
    t[8 + b] = _mm512_shuffle_f32x4(lo, lo2, 0xdd);
    t[12 + b] = _mm512_shuffle_f32x4(hi, hi2, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

inline void transpose_tile(const float* in, float* out) {
  for (int half = 0; half < 2; ++half) {
    __m512 r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(in + (16 * half + i) * 16);
    transpose_16x16(r);
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(out + 32 * i + 16 * half, r[i]);
  }
}

}  // namespace
}  // namespace lowbitcore
