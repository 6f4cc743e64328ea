// The quantized format of one linear layer: W[n,k] ~ s[g,n] * (q[n,k] - z[g,n]).
#pragma once

#include <lowbitcore/types.h>

#include <cstddef>
#include <cstdint>

namespace lowbitcore {

// in_features (K) and out_features (N) are multiples of 32; bits is 2, 3, 4 or 8; group_size is a
// multiple of 32 along K, or -1 for the whole row. The last group may be shorter. All at most 2^30,
// features on CUDA at most 2^22.
struct QuantFormat {
  int bits = 4;
  std::int64_t group_size = 128;
  std::int64_t in_features = 0;
  std::int64_t out_features = 0;

  std::int64_t groups() const { return group_size <= 0 ? 1 : (in_features - 1) / group_size + 1; }
};

// A packed weight as the kernels read it. `packed` comes from prepack(), and lies at a multiple of
// 16 bytes on CUDA; `scales` [G,N] fp32 stays outside because it trains. `g_idx` [K] maps an input
// column to its group; null means k / group_size.
struct QuantWeight {
  QuantFormat format;
  const void* packed = nullptr;
  View<const float> scales;
  const std::int32_t* g_idx = nullptr;
};

// Bytes that prepack() writes for this format: K*N*bits/8 for the integers and G*N for the zeros.
std::size_t packed_size(const QuantFormat& format);

}  // namespace lowbitcore
