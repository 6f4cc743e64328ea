// Fields of a canonical tensor: an LSB-first bit stream over 32-bit words.
#pragma once

#include <lowbitcore/types.h>

#include <cstring>

#ifdef __CUDACC__
#define LOWBITCORE_ANYWHERE __host__ __device__
#else
#define LOWBITCORE_ANYWHERE
#endif

namespace lowbitcore {

// Field i of an LSB-first bit stream whose 32-bit words lie `step` apart.
LOWBITCORE_ANYWHERE inline std::uint32_t get_field(const std::int32_t* words, std::int64_t step,
                                                   std::int64_t i, int bits) {
  const std::int64_t bit = i * bits;
  const std::int64_t word = bit / 32;
  const int shift = static_cast<int>(bit % 32);
  std::uint32_t value = static_cast<std::uint32_t>(words[word * step]) >> shift;
  if (shift + bits > 32) {
    value |= static_cast<std::uint32_t>(words[(word + 1) * step]) << (32 - shift);
  }
  return value & ((1u << bits) - 1u);
}

// Adds a field to a stream that was zeroed before.
inline void put_field(std::int32_t* words, std::int64_t step, std::int64_t i, int bits,
                      std::uint32_t value) {
  const std::int64_t bit = i * bits;
  const std::int64_t word = bit / 32;
  const int shift = static_cast<int>(bit % 32);
  words[word * step] |= static_cast<std::int32_t>(value << shift);
  if (shift + bits > 32) {
    words[(word + 1) * step] |= static_cast<std::int32_t>(value >> (32 - shift));
  }
}

template <typename T>
void zero(const View<T>& view) {
  for (std::int64_t r = 0; r < view.rows; ++r) {
    std::memset(view.data + r * view.stride, 0, static_cast<std::size_t>(view.cols) * sizeof(T));
  }
}

}  // namespace lowbitcore
