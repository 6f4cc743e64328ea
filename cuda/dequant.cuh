// From the integers of a unit (layout.cuh) to the operands of mma, two weights at a time.
//
// A field is masked into the mantissa of a power of two (1024 in fp16, 128 in bf16), which makes it
// a number without any conversion; one fused multiply-add then takes the power of two and the zero
// point away and undoes the field's shift, exactly. q - z is therefore exact, and the one
// multiplication by the scale is the only rounding: the operand is what dense dequantization gives.
#pragma once

#include "layout.cuh"
#include "ptx.cuh"

namespace lowbitcore::cuda {

// Four words from shared memory.
__device__ __forceinline__ void load_words(std::uint32_t (&w)[4], std::uint32_t shared) {
  const uint4 v = ptx::load_shared_128(shared);
  w[0] = v.x;
  w[1] = v.y;
  w[2] = v.z;
  w[3] = v.w;
}

// From words whose halves are two inputs to words whose halves are two outputs: of each input, the
// outputs of words i and i + half the count.
__device__ __forceinline__ void transpose_words(std::uint32_t (&w)[2]) {
  const std::uint32_t a = w[0], b = w[1];
  w[0] = ptx::prmt(a, b, 0x5410);
  w[1] = ptx::prmt(a, b, 0x7632);
}

__device__ __forceinline__ void transpose_words(std::uint32_t (&w)[4]) {
  const std::uint32_t a = w[0], b = w[1], c = w[2], d = w[3];
  w[0] = ptx::prmt(a, c, 0x5410);
  w[1] = ptx::prmt(b, d, 0x5410);
  w[2] = ptx::prmt(a, c, 0x7632);
  w[3] = ptx::prmt(b, d, 0x7632);
}

// The integers that one thread multiplies with. Four columns c of four pairs m each: forward, c is
// the output o and a pair is two neighbouring inputs (e = 0, 1); after transpose(), c = 2 e + i and
// a pair is two neighbouring outputs, o = (0, 2) for i = 0 and (1, 3) for i = 1. With `half`, only
// pairs 2 half and 2 half + 1 are wanted, and become pairs 0 and 1.
template <int kBits>
struct Unit;

template <>
struct Unit<2> {
  std::uint32_t w[2];

  __device__ __forceinline__ Unit(std::uint32_t tile, int u) {
    const uint2 v = ptx::load_shared_64(tile + u * 8);
    w[0] = v.x;
    w[1] = v.y;
  }
  __device__ __forceinline__ Unit(std::uint32_t tile, int u, int half) : Unit(tile, u) {
    w[0] >>= 4 * half;
    w[1] >>= 4 * half;
  }
  __device__ __forceinline__ void transpose() { transpose_words(w); }
};

template <>
struct Unit<3> {
  std::uint32_t w[2], high[2];  // the high bits of columns 0, 1 and of 2, 3, from bit 0 on

  __device__ __forceinline__ Unit(std::uint32_t tile, int u) {
    const uint2 v = ptx::load_shared_64(tile + u * 8);
    w[0] = v.x;
    w[1] = v.y;
    high[0] = ptx::load_shared_32(tile + 256 + u * 4);
    high[1] = high[0] >> 8;
  }
  __device__ __forceinline__ Unit(std::uint32_t tile, int u, int half) : Unit(tile, u) {
    w[0] >>= 4 * half;
    w[1] >>= 4 * half;
    high[0] >>= 4 * half;
    high[1] = high[0] >> 8;
  }
  __device__ __forceinline__ void transpose() {
    const std::uint32_t h = high[0];
    transpose_words(w);
    high[0] = ptx::prmt(h, 0, 0x4140);
    high[1] = ptx::prmt(h, 0, 0x4342);
  }
};

template <>
struct Unit<4> {
  std::uint32_t w[4];

  __device__ __forceinline__ Unit(std::uint32_t tile, int u) { load_words(w, tile + u * 16); }
  __device__ __forceinline__ Unit(std::uint32_t tile, int u, int half) : Unit(tile, u) {
#pragma unroll
    for (int o = 0; o < 4; ++o) w[o] >>= 8 * half;
  }
  __device__ __forceinline__ void transpose() { transpose_words(w); }
};

template <>
struct Unit<8> {
  std::uint32_t w[2][4];  // pairs m = 0, 1 and m = 2, 3

