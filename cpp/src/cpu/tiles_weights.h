// Packed integers as tiles of bf16 weights, by tables.
//
// A weight of B bits takes one of 2^B values for an output and group. They are computed once a
// group, scaled and rounded to bf16, and looked up from then on: once integers lie in the low bits
// of 16-bit lanes, one instruction turns 32 of them into weights. As a table serves one output, a
// row of a tile holds inputs of one output (W as a left operand) or those of two outputs in turn
// (W as a right operand).
#pragma once

#include "tiles.h"

namespace lowbitcore {
namespace {

// ---- integers ----

// Words of 16 outputs so that 128 bits hold those of one: output 4 L + i is rows[i], lane L.
LOWBITCORE_INLINE void outputs_to_lanes(__m512i a, __m512i b, __m512i c, __m512i d,
                                        __m512i (&rows)[4]) {
  const __m512i ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
  const __m512i cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
  rows[0] = _mm512_unpacklo_epi64(ab0, cd0);
  rows[1] = _mm512_unpackhi_epi64(ab0, cd0);
  rows[2] = _mm512_unpacklo_epi64(ab1, cd1);
  rows[3] = _mm512_unpackhi_epi64(ab1, cd1);
}

// The 32 integers of every output of a tile. Those of 2 bits come twice, those of 3 bits as two
// halves of 64 bits with the middle word in both.
template <int B>
LOWBITCORE_INLINE void load_outputs(const uint32_t* words, __m512i (&rows)[4]) {
  static_assert(B <= 4, "wider ones take more than 128 bits");
  __m512i w[B];
  for (int r = 0; r < B; ++r) w[r] = _mm512_loadu_si512(words + r * kBlockN);
  if constexpr (B == 2) outputs_to_lanes(w[0], w[1], w[0], w[1], rows);
  if constexpr (B == 3) outputs_to_lanes(w[0], w[1], w[1], w[2], rows);
  if constexpr (B == 4) outputs_to_lanes(w[0], w[1], w[2], w[3], rows);
}

struct alignas(64) Lanes16 {
  uint16_t lane[32];
};

struct alignas(64) Lanes32 {
  int32_t lane[16];
};

// Which input's integer ends up in 16-bit lane j of an output's row.
template <int B>
constexpr int input_in_lane(int j) {
  if (B == 2) return 8 * (j % 4) + j / 4;
  if (B == 3) return j / 4 % 2 * 16 + j / 8 * 4 + j % 4;
  if (B == 4) return 4 * (j % 8) + j / 8;
  return j;
}

template <int B>
constexpr Lanes16 inputs_in_lanes() {
  Lanes16 inputs = {};
  for (int j = 0; j < 32; ++j) inputs.lane[j] = static_cast<uint16_t>(input_in_lane<B>(j));
  return inputs;
}

template <int B>
constexpr Lanes16 row_shifts() {
  Lanes16 shifts = {};
  for (int j = 0; j < 32; ++j) {
    const int bit = B * input_in_lane<B>(j);
    // Of 3 bits: from the start of a half, the second of which starts at bit 32; for both bytes.
    shifts.lane[j] = static_cast<uint16_t>(B == 3 ? (bit - j / 4 % 2 * 32) * 0x101 : bit % 16);
  }
  return shifts;
}

// An output's integers in the low bits of 16-bit lanes; above them lies anything.
template <int B>
LOWBITCORE_INLINE __m512i row_of(__m512i output) {
  static constexpr Lanes16 kShifts = row_shifts<B>();
  const __m512i shifts = _mm512_load_si512(&kShifts);
  if constexpr (B == 3) {
    return _mm512_multishift_epi64_epi8(shifts, output);
  } else {
    return _mm512_srlv_epi16(output, shifts);
  }
}

// ---- the weights of 16 outputs in a group ----

constexpr int64_t kMostTiles = 18;  // that are dequantised at once
static_assert(kMostTiles >= kPieceSteps, "runs of tiles");

LOWBITCORE_INLINE __m512i four_times(const uint32_t* lane) {
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(lane)));
}

// Exact ones are without their scales: differences of integers, which bf16 holds.
enum class Values { kExact, kScaled };

template <Values V>
inline Vec scales_of(const Vec& scales) {
  return V == Values::kScaled ? scales : Vec::broadcast(1.0f);
}

// Looked up.
template <int B, Values V = Values::kScaled>
struct GroupWeights {
  alignas(64) uint16_t table[kBlockN][16];

  void fill(const Block<B>& block, int64_t g) {
    alignas(64) float scale[kBlockN], zero[kBlockN];
    scales_of<V>(block.scale(g, 0)).store(scale);
    block.zero(g, 0).store(zero);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const Vec q = {_mm512_cvtepi32_ps(_mm512_and_si512(lanes, _mm512_set1_epi32((1 << B) - 1)))};
    const auto weights = [&](int n) LOWBITCORE_LAMBDA {
      return (q - Vec::broadcast(zero[n])) * Vec::broadcast(scale[n]);
    };
    for (int n = 0; n < kBlockN; n += 2) {
      const __m512bh both = _mm512_cvtne2ps_pbh(weights(n + 1).v, weights(n).v);
      _mm512_store_si512(table[n], reinterpret_cast<__m512i>(both));
    }
  }

