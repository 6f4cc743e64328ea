// AVX2 with FMA and F16C: eight lanes, sixteen registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace lowbitcore {
namespace {

constexpr int kWidth = 8;
constexpr int kRows = 6;  // 6 x 2 accumulators, 2 of b and 1 of a: 15 registers of 16
constexpr int kCols = 16;
constexpr int kDoubleWidth = 4;
constexpr int kDoubleRows = 4;

// The bits of v, moved so that to cut off their lower half rounds to bf16, ties to even; not of
// NaN.
inline __m256i before_cut_to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

struct Vec {
  __m256 v;

  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static Vec from_bytes(const std::uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))};
  }
  static Vec load_bf16(const std::uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static Vec load_f16(const std::uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_bf16(std::uint16_t* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i rounded = _mm256_srli_epi32(before_cut_to_bf16(v), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i half = _mm256_blendv_epi8(rounded, quiet, nan);
    const __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  void store_f16(std::uint16_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

inline Vec operator+(const Vec& a, const Vec& b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(const Vec& a, const Vec& b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(const Vec& a, const Vec& b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(const Vec& a, const Vec& b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec min(const Vec& a, const Vec& b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec max(const Vec& a, const Vec& b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec fmadd(const Vec& a, const Vec& b, const Vec& c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
inline Vec madd(const Vec& a, const Vec& b, const Vec& c) { return fmadd(a, b, c); }
inline Vec fnmadd(const Vec& a, const Vec& b, const Vec& c) {
  return {_mm256_fnmadd_ps(a.v, b.v, c.v)};
}
inline Vec round(const Vec& a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec round_f16(const Vec& a) {
  return {_mm256_cvtph_ps(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
inline Vec select_less(const Vec& a, const Vec& b, const Vec& x, const Vec& y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}

struct VecD {
  __m256d v;

  static VecD load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static VecD broadcast(double x) { return {_mm256_set1_pd(x)}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
};

inline VecD fnmadd(const VecD& a, const VecD& b, const VecD& c) {
  return {_mm256_fnmadd_pd(a.v, b.v, c.v)};
}

struct VecI {
  __m256i v;

  static VecI load(const std::uint32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  static VecI broadcast(std::uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
  void store(std::uint32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  template <int S>
  VecI right() const {
    return {_mm256_srli_epi32(v, S)};
  }
  template <int S>
  VecI left() const {
    return {_mm256_slli_epi32(v, S)};
  }
  Vec as_float() const { return {_mm256_castsi256_ps(v)}; }
};

inline VecI as_int(const Vec& a) { return {_mm256_castps_si256(a.v)}; }
inline Vec round_bf16(const Vec& a) {
  const __m256i top = _mm256_set1_epi32(-65536);
  return {_mm256_castsi256_ps(_mm256_and_si256(before_cut_to_bf16(a.v), top))};
}

inline VecI and_or(const VecI& a, const VecI& mask, const VecI& b) {
  return {_mm256_or_si256(_mm256_and_si256(a.v, mask.v), b.v)};
}
inline VecI operator|(const VecI& a, const VecI& b) { return {_mm256_or_si256(a.v, b.v)}; }

// [8][8] with row steps: two rounds of pairing within 128-bit halves, then the halves.
inline void transpose_8x8(const float* in, int in_step, float* out, int out_step) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * in_step);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * out_step, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_step, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

inline void transpose_tile(const float* in, float* out) {
  for (int k = 0; k < 32; k += 8) {
    for (int n = 0; n < 16; n += 8) transpose_8x8(in + k * 16 + n, 16, out + n * 32 + k, 32);
  }
}

}  // namespace
}  // namespace lowbitcore
