// GEMV in integers (VNNI): X W^T for very few rows of bf16, on levels that multiply and add bytes.
//
// A group's activations become fixed-point numbers of 30 bits relative to the largest of them, cut
// into signed bytes, the digits of 256^0 to 256^3. All sums over a group are exact, products with
// zeros are, too, and rounding begins where digits are put together again. bf16 has 8 bits: most
// groups get by without the lowest digit, but what is less than 2^-22 of a group's largest number
// may have no such form at all. Rows with that are left to fp32.
#pragma once

#include "direct.h"

namespace lowbitcore {
namespace {

// Of a group, whose sums of up to 255 times a digit have to fit into 32 bits.
constexpr int64_t kMostInputs = 1 << 16;

// R rows as digits, [tiles][R][kFours][kDigits] words of four inputs; of each group and row the
// sums of every digit, and what a digit of 256^0 is worth; of each group its lowest digit that is
// not 0 throughout, if that is 0 or 1, or else 1.
template <int R>
struct DigitRows {
  uint32_t* digits;
  int32_t* sums;
  float* units;
  int32_t* lowest;

  DigitRows(void* workspace, int64_t k, int64_t groups)
      : digits(static_cast<uint32_t*>(workspace)),
        sums(reinterpret_cast<int32_t*>(digits + k * R)),
        units(reinterpret_cast<float*>(sums + groups * R * kDigits)),
        lowest(reinterpret_cast<int32_t*>(units + groups * R)) {}