  // Tiles of 16 outputs, a row each, by 32 inputs in input_in_lane's order; `apart` words from each
  // other.
  void left_tiles(const Block<B>& block, int64_t first, int64_t count, uint32_t* out,
                  int64_t apart) const {
    // Through memory: loading from it is how a lane gets everywhere for nothing.
    alignas(64) uint32_t lanes[kMostTiles][4][16];
    for (int64_t t = 0; t < count; ++t) {
      __m512i r[4];
      load_outputs<B>(block.tile_words(first + t), r);
      for (int i = 0; i < 4; ++i) _mm512_store_si512(lanes[t][i], r[i]);
    }
    for (int64_t t = 0; t < count; ++t) {
      rows(lanes[t], out + t * apart, std::make_integer_sequence<int, 16>());
    }
  }

  template <int... N>
  LOWBITCORE_INLINE void rows(const uint32_t (&lanes)[4][16], uint32_t* out,
                              std::integer_sequence<int, N...>) const {
    (row<N>(four_times(lanes[N % 4] + N / 4 * 4), out), ...);
  }

  template <int N>
  LOWBITCORE_INLINE void row(__m512i output, uint32_t* out) const {
    const auto* entries = reinterpret_cast<const __m256i*>(table[N]);
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_load_si256(entries));
    _mm512_store_si512(out + N * 16, _mm512_permutexvar_epi16(row_of<B>(output), twice));
  }

  // Steps of 8 pairs of outputs by 32 inputs, 16 in each of two tiles, in the order of column_of;
  // `apart` words from each other.
  void right_tiles(const Block<B>& block, int64_t first, int64_t count, uint32_t* out,
                   int64_t apart) const {
    alignas(64) uint32_t lanes[kMostTiles][4][16];
    for (int64_t t = 0; t < count; ++t) {
      __m512i r[4];
      load_outputs<B>(block.tile_words(first + t), r);
      for (int i = 0; i < 4; i += 2) {
        const bool in_turn = B != 3;
        const __m512i low = in_turn ? _mm512_unpacklo_epi16(r[i], r[i + 1]) : r[i];
        const __m512i high = in_turn ? _mm512_unpackhi_epi16(r[i], r[i + 1]) : r[i + 1];
        _mm512_store_si512(lanes[t][i], low);
        _mm512_store_si512(lanes[t][i + 1], high);
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      pairs(lanes[t], out + t * apart, std::make_integer_sequence<int, 8>());
    }
  }

  template <int... P>
  LOWBITCORE_INLINE void pairs(const uint32_t (&lanes)[4][16], uint32_t* out,
                               std::integer_sequence<int, P...>) const {
    (pair<P>(four_times(lanes[P % 2 * 2] + P / 2 * 4), four_times(lanes[P % 2 * 2 + 1] + P / 2 * 4),
             out),
     ...);
  }

  // low and high: of 3 bits the integers of one output each, else words of both in turn.
  template <int P>
  LOWBITCORE_INLINE void pair(__m512i low, __m512i high, uint32_t* out) const {
    if constexpr (B == 3) {
      const __m512i even = row_of<B>(low), odd = row_of<B>(high);
      look_up<P>(_mm512_unpacklo_epi16(even, odd), out);
      look_up<P>(_mm512_unpackhi_epi16(even, odd), out + kTileWords);
    } else {
      // The q-th 128 bits take the q-th integer of a word.
      const __m512i q = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
      const __m512i by = _mm512_mullo_epi32(q, _mm512_set1_epi32(B * 0x10001));
      const __m512i left = _mm512_srlv_epi16(low, by);
      look_up<P>(left, out);
      look_up<P>(B == 2 ? _mm512_srli_epi16(left, 8) : _mm512_srlv_epi16(high, by),
                 out + kTileWords);
    }
  }

  // The second output's table is the upper half of the register.
  template <int P>
  LOWBITCORE_INLINE void look_up(__m512i integers, uint32_t* out) const {
    const __m512i low = _mm512_set1_epi16(15), upper = _mm512_set1_epi32(16 << 16);
    constexpr int kAndOr = 0xea;
    const __m512i entries = _mm512_ternarylogic_epi32(integers, low, upper, kAndOr);
    const __m512i both = _mm512_load_si512(table[2 * P]);
    _mm512_store_si512(out + P * 16, _mm512_permutexvar_epi16(entries, both));
  }
};

// Computed: 256 values are too many for a register.
template <Values V>
struct GroupWeights<8, V> {
  alignas(64) float scale[kBlockN], zero[kBlockN];

  void fill(const Block<8>& block, int64_t g) {
    scales_of<V>(block.scale(g, 0)).store(scale);
    block.zero(g, 0).store(zero);
  }

  LOWBITCORE_INLINE Vec weights(const uint8_t* codes, int n) const {
    return (Vec::from_bytes(codes) - Vec::broadcast(zero[n])) * Vec::broadcast(scale[n]);
  }

