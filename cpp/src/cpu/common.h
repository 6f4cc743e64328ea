// What all kernels of a level share: reading activations, and taking packed integers apart.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "../backend.h"
#include "../half.h"
#include "../parallel.h"
#include "layout.h"

// For what is called once per integer: sums that live in registers must not go through memory, as
// they do where a compiler leaves such a function out of line.
#ifdef __SANITIZE_ADDRESS__  // instrumented as well, they would take minutes to compile
#define LOWBITCORE_INLINE inline
#define LOWBITCORE_LAMBDA
#else
#define LOWBITCORE_INLINE inline __attribute__((always_inline))
#define LOWBITCORE_LAMBDA __attribute__((always_inline))
#endif

namespace lowbitcore {
namespace {

using std::int32_t;
using std::int64_t;
using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

constexpr int64_t kPanel = 32;  // outputs that one thread computes at a time
constexpr int kVecsPerBlock = kBlockN / kWidth;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Columns of a whole group: no more than there are.
inline int64_t group_columns(const QuantFormat& f) {
  return f.group_size == -1 ? f.in_features : smaller(f.group_size, f.in_features);
}

// ---- activations ----

constexpr int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline const char* row_pointer(const ConstMatrix& m, int64_t row) {
  return static_cast<const char*>(m.data) + row * m.stride * bytes_of(m.dtype);
}

inline char* row_pointer(const Matrix& m, int64_t row) {
  return const_cast<char*>(row_pointer(ConstMatrix(m), row));
}

inline Vec load_as_float(const char* row, DType dtype, int64_t col) {
  switch (dtype) {
    case DType::f32:
      return Vec::load(reinterpret_cast<const float*>(row) + col);
    case DType::bf16:
      return Vec::load_bf16(reinterpret_cast<const uint16_t*>(row) + col);
    default:
      return Vec::load_f16(reinterpret_cast<const uint16_t*>(row) + col);
  }
}

inline void store_as(const Vec& v, char* row, DType dtype, int64_t col) {
  switch (dtype) {
    case DType::f32:
      v.store(reinterpret_cast<float*>(row) + col);
      break;
    case DType::bf16:
      v.store_bf16(reinterpret_cast<uint16_t*>(row) + col);
      break;
    default:
      v.store_f16(reinterpret_cast<uint16_t*>(row) + col);
  }
}

inline float load_scalar(const char* row, DType dtype, int64_t col) {
  if (dtype == DType::f32) return reinterpret_cast<const float*>(row)[col];
  const uint16_t half = reinterpret_cast<const uint16_t*>(row)[col];
  return dtype == DType::bf16 ? bf16_to_float(half) : f16_to_float(half);
}

inline void store_scalar(float value, char* row, DType dtype, int64_t col) {
  if (dtype == DType::f32) {
    reinterpret_cast<float*>(row)[col] = value;
  } else {
    reinterpret_cast<uint16_t*>(row)[col] =
        dtype == DType::bf16 ? float_to_bf16(value) : float_to_f16(value);
  }
}

// Rows of x as fp32 columns: out[k * step + r]. Missing rows, up to `step`, are 0.
inline void load_columns(const ConstMatrix& x, int64_t first, int64_t rows, int64_t step,
                         float* out) {
  if (rows < step) std::memset(out, 0, static_cast<size_t>(x.cols * step) * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) {
    const char* row = row_pointer(x, first + r);
    int64_t k = 0;
    for (; k + kWidth <= x.cols; k += kWidth) {
      alignas(64) float lane[kWidth];
      load_as_float(row, x.dtype, k).store(lane);
      for (int i = 0; i < kWidth; ++i) out[(k + i) * step + r] = lane[i];
    }
    for (; k < x.cols; ++k) out[k * step + r] = load_scalar(row, x.dtype, k);
  }
}

// sums [rows][cols], plus the bias of these columns, to y from (first_row, first_col) on.
inline void store_outputs(const float* sums, int64_t rows, int64_t cols, const float* bias,
                          const Matrix& y, int64_t first_row, int64_t first_col) {
  for (int64_t r = 0; r < rows; ++r) {
    char* row = row_pointer(y, first_row + r);
    for (int64_t c = 0; c < cols; c += kWidth) {
      Vec v = Vec::load(sums + r * cols + c);
      if (bias != nullptr) v = v + Vec::load(bias + first_col + c);
      store_as(v, row, y.dtype, first_col + c);
    }
  }
}

// ---- operands ----
//
// Sums run over 32-bit elements: floats, or, on levels that define LOWBITCORE_PAIRS, two bf16 that
// follow each other in the reduction. Products of bf16 are exact in fp32.

template <typename Element>
struct Operand;

template <>
struct Operand<float> {
  using Register = Vec;
  static constexpr int kPer = 1;  // terms of the reduction in an element
};

LOWBITCORE_INLINE Vec multiply_add(const Vec& a, const Vec& b, const Vec& c) {
  return madd(a, b, c);
}

#ifdef LOWBITCORE_PAIRS
template <>
struct Operand<uint32_t> {
  using Register = VecI;
  static constexpr int kPer = 2;
};

LOWBITCORE_INLINE Vec multiply_add(const VecI& a, const VecI& b, const Vec& c) {
  return dot_pairs(a, b, c);
}
#endif

// Elements of the 32 inputs of a tile.
template <typename Element>
constexpr int64_t kTileElements = kTileK / Operand<Element>::kPer;

// Calls f with a value of the element type that serves these activations.
template <typename F>
inline void with_element([[maybe_unused]] bool bf16, const F& f) {
#ifdef LOWBITCORE_PAIRS
  if (bf16) return f(uint32_t{});
#endif
  f(float{});
}

// ---- packed integers ----
//
// An integer becomes a float where it lies: starting at bit b of a mantissa, it counts units of
// 2^(23 - b), whose exponent is put above it. Without 2^(23 - b) + z it is q - z, exactly.

// Integers of a tile that are converted from one window of bits, within a mantissa's 23.
template <int B>
constexpr int kWindow = B == 3 ? 7 : 16 / B;

// The windows' bits of a tile whose `B` words per lane are w. They may straddle words (3 bits
// only).
template <int B, int I>
LOWBITCORE_INLINE VecI window(const VecI (&w)[B]) {
  constexpr int bit = I * kWindow<B> * B, word = bit / 32, shift = bit % 32;
  constexpr int width = static_cast<int>(smaller(kWindow<B>, 32 - I * kWindow<B>)) * B;
  if constexpr (shift == 0) {
    return w[word];
  } else {
    VecI value = w[word].template right<shift>();
    if constexpr (shift + width > 32) value = value | w[word + 1].template left<32 - shift>();
    return value;
  }
}

// What is subtracted from the integers at each place of a window.
template <int B>
struct Zeros {
  Vec at[kWindow<B>];

