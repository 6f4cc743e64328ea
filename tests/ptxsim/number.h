// Conversions of half precision and bfloat16, correctly rounded, in code that compilers vectorise.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "lanes.h"

namespace ptxsim {

constexpr uint32_t kCanonicalNan = 0x7fffffffu;

inline float half_to_float(uint32_t half) {
  const uint32_t mantissa = half & 0x3ffu, exponent = half & 0x7c00u;
  // Subnormals by way of an integer: processors are slow with those of fp32.
  const uint32_t subnormal =
      bit_cast<uint32_t>(static_cast<float>(static_cast<int>(mantissa)) * 0x1p-24f);
  const uint32_t rebias = exponent == 0x7c00u ? 224u << 23 : 112u << 23;
  const uint32_t normal = ((half & 0x7fffu) << 13) + rebias;
  return bit_cast<float>((exponent == 0 ? subnormal : normal) | (half & 0x8000u) << 16);
}

inline uint32_t float_to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 0.5 aligns the last bit with that of half's subnormals, and rounds to nearest even.
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7fffu : 0x7c00u;
  const uint32_t rounded = magnitude >= 0x47800000u  ? special
                           : magnitude < 0x38800000u ? subnormal
                                                     : normal;
  return rounded | (magnitude > 0x7f800000u ? 0 : (bits >> 16 & 0x8000u));
}

inline float bfloat_to_float(uint32_t bfloat) { return bit_cast<float>(bfloat << 16); }

inline uint32_t float_to_bfloat(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded;
}

// A double to a float by rounding to odd: a second rounding to 22 bits or fewer is then as if there
// had been only one.
inline float to_odd_float(double value) {
  const float nearest = static_cast<float>(value);
  const uint32_t bits = bit_cast<uint32_t>(nearest);
  if (static_cast<double>(nearest) == value || (bits & 1) || std::isnan(value) ||
      std::isinf(value)) {
    return nearest;
  }
  if (std::isinf(nearest)) return std::copysign(0x1.fffffep127f, nearest);
  const bool away = std::fabs(static_cast<double>(nearest)) > std::fabs(value);
  return bit_cast<float>(away ? (bits - 1) | 1 : bits | 1);
}

// product + z, rounded to odd, for a rounding to follow. T is float or double.
template <class T>
inline T add_to_odd(T product, T z) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  const T sum = product + z;
  const T part = sum - product;
  const T lost = (product - (sum - part)) + (z - part);
  const Bits bits = bit_cast<Bits>(sum);
  const Bits step = (lost > 0) == (sum > 0) ? 1 : ~Bits{0};
  const bool adjust = lost != 0 && !(bits & 1) && lost == lost;
  return bit_cast<T>(bits + (adjust ? step : 0));
}

struct Half {
  static float to_float(uint32_t bits) { return half_to_float(bits & 0xffffu); }
  static uint32_t from_float(float value) { return float_to_half(value); }
};

struct Bfloat {
  static float to_float(uint32_t bits) { return bfloat_to_float(bits & 0xffffu); }
  static uint32_t from_float(float value) { return float_to_bfloat(value); }
};

}  // namespace ptxsim