  // A tile's integers by output: inputs 0 to 15, then 16 to 31.
  struct Codes {
    alignas(64) uint8_t half[2][4][4][16];  // [half][n % 4][n / 4]

    Codes(const Block<8>& block, int64_t tile) {
      const uint32_t* words = block.tile_words(tile);
      for (int h = 0; h < 2; ++h) {
        __m512i w[4], lanes[4];
        for (int r = 0; r < 4; ++r) w[r] = _mm512_loadu_si512(words + (4 * h + r) * kBlockN);
        outputs_to_lanes(w[0], w[1], w[2], w[3], lanes);
        for (int i = 0; i < 4; ++i) _mm512_store_si512(half[h][i], lanes[i]);
      }
    }

    const uint8_t* of(int h, int n) const { return half[h][n % 4][n / 4]; }
  };

  void left_tiles(const Block<8>& block, int64_t first, int64_t count, uint32_t* out,
                  int64_t apart) const {
    for (int64_t t = 0; t < count; ++t, out += apart) {
      const Codes codes(block, first + t);
      for (int n = 0; n < kBlockN; ++n) {
        const Vec low = weights(codes.of(0, n), n), high = weights(codes.of(1, n), n);
        const __m512bh row = _mm512_cvtne2ps_pbh(high.v, low.v);
        _mm512_store_si512(out + n * 16, reinterpret_cast<__m512i>(row));
      }
    }
  }

  void right_tiles(const Block<8>& block, int64_t first, int64_t count, uint32_t* out,
                   int64_t apart) const {
    for (int64_t t = 0; t < count; ++t, out += apart) {
      const Codes codes(block, first + t);
      for (int n = 0; n < kBlockN; n += 2) {
        for (int h = 0; h < 2; ++h) {
          bf16_pairs(weights(codes.of(h, n), n), weights(codes.of(h, n + 1), n + 1))
              .store(out + h * kTileWords + n / 2 * 16);
        }
      }
    }
  }
};

// Where column k of 32 comes to lie in the two tiles of GroupWeights<B>::right_tiles.
template <int B>
constexpr int column_of(int k) {
  if (B == 2) return k / 4 % 2 * 16 + k % 4 * 4 + k / 8;
  if (B == 4) return k / 16 * 16 + k % 4 * 4 + k % 16 / 4;
  return k;
}

template <int B>
constexpr Lanes32 columns_in_lanes(int half) {
  Lanes32 lanes = {};
  for (int i = 0; i < 16; ++i) lanes.lane[i] = column_of<B>(16 * half + i);
  return lanes;
}

constexpr int64_t kRowAhead = 512;  // bytes; rows lie beyond what the processor prefetches itself

// Rows as a right operand, inputs in the order of GroupWeights<B>::left_tiles.
template <int B>
void pack_right(const ConstMatrix& x, int64_t first, int64_t rows, int64_t step, int64_t steps,
                uint32_t* out) {
  static constexpr Lanes16 kInputs = inputs_in_lanes<B>();
  const __m512i inputs = _mm512_load_si512(&kInputs);
  for (int64_t half = 0; half < kStrip; half += 16) {
    const char* row0 = row_pointer(x, first + half) + step * 64;
    for (int64_t s = 0; s < steps; ++s) {
      __m512 r[16];
      for (int64_t i = 0; i < 16; ++i) {
        __m512i row = _mm512_setzero_si512();
        if (half + i < rows) {
          const char* at = row0 + i * x.stride * 2 + s * 64;
          row = _mm512_loadu_si512(at);
          __builtin_prefetch(at + kRowAhead);
        }
        r[i] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(inputs, row));
      }
      transpose_16x16(r);
      for (int i = 0; i < 16; ++i) _mm512_store_ps(out + s * kStepWords + half * 16 + i * 16, r[i]);
    }
  }
}

// Calls f(first tile, tiles, weights) for the tiles of a block, those of a group together.
template <int B, typename F>
LOWBITCORE_INLINE void for_each_group(const Block<B>& block, int64_t first, int64_t count,
                                      const F& f) {
  const int64_t group_tiles = block.group_size / kTileK;
  GroupWeights<B> weights;
  for (int64_t tile = first; tile < first + count;) {
    const int64_t g = tile / group_tiles;
    const int64_t end = smaller((g + 1) * group_tiles, first + count);
    weights.fill(block, g);
    f(tile, end - tile, weights);
    tile = end;
  }
}

// Asks for a tile and what its group needs; harmless past the end of a weight.
template <int B>
LOWBITCORE_INLINE void prefetch_weights(const Block<B>& block, int64_t tile) {
  const int64_t g = tile * kTileK / block.group_size;
  prefetch_tile(block, tile, 0);
  if (tile * kTileK % block.group_size == 0) {
    __builtin_prefetch(block.scales + g * block.stride);
    __builtin_prefetch(block.zeros + g * kBlockN);
  }
}

}  // namespace
}  // namespace lowbitcore