  explicit Zeros(const Vec& zero) {
    for (int i = 0; i < kWindow<B>; ++i) {
      at[i] = zero + Vec::broadcast(static_cast<float>(1 << (23 - i * B)));
    }
  }
};

template <int B, int I>
LOWBITCORE_INLINE Vec difference(const VecI (&w)[B], const Zeros<B>& zeros) {
  constexpr int place = I % kWindow<B>, bit = place * B;
  const VecI integer = VecI::broadcast(((1 << B) - 1) << bit);
  const VecI exponent = VecI::broadcast((127 + 23 - bit) << 23);
  return and_or(window<B, I / kWindow<B>>(w), integer, exponent).as_float() - zeros.at[place];
}

template <int B, typename F, int... I>
LOWBITCORE_INLINE void for_each_difference(const VecI (&w)[B], const Zeros<B>& zeros, const F& f,
                                           std::integer_sequence<int, I...>) {
  (f(I, difference<B, I>(w, zeros)), ...);
}

// The words of a tile, for the outputs of one vector.
template <int B>
LOWBITCORE_INLINE void load_words(const uint32_t* words, VecI (&w)[B]) {
  for (int r = 0; r < B; ++r) w[r] = VecI::load(words + r * kBlockN);
}

// Calls f(i, q - z of input i) for the 32 inputs of a tile, for the outputs of one vector.
template <int B, typename F>
LOWBITCORE_INLINE void for_each_difference(const uint32_t* words, const Zeros<B>& zeros,
                                           const F& f) {
  VecI w[B];
  load_words(words, w);
  for_each_difference<B>(w, zeros, f, std::make_integer_sequence<int, 32>());
}

// The same with q alone.
template <int B, typename F>
LOWBITCORE_INLINE void for_each_code(const uint32_t* words, const F& f) {
  for_each_difference(words, Zeros<B>(Vec::broadcast(0.0f)), f);
}

// One block of 16 outputs of a packed weight.
template <int B>
struct Block {
  const uint32_t* words;  // [K/32][B][16]
  int64_t words_step;     // to the next block
  const uint8_t* zeros;   // [G][16]
  const float* scales;    // [G] rows, `stride` apart
  int64_t stride;
  const int32_t* g_idx;
  int64_t group_size;

  Block(const QuantWeight& w, int64_t block)
      : words(static_cast<const uint32_t*>(w.packed) +
              block * (w.format.in_features / 32) * B * 16),
        words_step(w.format.in_features / 32 * B * 16),
        zeros(static_cast<const uint8_t*>(w.packed) + packed_zeros_offset(w.format) +
              block * w.format.groups() * kBlockN),
        scales(w.scales.data == nullptr ? nullptr : w.scales.data + block * kBlockN),
        stride(w.scales.stride),
        g_idx(w.g_idx),
        group_size(w.format.group_size == -1 ? w.format.in_features : w.format.group_size) {}

  const uint32_t* tile_words(int64_t tile) const { return words + tile * B * kBlockN; }
  Vec zero(int64_t g, int lane) const { return Vec::from_bytes(zeros + g * kBlockN + lane); }
  Vec scale(int64_t g, int lane) const { return Vec::load(scales + g * stride + lane); }
};

// Values of the 32 inputs of a tile for one vector of outputs: f(i, s (q - z)).
template <int B, typename F>
LOWBITCORE_INLINE void for_each_weight(const Block<B>& block, int64_t tile, int lane, const F& f) {
  const int64_t k0 = tile * kTileK;
  const uint32_t* words = block.tile_words(tile) + lane;
  if (block.g_idx == nullptr) {
    const int64_t g = k0 / block.group_size;
    const Vec s = block.scale(g, lane);
    for_each_difference(words, Zeros<B>(block.zero(g, lane)),
                        [&](int i, const Vec& d) LOWBITCORE_LAMBDA { f(i, d * s); });
  } else {
    for_each_code<B>(words, [&](int i, const Vec& q) LOWBITCORE_LAMBDA {
      const int64_t g = block.g_idx[k0 + i];
      f(i, (q - block.zero(g, lane)) * block.scale(g, lane));
    });
  }
}

// ---- bytes ----
//
// Levels that define LOWBITCORE_DIGITS multiply integers of four inputs at a time, see digits.h.

constexpr int kDigits = 4;          // bytes of an activation
constexpr int kFours = kTileK / 4;  // of inputs, in a tile

// The width of a layer becomes a constant of the kernel.
template <typename F>
inline void with_bits(int bits, const F& f) {
  switch (bits) {
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 8:
      return f(std::integral_constant<int, 8>());
  }
  unsupported_bits(bits);
}

}  // namespace
}  // namespace lowbitcore
