#include <lowbitcore/pack.h>

#include <cstring>

#include "check.h"
#include "layout.h"

namespace lowbitcore {

namespace {

// Field i of an LSB-first bit stream whose 32-bit words lie `step` apart.
inline std::uint32_t get_field(const std::int32_t* words, std::int64_t step, std::int64_t i,
                               int bits) {
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

void check_multiple(const char* op, const char* argument, std::int64_t value) {
  if (value % 32 != 0) {
    check::fail(op, argument, "a multiple of 32", std::to_string(value));
  }
}

void check_code(const char* op, const char* argument, std::uint8_t value, int bits,
                std::int64_t row, std::int64_t col) {
  if (value >> bits != 0) {
    check::fail(
        op, argument, "values below " + std::to_string(1 << bits),
        std::to_string(value) + " at [" + std::to_string(row) + ", " + std::to_string(col) + "]");
  }
}

}  // namespace

void pack_qweight(View<const std::uint8_t> codes, int bits, View<std::int32_t> qweight) {
  const char* op = "pack_qweight";
  check::bits(op, bits);
  check_multiple(op, "codes.shape[1]", codes.cols);
  check::shape(op, "codes", codes, codes.rows, codes.cols);
  check::shape(op, "qweight", qweight, codes.cols * bits / 32, codes.rows);
  zero(qweight);
  for (std::int64_t n = 0; n < codes.rows; ++n) {
    for (std::int64_t k = 0; k < codes.cols; ++k) {
      const std::uint8_t code = codes.data[n * codes.stride + k];
      check_code(op, "codes", code, bits, n, k);
      put_field(qweight.data + n, qweight.stride, k, bits, code);
    }
  }
}

void unpack_qweight(View<const std::int32_t> qweight, int bits, View<std::uint8_t> codes) {
  const char* op = "unpack_qweight";
  check::bits(op, bits);
  check_multiple(op, "codes.shape[1]", codes.cols);
  check::shape(op, "codes", codes, codes.rows, codes.cols);
  check::shape(op, "qweight", qweight, codes.cols * bits / 32, codes.rows);
  for (std::int64_t n = 0; n < codes.rows; ++n) {
    for (std::int64_t k = 0; k < codes.cols; ++k) {
      codes.data[n * codes.stride + k] =
          static_cast<std::uint8_t>(get_field(qweight.data + n, qweight.stride, k, bits));
    }
  }
}

void pack_qzeros(View<const std::uint8_t> zeros, int bits, View<std::int32_t> qzeros) {
  const char* op = "pack_qzeros";
  check::bits(op, bits);
  check_multiple(op, "zeros.shape[1]", zeros.cols);
  check::shape(op, "zeros", zeros, zeros.rows, zeros.cols);
  check::shape(op, "qzeros", qzeros, zeros.rows, zeros.cols * bits / 32);
  zero(qzeros);
  for (std::int64_t g = 0; g < zeros.rows; ++g) {
    for (std::int64_t n = 0; n < zeros.cols; ++n) {
      const std::uint8_t z = zeros.data[g * zeros.stride + n];
      check_code(op, "zeros", z, bits, g, n);
      put_field(qzeros.data + g * qzeros.stride, 1, n, bits, z);
    }
  }
}

void unpack_qzeros(View<const std::int32_t> qzeros, int bits, View<std::uint8_t> zeros) {
  const char* op = "unpack_qzeros";
  check::bits(op, bits);
  check_multiple(op, "zeros.shape[1]", zeros.cols);
  check::shape(op, "zeros", zeros, zeros.rows, zeros.cols);
  check::shape(op, "qzeros", qzeros, zeros.rows, zeros.cols * bits / 32);
  for (std::int64_t g = 0; g < zeros.rows; ++g) {
    for (std::int64_t n = 0; n < zeros.cols; ++n) {
      zeros.data[g * zeros.stride + n] =
          static_cast<std::uint8_t>(get_field(qzeros.data + g * qzeros.stride, 1, n, bits));
    }
  }
}

std::size_t packed_size(const QuantFormat& format) {
  check::format("packed_size", format);
  return static_cast<std::size_t>(packed_zeros_offset(format) +
                                  format.groups() * format.out_features);
}

void prepack(const QuantFormat& format, View<const std::int32_t> qweight,
             View<const std::int32_t> qzeros, void* packed) {
  const char* op = "prepack";
  check::format(op, format);
  const std::int64_t n = format.out_features, groups = format.groups();
  check::shape(op, "qweight", qweight, format.in_features * format.bits / 32, n);
  check::shape(op, "qzeros", qzeros, groups, n * format.bits / 32);
  auto* words = static_cast<char*>(packed);
  for (std::int64_t row = 0; row < qweight.rows; ++row) {
    for (std::int64_t block = 0; block < n / kBlockN; ++block) {
      std::memcpy(words + (block * qweight.rows + row) * kBlockN * 4,
                  qweight.data + row * qweight.stride + block * kBlockN, kBlockN * 4);
    }
  }
  auto* zeros = static_cast<std::uint8_t*>(packed) + packed_zeros_offset(format);
  for (std::int64_t g = 0; g < groups; ++g) {
    for (std::int64_t i = 0; i < n; ++i) {
      zeros[((i / kBlockN) * groups + g) * kBlockN + i % kBlockN] =
          static_cast<std::uint8_t>(get_field(qzeros.data + g * qzeros.stride, 1, i, format.bits));
    }
  }
}

void unpack(const QuantFormat& format, const void* packed, View<std::int32_t> qweight,
            View<std::int32_t> qzeros) {
  const char* op = "unpack";
  check::format(op, format);
  const std::int64_t n = format.out_features, groups = format.groups();
  check::shape(op, "qweight", qweight, format.in_features * format.bits / 32, n);
  check::shape(op, "qzeros", qzeros, groups, n * format.bits / 32);
  const auto* words = static_cast<const char*>(packed);
  for (std::int64_t row = 0; row < qweight.rows; ++row) {
    for (std::int64_t block = 0; block < n / kBlockN; ++block) {
      std::memcpy(qweight.data + row * qweight.stride + block * kBlockN,
                  words + (block * qweight.rows + row) * kBlockN * 4, kBlockN * 4);
    }
  }
  const auto* zeros = static_cast<const std::uint8_t*>(packed) + packed_zeros_offset(format);
  zero(qzeros);
  for (std::int64_t g = 0; g < groups; ++g) {
    for (std::int64_t i = 0; i < n; ++i) {
      put_field(qzeros.data + g * qzeros.stride, 1, i, format.bits,
                zeros[((i / kBlockN) * groups + g) * kBlockN + i % kBlockN]);
    }
  }
}

}  // namespace lowbitcore