  __device__ __forceinline__ Unit(std::uint32_t tile, int u) {
    load_words(w[0], tile + u * 16);
    load_words(w[1], tile + 512 + u * 16);
  }
  __device__ __forceinline__ Unit(std::uint32_t tile, int u, int half) : w{} {
    load_words(w[0], tile + half * 512 + u * 16);
  }
  __device__ __forceinline__ void transpose() {
    transpose_words(w[0]);
    transpose_words(w[1]);
  }
};

// The same 16-bit pattern in both halves.
__host__ __device__ constexpr std::uint32_t twice(std::uint32_t half) { return half << 16 | half; }

// Patterns of 16-bit numbers: an even power of two above which a field is read, the numbers 2^-p
// and base - base / 2^p that undo a shift by p, and how many bits of a half word are read without a
// shift of the word: fp16 has 10 bits of mantissa for them, bf16 has 7, and the third bit of a
// 3-bit field needs one more than these.
template <typename T>
struct Pattern;

template <>
struct Pattern<__half> {
  static constexpr std::uint32_t kBase = 0x6400;  // 1024
  static constexpr int kReadBits = 8;
  static constexpr std::uint32_t kMinusOne = 0xbc00;
  static constexpr std::uint32_t kMinusZero = 0x8000;
  __host__ __device__ static constexpr std::uint32_t power(int p) { return (15u - p) << 10; }
  // 1024 - 1024 / 2^p: 0, 768, 960, 1008 for p = 0, 2, 4, 6.
  __host__ __device__ static constexpr std::uint32_t lift(int p) {
    return p == 0 ? 0x8000 : p == 2 ? 0x6200 : p == 4 ? 0x6380 : 0x63e0;
  }
};

template <>
struct Pattern<__nv_bfloat16> {
  static constexpr std::uint32_t kBase = 0x4300;  // 128
  static constexpr int kReadBits = 4;
  static constexpr std::uint32_t kMinusOne = 0xbf80;
  static constexpr std::uint32_t kMinusZero = 0x8000;
  __host__ __device__ static constexpr std::uint32_t power(int p) { return (127u - p) << 7; }
  // 128 - 128 / 2^p: 0, 96 for p = 0, 2.
  __host__ __device__ static constexpr std::uint32_t lift(int p) {
    return p == 0 ? 0x8000 : 0x42c0;
  }
};

// How many places of a word the fields of a column are read at without a shift of the word, and how
// far these are apart; 3-bit fields lie in a plane of 2 bits.
template <int kBits, typename T>
struct Places {
  static constexpr int kStep = kBits == 3 ? 2 : kBits;
  static constexpr int kCount = Pattern<T>::kReadBits / kStep;
};

// What takes the zero points of a pair away: -(base / 2^p + z) for each place p.
template <int kBits, typename T>
struct ZeroPair {
  std::uint32_t c[Places<kBits, T>::kCount];

  ZeroPair() = default;
  // Bytes of `zeros` chosen by `selector` = 0x4j4i: z[i] for the lower half, z[j] for the upper.
  __device__ __forceinline__ ZeroPair(std::uint32_t zeros, std::uint32_t selector) {
    const std::uint32_t raised =
        ptx::prmt(zeros, twice(Pattern<T>::kBase >> 8) * 0x0101u, selector);
#pragma unroll
    for (int i = 0; i < Places<kBits, T>::kCount; ++i) {
      c[i] = ptx::fma2(raised, twice(Pattern<T>::kMinusOne),
                       twice(Pattern<T>::lift(i * Places<kBits, T>::kStep)), T());
    }
  }
};

// bf16 has no room for 8 bits above 128: the two halves of a field are read for themselves.
template <>
struct ZeroPair<8, __nv_bfloat16> {
  std::uint32_t low, high;