  uint32_t* tile(int64_t t, int r) const { return digits + (t * R + r) * kFours * kDigits; }
  int32_t* sums_of(int64_t g, int r) const { return sums + (g * R + r) * kDigits; }
  float& unit(int64_t g, int r) const { return units[g * R + r]; }
};

inline float power_of_two(int biased_exponent) {
  const uint32_t bits = static_cast<uint32_t>(biased_exponent) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// All lanes, or'ed.
inline uint32_t any_bits(const VecI& v) {
  uint32_t lane[kWidth], any = 0;
  v.store(lane);
  for (int i = 0; i < kWidth; ++i) any |= lane[i];
  return any;
}

// Row r of group g, which tiles [first, last) are; false where numbers have no such form.
template <int B, int R>
bool pack_digits(const uint16_t* row, int64_t first, int64_t last, int64_t g, int r,
                 const DigitRows<R>& out) {
  uint16_t largest = 0;
  for (int64_t k = first * kTileK; k < last * kTileK; ++k) {
    const auto size = static_cast<uint16_t>(row[k] & 0x7fff);
    largest = size > largest ? size : largest;
  }
  constexpr int kSmallest = 30, kNotFinite = 255;
  const int exponent = largest == 0 ? 127 : largest >> 7;
  if (exponent < kSmallest || exponent == kNotFinite) return false;
  const Vec up = Vec::broadcast(power_of_two(254 + 29 - exponent));
  const float unit = power_of_two(exponent - 29);
  // Digits of 128 and more become those less 256, and the next one is one more.
  const VecI carry = VecI::broadcast(0x00808080), ones = VecI::broadcast(0x01010101);
  VecI missed = VecI::broadcast(0), used = missed;
  ByteSum<2> sum;
  for (int64_t t = first; t < last; ++t) {
    uint32_t fixed[kTileK];
    for (int i = 0; i < kTileK; i += kWidth) {
      const Vec x = Vec::load_bf16(row + t * kTileK + i);
      const VecI integer = nearest(x * up);
      // Not x * up, which may come to nothing.
      missed = missed | as_int(x - to_float(integer) * Vec::broadcast(unit));
      used = used | integer;
      ((integer + carry) ^ carry).store(fixed + i);
    }
    uint32_t* words = out.tile(t, r);
    spread_digits<B>(fixed, words);
    for (int i = 0; i < kFours * kDigits; i += kWidth) sum.add(ones, VecI::load(words + i));
    sum.settle();
  }
  if (any_bits(missed) << 1 != 0) return false;  // but for the sign of -0 - 0
  uint32_t lane[kWidth];
  sum.value().store(lane);
  int32_t* sums = out.sums_of(g, r);
  for (int p = 0; p < kDigits; ++p) sums[p] = 0;
  for (int i = 0; i < kWidth; ++i) sums[i % kDigits] += static_cast<int32_t>(lane[i]);
  out.unit(g, r) = unit;
  const int32_t lowest = (any_bits(used) & 0xff) == 0 ? 1 : 0;
  out.lowest[g] = r == 0 || lowest < out.lowest[g] ? lowest : out.lowest[g];
  return true;
}

// total[r] += the sums of group g, which tiles [first, last) are, for one vector of outputs; of
// digits from `kLowest` on.
template <int B, int R, int kLowest>
LOWBITCORE_INLINE void add_digits(const Block<B>& block, int64_t g, int64_t first, int64_t last,
                                  int lane, const DigitRows<R>& x, Vec* total) {
  constexpr int C = R == 1 ? kByteChains : 1;
  ByteSum<B> sum[R][kDigits][C];
  for (int64_t tile = first; tile < last; ++tile) {
    if (lane == 0) fetch_ahead(block, tile);
    const uint32_t* digits = x.tile(tile, 0);
    for_each_four<B>(block.tile_words(tile) + lane,
                     [&](int s, const VecI& integers) LOWBITCORE_LAMBDA {
                       for (int r = 0; r < R; ++r) {
                         for (int p = kLowest; p < kDigits; ++p) {
                           const uint32_t digit = digits[(r * kFours + s) * kDigits + p];
                           sum[r][p][s % C].add(integers, VecI::broadcast(digit));
                         }
                       }
                     });
    for (int r = 0; r < R; ++r) {
      for (int p = kLowest; p < kDigits; ++p) {
        for (int c = 0; c < C; ++c) sum[r][p][c].settle();
      }
    }
  }
  const Vec scale = block.scale(g, lane);
  const VecI zero = nearest(block.zero(g, lane));
  for (int r = 0; r < R; ++r) {
    Vec number = Vec::broadcast(0.0f);
    for (int p = kDigits - 1; p >= kLowest; --p) {
      VecI part = sum[r][p][0].value();
      for (int c = 1; c < C; ++c) part = part + sum[r][p][c].value();
      const VecI of_zero = zero * VecI::broadcast(static_cast<uint32_t>(x.sums_of(g, r)[p]));
      number = madd(number, Vec::broadcast(256.0f), to_float(part - of_zero));
    }
    const float unit = x.unit(g, r) * (kLowest == 0 ? 1.0f : 256.0f);
    total[r] = madd(scale, number * Vec::broadcast(unit), total[r]);
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
    Vec total[kVecsPerBlock][R];
    for (int i = 0; i < kVecsPerBlock * R; ++i) total[i / R][i % R] = Vec::broadcast(0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * group_tiles, last = smaller(first + group_tiles, tiles);
      fetch_group(block, g, groups);
      for (int v = 0; v < kVecsPerBlock; ++v) {
        if (packed.lowest[g] == 0) {
          add_digits<B, R, 0>(block, g, first, last, v * kWidth, packed, total[v]);
        } else {
          add_digits<B, R, 1>(block, g, first, last, v * kWidth, packed, total[v]);
        }
      }
    }
    alignas(64) float out[R * kBlockN];
    for (int v = 0; v < kVecsPerBlock; ++v) {
      for (int r = 0; r < R; ++r) total[v][r].store(out + r * kBlockN + v * kWidth);
    }
    store_outputs(out, x.rows, kBlockN, bias, y, 0, n * kBlockN);
  });
  return true;
}

// X W^T of up to kDigitRows rows; false, and nothing done, where they do not fit.
template <int B>
bool digits_nt(const ConstMatrix& x, const QuantWeight& w, const float* bias, const Matrix& y,
               const Resources& use) {
  if constexpr (B <= kMostDigitBits) {
    const bool fit = x.rows > 0 && x.rows <= kDigitRows && x.dtype == DType::bf16;
    if (!fit || w.g_idx != nullptr || group_columns(w.format) > kMostInputs) return false;
    if (x.rows == 1) return digits_strip<B, 1>(x, w, bias, y, use);
    if constexpr (kDigitRows > 1) {
      if (x.rows == 2) return digits_strip<B, 2>(x, w, bias, y, use);
    }
    if constexpr (kDigitRows > 2) return digits_strip<B, 4>(x, w, bias, y, use);
  }
  return false;
}

}  // namespace
}  // namespace lowbitcore
