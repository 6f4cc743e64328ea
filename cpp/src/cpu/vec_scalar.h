// The portable level: vectors of the compiler's own, of 16 bytes, which it makes of whatever the
// processor's baseline has. They also compile in half the time that arrays of floats take.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../half.h"

namespace lowbitcore {
namespace {

constexpr int kWidth = 4;
constexpr int kRows = 4;
constexpr int kCols = 8;
constexpr int kDoubleWidth = 2;
constexpr int kDoubleRows = 4;

typedef float Floats __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(16)));
typedef std::uint32_t Words __attribute__((vector_size(16)));

template <typename To, typename From>
inline To bits_of(const From& from) {
  To to;
  static_assert(sizeof to == sizeof from, "as many bits");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct Vec {
  Floats v;

  template <typename F>
  static Vec of_each(const F& lane) {
    return {Floats{lane(0), lane(1), lane(2), lane(3)}};
  }
  static Vec load(const float* p) {
    Vec r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  static Vec broadcast(float x) { return {Floats{x, x, x, x}}; }
  static Vec from_bytes(const std::uint8_t* p) {
    return of_each([&](int i) { return static_cast<float>(p[i]); });
  }
  static Vec load_bf16(const std::uint16_t* p) {
    return of_each([&](int i) { return bf16_to_float(p[i]); });
  }
  static Vec load_f16(const std::uint16_t* p) {
    return of_each([&](int i) { return f16_to_float(p[i]); });
  }
  void store(float* p) const { std::memcpy(p, &v, sizeof v); }
  void store_bf16(std::uint16_t* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = float_to_bf16(v[i]);
  }
  void store_f16(std::uint16_t* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = float_to_f16(v[i]);
  }
};

inline Vec operator+(const Vec& a, const Vec& b) { return {a.v + b.v}; }
inline Vec operator-(const Vec& a, const Vec& b) { return {a.v - b.v}; }
inline Vec operator*(const Vec& a, const Vec& b) { return {a.v * b.v}; }
inline Vec operator/(const Vec& a, const Vec& b) { return {a.v / b.v}; }
// As the vector instructions: the second operand where the comparison fails.
inline Vec min(const Vec& a, const Vec& b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec max(const Vec& a, const Vec& b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec madd(const Vec& a, const Vec& b, const Vec& c) { return a * b + c; }
inline Vec fmadd(const Vec& a, const Vec& b, const Vec& c) {
  return Vec::of_each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline Vec fnmadd(const Vec& a, const Vec& b, const Vec& c) { return fmadd({-a.v}, b, c); }
inline Vec round(const Vec& a) {
  return Vec::of_each([&](int i) { return __builtin_nearbyintf(a.v[i]); });
}
inline Vec round_bf16(const Vec& a) {
  return Vec::of_each([&](int i) { return bf16_to_float(float_to_bf16(a.v[i])); });
}
inline Vec round_f16(const Vec& a) {
  return Vec::of_each([&](int i) { return f16_to_float(float_to_f16(a.v[i])); });
}
inline Vec select_less(const Vec& a, const Vec& b, const Vec& x, const Vec& y) {
  return {a.v < b.v ? x.v : y.v};
}

struct VecD {
  Doubles v;

  static VecD load(const double* p) {
    VecD r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  static VecD broadcast(double x) { return {Doubles{x, x}}; }
  void store(double* p) const { std::memcpy(p, &v, sizeof v); }
};

inline VecD fnmadd(const VecD& a, const VecD& b, const VecD& c) {
  return {Doubles{__builtin_fma(-a.v[0], b.v[0], c.v[0]), __builtin_fma(-a.v[1], b.v[1], c.v[1])}};
}

struct VecI {
  Words v;

  static VecI load(const std::uint32_t* p) {
    VecI r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  static VecI broadcast(int x) {
    const auto word = static_cast<std::uint32_t>(x);
    return {Words{word, word, word, word}};
  }
  template <int S>
  VecI right() const {
    return {v >> S};
  }
  template <int S>
  VecI left() const {
    return {v << S};
  }
  Vec as_float() const { return {bits_of<Floats>(v)}; }
};

inline VecI as_int(const Vec& a) { return {bits_of<Words>(a.v)}; }
inline VecI and_or(const VecI& a, const VecI& mask, const VecI& b) {
  return {(a.v & mask.v) | b.v};
}
inline VecI operator|(const VecI& a, const VecI& b) { return {a.v | b.v}; }

inline void transpose_tile(const float* in, float* out) {
  for (int k = 0; k < 32; ++k) {
    for (int n = 0; n < 16; ++n) out[n * 32 + k] = in[k * 16 + n];
  }
}

}  // namespace
}  // namespace lowbitcore
