#include <lowbitcore/pack.h>

#include "backend.h"
#include "check.h"
#include "fields.h"

namespace lowbitcore {

namespace {

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

template <typename Word>
void check_canonical(const char* op, const QuantFormat& format, const View<Word>& qweight,
                     const View<Word>& qzeros, Device device) {
  check::format(op, format, device);
  const std::int64_t n = format.out_features;
  check::shape(op, "qweight", qweight, format.in_features * format.bits / 32, n);
  check::shape(op, "qzeros", qzeros, format.groups(), n * format.bits / 32);
}

}  // namespace

void pack_qweight(View<const std::uint8_t> codes, int bits, View<std::int32_t> qweight) {
  const char* op = "pack_qweight";
  check::bits(op, bits);
  check_multiple(op, "codes.shape[1]", codes.cols);
  check::shape(op, "codes", codes, codes.rows, codes.cols);
  check::shape(op, "qweight", qweight, codes.cols * bits / 32, codes.rows);
  for (std::int64_t n = 0; n < codes.rows; ++n) {
    const std::uint8_t* row = codes.data + n * codes.stride;
    unsigned all = 0;
    for (std::int64_t k = 0; k < codes.cols; ++k) all |= row[k];
    if (all >> bits == 0) continue;
    for (std::int64_t k = 0; k < codes.cols; ++k) check_code(op, "codes", row[k], bits, n, k);
  }
  // 32 codes are `bits` whole words, which lie in as many rows.
  for (std::int64_t k = 0; k < codes.cols; k += 32) {
    std::int32_t* to = qweight.data + k / 32 * bits * qweight.stride;
    for (std::int64_t n = 0; n < codes.rows; ++n) {
      std::int32_t words[8] = {};
      const std::uint8_t* row = codes.data + n * codes.stride + k;
      for (int i = 0; i < 32; ++i) put_field(words, 1, i, bits, row[i]);
      for (int word = 0; word < bits; ++word) to[word * qweight.stride + n] = words[word];
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
  return static_cast<std::size_t>(format.in_features / 8 * format.bits * format.out_features +
                                  format.groups() * format.out_features);
}

void prepack(const QuantFormat& format, View<const std::int32_t> qweight,
             View<const std::int32_t> qzeros, void* packed, const Execution& exec) {
  const char* op = "prepack";
  check_canonical(op, format, qweight, qzeros, exec.device);
  check::packed(op, packed, exec.device);
  memory_of(exec).prepack(format, qweight, qzeros, packed, exec.stream);
}

void unpack(const QuantFormat& format, const void* packed, View<std::int32_t> qweight,
            View<std::int32_t> qzeros, const Execution& exec) {
  const char* op = "unpack";
  check_canonical(op, format, qweight, qzeros, exec.device);
  check::packed(op, packed, exec.device);
  memory_of(exec).unpack(format, packed, qweight, qzeros, exec.stream);
}

}  // namespace lowbitcore
