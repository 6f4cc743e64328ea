// The execution layout of the CUDA backend: one copy of the integers that the forward product, the
// transposed product and the gradient of the scales all read without bank conflicts.
//
// W [N,K] is cut into tiles of 32 outputs x 32 inputs, ordered [N/32][K/32]; a tile is
// 128 * bits bytes. It holds 32 units of 4 outputs x 8 inputs, chosen so that a unit is what one
// thread of a warp needs for the B operand of mma.m16n8k16, in either direction:
//
//   outputs of unit row `ob` (0..7): 16 (ob / 4) + 2 (ob % 4) + {0, 8, 1, 9},   o = 0..3
//   inputs of unit column `ib` (0..3): 2 ib + 8 m + e,                          m = 0..3, e = 0..1
//
// Forward, thread (g, t) of a warp (g = lane / 4, t = lane % 4) takes unit (g, t): pairs over e are
// two neighbours in K. Transposed, it takes unit (t, g % 4) of one of two tiles: pairs over
// o = (0, 2) and (1, 3) are two neighbours in N. The gradient of the scales reads the words that
// belong to its accumulators.
//
// A field (o, m, e) of b bits lies in the 32-bit word and at the bit that `locate` gives: e always
// selects the 16-bit half, so that one instruction masks a pair out. 3-bit fields are split in two
// planes, their low 2 bits stored as 2-bit fields and their high bit in a word of its own; 8-bit
// fields fill two planes of 16 bytes a unit. Where a unit lies in its tile is permuted so that
// neither direction has bank conflicts: tiles are copied to shared memory as they are.
//
// The zeros follow the integers: bytes [G,N].
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbitcore::cuda {

constexpr int kTile = 32;  // outputs and inputs of a tile

template <int kBits>
constexpr int kTileBytes = kTile * kTile / 8 * kBits;

__host__ __device__ constexpr std::size_t zeros_offset(int bits, std::int64_t n, std::int64_t k) {
  return static_cast<std::size_t>(n * k / 8 * bits);
}

// The position of unit (ob, ib) in its tile; `odd` is the parity of the tile's number along K.
__host__ __device__ constexpr int unit_position(int ob, int ib, int odd) {
  return ((ob ^ (odd << 2)) << 2) + (ib ^ (ob & 2));
}

// Where the field of W[n,k] lies: `word` counts 32-bit words from the start of the packed weight,
// `bit` is its lowest bit. For 3 bits this is the low part; the high bit is at `high_word`,
// `high_bit`.
struct FieldPlace {
  std::size_t word;
  int bit;
  std::size_t high_word;
  int high_bit;
};

__host__ __device__ constexpr FieldPlace locate(int bits, std::int64_t k_total, std::int64_t n,
                                                std::int64_t k) {
  const std::int64_t k_tile = k / kTile;
  const int row = static_cast<int>(n % kTile), column = static_cast<int>(k % kTile);
  const int ob = (row / 16) * 4 + (row % 8) / 2, o = (row % 2) * 2 + row % 16 / 8;
  const int ib = column / 2 % 4, m = column / 8, e = column % 2;
  const int u = unit_position(ob, ib, static_cast<int>(k_tile % 2));
  const std::size_t tile =
      static_cast<std::size_t>((n / kTile) * (k_total / kTile) + k_tile) * kTile * bits;
  switch (bits) {
    case 2:
      return {tile + u * 2 + o / 2, 8 * (o % 2) + 2 * m + 16 * e, 0, 0};
    case 3:
      return {tile + u * 2 + o / 2, 8 * (o % 2) + 2 * m + 16 * e, tile + 64 + u,
              8 * (o / 2) + o % 2 + 2 * m + 16 * e};
    case 4:
      return {tile + u * 4 + o, 4 * m + 16 * e, 0, 0};
    default:
      return {tile + (m / 2) * 128 + u * 4 + o, 8 * (m % 2) + 16 * e, 0, 0};
  }
}

__host__ __device__ inline std::uint32_t load_field(const std::uint32_t* packed, int bits,
                                                    std::int64_t k_total, std::int64_t n,
                                                    std::int64_t k) {
  const FieldPlace at = locate(bits, k_total, n, k);
  if (bits != 3) return packed[at.word] >> at.bit & ((1u << bits) - 1u);
  return (packed[at.word] >> at.bit & 3u) | (packed[at.high_word] >> at.high_bit & 1u) << 2;
}

}  // namespace lowbitcore::cuda