  ZeroPair() = default;
  __device__ __forceinline__ ZeroPair(std::uint32_t zeros, std::uint32_t selector) {
    const std::uint32_t z = ptx::prmt(zeros, 0, selector);
    const std::uint32_t base = twice(0x4300), minus = twice(0xbf80), nothing = twice(0x8000);
    low = ptx::fma2(ptx::lop3<ptx::kAndOr>(z, twice(0x0f), base), minus, nothing, __nv_bfloat16());
    high = ptx::fma2(ptx::lop3<ptx::kAndOr>(z >> 4, twice(0x0f), base), minus, nothing,
                     __nv_bfloat16());
  }
};

// Pair m of column c as base + (q << p), where p is kStep times m % kCount.
template <typename T>
__device__ __forceinline__ std::uint32_t raised(const Unit<4>& unit, int c, int m) {
  constexpr int kCount = Places<4, T>::kCount;
  const std::uint32_t word = unit.w[c] >> (m / kCount * kCount * 4);
  return ptx::lop3<ptx::kAndOr>(word, twice(0x0fu << (m % kCount * 4)), twice(Pattern<T>::kBase));
}

template <typename T>
__device__ __forceinline__ std::uint32_t raised(const Unit<2>& unit, int c, int m) {
  constexpr int kCount = Places<2, T>::kCount;
  const std::uint32_t word = unit.w[c / 2] >> (c % 2 * 8 + m / kCount * kCount * 2);
  return ptx::lop3<ptx::kAndOr>(word, twice(0x3u << (m % kCount * 2)), twice(Pattern<T>::kBase));
}

template <typename T>
__device__ __forceinline__ std::uint32_t raised(const Unit<3>& unit, int c, int m) {
  constexpr int kCount = Places<3, T>::kCount;
  const int p = m % kCount * 2, skipped = m / kCount * kCount * 2;
  const std::uint32_t word = unit.w[c / 2] >> (c % 2 * 8 + skipped);
  const std::uint32_t low =
      ptx::lop3<ptx::kAndOr>(word, twice(0x3u << p), twice(Pattern<T>::kBase));
  // The high bit lies at c % 2 + 2 m and belongs at p + 2.
  const int right = c % 2 + skipped - 2;
  const std::uint32_t bits = right < 0 ? unit.high[c / 2] << -right : unit.high[c / 2] >> right;
  return ptx::lop3<ptx::kOrAnd>(low, bits, twice(0x4u << p));
}

template <typename T>
__device__ __forceinline__ std::uint32_t raised(const Unit<8>& unit, int c, int m) {
  return ptx::prmt(unit.w[m / 2][c], twice(Pattern<T>::kBase >> 8) * 0x0101u,
                   m % 2 == 0 ? 0x4240 : 0x4341);
}

// q - z of pair m of column c, exactly.
template <int kBits, typename T>
__device__ __forceinline__ std::uint32_t centred(const Unit<kBits>& unit, int c, int m,
                                                 const ZeroPair<kBits, T>& zero) {
  const int i = m % Places<kBits, T>::kCount;
  return ptx::fma2(raised<T>(unit, c, m), twice(Pattern<T>::power(i * Places<kBits, T>::kStep)),
                   zero.c[i], T());
}

__device__ __forceinline__ std::uint32_t centred(const Unit<8>& unit, int c, int m,
                                                 const ZeroPair<8, __nv_bfloat16>& zero) {
  using T = __nv_bfloat16;
  const std::uint32_t base = twice(0x4300), one = twice(0x3f80), sixteen = twice(0x4180);
  const std::uint32_t word = unit.w[m / 2][c] >> (m % 2 * 8);
  const std::uint32_t low =
      ptx::fma2(ptx::lop3<ptx::kAndOr>(word, twice(0x0f), base), one, zero.low, T());
  const std::uint32_t high =
      ptx::fma2(ptx::lop3<ptx::kAndOr>(word >> 4, twice(0x0f), base), one, zero.high, T());
  return ptx::fma2(high, sixteen, low, T());
}

// The scales of a pair of weights, each as a sum of two 16-bit numbers: rounding the scale itself
// would cost as much accuracy again as rounding the weight does.
template <typename T>
struct ScalePair {
  std::uint32_t scale, rest;

  ScalePair() = default;
  __device__ __forceinline__ ScalePair(std::uint32_t scale, std::uint32_t rest)
      : scale(scale), rest(rest) {}
  __device__ __forceinline__ ScalePair(float low, float high) {
    scale = ptx::pack2(low, high, T());
    const float2 rounded = ptx::unpack2(scale, T());
    rest = ptx::pack2(low - rounded.x, high - rounded.y, T());
  }

  // The first of the two scales, or the second, for both weights of a pair.
  __device__ __forceinline__ ScalePair same(int which) const {
    const std::uint32_t selector = which == 0 ? 0x1010 : 0x3232;
    return ScalePair(ptx::prmt(scale, 0, selector), ptx::prmt(rest, 0, selector));
  }

  // (q - z) s, rounded once.
  __device__ __forceinline__ std::uint32_t apply(std::uint32_t pair) const {
    const std::uint32_t small = ptx::fma2(pair, rest, twice(Pattern<T>::kMinusZero), T());
    return ptx::fma2(pair, scale, small, T());
  }
};

}  // namespace lowbitcore::cuda
