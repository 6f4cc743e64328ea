// The GPTQ interchange layout, and the private layout that kernels execute from.
//
// qweight int32 [K*bits/32, N]: the integers of one column are an LSB-first bit stream along K.
// qzeros  int32 [G, N*bits/32]: the zeros of one group are such a stream along N. They hold z
// itself (the "gptq_v2" convention); the older files that hold z - 1 are translated by whoever
// reads files.
#pragma once

#include <lowbitcore/format.h>
#include <lowbitcore/types.h>

namespace lowbitcore {

// codes [N,K] uint8 -> qweight, and back. A code that does not fit `bits` is an error.
void pack_qweight(View<const std::uint8_t> codes, int bits, View<std::int32_t> qweight);
void unpack_qweight(View<const std::int32_t> qweight, int bits, View<std::uint8_t> codes);

// zeros [G,N] uint8 -> qzeros, and back.
void pack_qzeros(View<const std::uint8_t> zeros, int bits, View<std::int32_t> qzeros);
void unpack_qzeros(View<const std::int32_t> qzeros, int bits, View<std::uint8_t> zeros);

// Interchange layout -> execution layout of the device (packed_size(format) bytes, the same on
// all), and bit-exactly back.
void prepack(const QuantFormat& format, View<const std::int32_t> qweight,
             View<const std::int32_t> qzeros, void* packed, const Execution& exec = {});
void unpack(const QuantFormat& format, const void* packed, View<std::int32_t> qweight,
            View<std::int32_t> qzeros, const Execution& exec = {});

}  // namespace lowbitcore
