// The execution layout of the CPU backend.
//
// Outputs are cut into blocks of 16. Block after block, it holds the rows of qweight restricted to
// the block's 16 columns: row r is 16 consecutive 32-bit words, one per output, so that a vector
// register loaded from it has outputs in its lanes, and 32 inputs of a block ("a tile") are `bits`
// consecutive rows. The zeros follow, unpacked to bytes: [N/16][G][16].
#pragma once

#include <lowbitcore/format.h>

namespace lowbitcore {

constexpr std::int64_t kBlockN = 16;  // outputs per block
constexpr std::int64_t kTileK = 32;   // inputs per tile

// Static: compiled into translation units with different instruction sets.
static inline std::int64_t packed_zeros_offset(const QuantFormat& format) {
  return format.in_features / 8 * format.bits * format.out_features;
}

}  // namespace lowbitcore
