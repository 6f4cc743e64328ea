// The portable level: plain C++ over short arrays, which a compiler may vectorise for its baseline.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../half.h"
#include "isa.h"

namespace lowbitcore {
namespace {

constexpr int kWidth = 4;
constexpr int kRows = 4;
constexpr int kCols = 8;
constexpr int kDoubleWidth = 2;
constexpr int kDoubleRows = 4;
constexpr int kDirectRows = 4;

#define LOWBITCORE_LANES for (int i = 0; i < kWidth; ++i)

struct Vec {
  float v[kWidth];

  static Vec load(const float* p) {
    Vec r;
    LOWBITCORE_LANES r.v[i] = p[i];
    return r;
  }
  static Vec broadcast(float x) {
    Vec r;
    LOWBITCORE_LANES r.v[i] = x;
    return r;
  }
  static Vec from_bytes(const std::uint8_t* p) {
    Vec r;
    LOWBITCORE_LANES r.v[i] = static_cast<float>(p[i]);
    return r;
  }
  static Vec load_bf16(const std::uint16_t* p) {
    Vec r;
    LOWBITCORE_LANES r.v[i] = bf16_to_float(p[i]);
    return r;
  }
  static Vec load_f16(const std::uint16_t* p) {
    Vec r;
    LOWBITCORE_LANES r.v[i] = f16_to_float(p[i]);
    return r;
  }
  void store(float* p) const { LOWBITCORE_LANES p[i] = v[i]; }
  void store_bf16(std::uint16_t* p) const { LOWBITCORE_LANES p[i] = float_to_bf16(v[i]); }
  void store_f16(std::uint16_t* p) const { LOWBITCORE_LANES p[i] = float_to_f16(v[i]); }
};

template <typename F>
inline Vec map(const Vec& a, const Vec& b, const F& f) {
  Vec r;
  LOWBITCORE_LANES r.v[i] = f(a.v[i], b.v[i]);
  return r;
}

inline Vec operator+(const Vec& a, const Vec& b) {
  return map(a, b, [](float x, float y) { return x + y; });
}
inline Vec operator-(const Vec& a, const Vec& b) {
  return map(a, b, [](float x, float y) { return x - y; });
}
inline Vec operator*(const Vec& a, const Vec& b) {
  return map(a, b, [](float x, float y) { return x * y; });
}
inline Vec operator/(const Vec& a, const Vec& b) {
  return map(a, b, [](float x, float y) { return x / y; });
}
// As the vector instructions: the second operand where the comparison fails.
inline Vec min(const Vec& a, const Vec& b) {
  return map(a, b, [](float x, float y) { return x < y ? x : y; });
}
inline Vec max(const Vec& a, const Vec& b) {
  return map(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline Vec madd(const Vec& a, const Vec& b, const Vec& c) { return a * b + c; }
inline Vec fmadd(const Vec& a, const Vec& b, const Vec& c) {
  Vec r;
  LOWBITCORE_LANES r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return r;
}
inline Vec fnmadd(const Vec& a, const Vec& b, const Vec& c) {
  Vec r;
  LOWBITCORE_LANES r.v[i] = __builtin_fmaf(-a.v[i], b.v[i], c.v[i]);
  return r;
}
inline Vec round(const Vec& a) {
  Vec r;
  LOWBITCORE_LANES r.v[i] = __builtin_nearbyintf(a.v[i]);
  return r;
}
inline Vec round_bf16(const Vec& a) {
  Vec r;
  LOWBITCORE_LANES r.v[i] = bf16_to_float(float_to_bf16(a.v[i]));
  return r;
}
inline Vec round_f16(const Vec& a) {
  Vec r;
  LOWBITCORE_LANES r.v[i] = f16_to_float(float_to_f16(a.v[i]));
  return r;
}
inline Vec select_less(const Vec& a, const Vec& b, const Vec& x, const Vec& y) {
  Vec r;
  LOWBITCORE_LANES r.v[i] = a.v[i] < b.v[i] ? x.v[i] : y.v[i];
  return r;
}

struct VecD {
  double v[kDoubleWidth];

  static VecD load(const double* p) { return {{p[0], p[1]}}; }
  static VecD broadcast(double x) { return {{x, x}}; }
  void store(double* p) const {
    p[0] = v[0];
    p[1] = v[1];
  }
};

inline VecD fnmadd(const VecD& a, const VecD& b, const VecD& c) {
  return {{__builtin_fma(-a.v[0], b.v[0], c.v[0]), __builtin_fma(-a.v[1], b.v[1], c.v[1])}};
}

struct VecI {
  std::uint32_t v[kWidth];

  static VecI load(const std::uint32_t* p) {
    VecI r;
    LOWBITCORE_LANES r.v[i] = p[i];
    return r;
  }
  static VecI broadcast(int x) {
    VecI r;
    LOWBITCORE_LANES r.v[i] = static_cast<std::uint32_t>(x);
    return r;
  }
  template <int S>
  VecI right() const {
    VecI r;
    LOWBITCORE_LANES r.v[i] = v[i] >> S;
    return r;
  }
  template <int S>
  VecI left() const {
    VecI r;
    LOWBITCORE_LANES r.v[i] = v[i] << S;
    return r;
  }
  Vec as_float() const {
    Vec r;
    std::memcpy(r.v, v, sizeof r.v);
    return r;
  }
};

inline VecI as_int(const Vec& a) {
  VecI r;
  std::memcpy(r.v, a.v, sizeof r.v);
  return r;
}
inline VecI and_or(const VecI& a, const VecI& mask, const VecI& b) {
  VecI r;
  LOWBITCORE_LANES r.v[i] = (a.v[i] & mask.v[i]) | b.v[i];
  return r;
}
inline VecI operator|(const VecI& a, const VecI& b) {
  VecI r;
  LOWBITCORE_LANES r.v[i] = a.v[i] | b.v[i];
  return r;
}

inline void transpose_tile(const float* in, float* out) {
  for (int k = 0; k < 32; ++k) {
    for (int n = 0; n < 16; ++n) out[n * 32 + k] = in[k * 16 + n];
  }
}

#undef LOWBITCORE_LANES

}  // namespace
}  // namespace lowbitcore

#include "kernels_impl.h"

namespace lowbitcore {

const Backend& scalar_backend() {
  static constexpr Backend backend = make_backend("scalar");
  return backend;
}

}  // namespace lowbitcore
