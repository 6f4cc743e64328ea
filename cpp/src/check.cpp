#include "check.h"

#include <cmath>
#include <stdexcept>
#include <vector>

#include "backend.h"
#include "half.h"

namespace lowbitcore::check {

namespace {

// Keeps every product of two dimensions and the element size far from overflow.
constexpr std::int64_t kMaxFeatures = std::int64_t{1} << 30;
// CUDA's kernels count bytes of a block of outputs, and blocks in a grid's second dimension, in
// less.
constexpr std::int64_t kMaxFeaturesCuda = std::int64_t{1} << 22;

std::string dims(std::int64_t rows, std::int64_t cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

std::string dims(const ConstHeads& x) {
  return "[" + std::to_string(x.batch) + ", " + std::to_string(x.heads) + ", " +
         std::to_string(x.rows) + ", " + std::to_string(x.cols) + "]";
}

float element(const ConstMatrix& m, std::int64_t row, std::int64_t col) {
  const std::int64_t at = row * m.stride + col;
  switch (m.dtype) {
    case DType::f32:
      return static_cast<const float*>(m.data)[at];
    case DType::bf16:
      return bf16_to_float(static_cast<const std::uint16_t*>(m.data)[at]);
    default:
      return f16_to_float(static_cast<const std::uint16_t*>(m.data)[at]);
  }
}

std::int64_t width(const ConstMatrix& m) { return m.cols * (m.dtype == DType::f32 ? 4 : 2); }

std::int64_t pitch(const ConstMatrix& m) { return m.stride * (m.dtype == DType::f32 ? 4 : 2); }

// Whether two matrices share bytes; where rows of other strides lie among one another, yes.
bool overlap(const ConstMatrix& a, const ConstMatrix& b) {
  if (a.rows == 0 || b.rows == 0 || a.cols == 0 || b.cols == 0) return false;
  const auto first = reinterpret_cast<std::intptr_t>(a.data);
  const auto second = reinterpret_cast<std::intptr_t>(b.data);
  if (first >= second + (b.rows - 1) * pitch(b) + width(b) ||
      second >= first + (a.rows - 1) * pitch(a) + width(a)) {
    return false;
  }
  const std::int64_t step = a.rows > 1 ? pitch(a) : pitch(b);
  if ((a.rows == 1 && b.rows == 1) || (a.rows > 1 && b.rows > 1 && pitch(a) != pitch(b))) {
    return true;
  }
  // Side by side in one buffer, as the columns of a larger matrix.
  const std::int64_t offset = ((second - first) % step + step) % step;
  return offset < width(a) || offset + width(b) > step;
}

}  // namespace

void fail(const char* op, const char* argument, const std::string& expected,
          const std::string& got) {
  throw std::invalid_argument(std::string(op) + ": " + argument + ": expected " + expected +
                              ", got " + got);
}

void bits(const char* op, int bits) {
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) {
    fail(op, "bits", "2, 3, 4 or 8", std::to_string(bits));
  }
}

namespace {

void features(const char* op, const char* argument, std::int64_t count, Device device) {
  const bool cuda = device == Device::cuda;
  if (count <= 0 || count % 32 != 0 || count > (cuda ? kMaxFeaturesCuda : kMaxFeatures)) {
    fail(op, argument,
         std::string("a positive multiple of 32, at most ") + (cuda ? "2^22 on CUDA" : "2^30"),
         std::to_string(count));
  }
}

}  // namespace

void format(const char* op, const QuantFormat& f, Device device) {
  bits(op, f.bits);
  if (f.group_size != -1 &&
      (f.group_size <= 0 || f.group_size % 32 != 0 || f.group_size > kMaxFeatures)) {
    fail(op, "group_size", "-1 or a positive multiple of 32, at most 2^30",
         std::to_string(f.group_size));
  }
  features(op, "in_features", f.in_features, device);
  features(op, "out_features", f.out_features, device);
}

void shape(const char* op, const char* argument, const void* data, std::int64_t rows,
           std::int64_t cols, std::int64_t stride, std::int64_t expected_rows,
           std::int64_t expected_cols) {
  if (rows < 0 || cols < 0) {
    fail(op, argument, "no negative number of rows or columns", dims(rows, cols));
  }
  if (rows != expected_rows || cols != expected_cols) {
    fail(op, argument, "shape " + dims(expected_rows, expected_cols), dims(rows, cols));
  }
  if (rows > 1 && stride < cols) {
    fail(op, argument, "a row stride of at least " + std::to_string(cols), std::to_string(stride));
  }
  if (rows > 0 && cols > 0) check::data(op, argument, data);
}

void dtype(const char* op, const char* argument, DType dtype) {
  if (dtype != DType::f32 && dtype != DType::bf16 && dtype != DType::f16) {
    fail(op, argument, "float32, bfloat16 or float16", name(dtype));
  }
}

void apart(const char* op, const char* argument, const ConstMatrix& result, const char* other,
           const ConstMatrix& input) {
  if (overlap(result, input)) {
    fail(op, argument, std::string("memory apart from that of ") + other, "some that overlaps");
  }
}

void data(const char* op, const char* argument, const void* pointer) {
  if (pointer == nullptr) fail(op, argument, "data", "a null pointer");
}

void row_count(const char* op, const char* argument, std::int64_t rows) {
  if (rows < 0 || rows > kMaxFeatures) {
    fail(op, argument, "a count from 0 to 2^30", std::to_string(rows));
  }
}

void columns(const char* op, const char* argument, std::int64_t cols) {
  if (cols <= 0 || cols % 32 != 0 || cols > kMaxFeatures) {
    fail(op, argument, "a positive multiple of 32 columns, at most 2^30", std::to_string(cols));
  }
}

void same_dtype(const char* op, const char* argument, DType got, const char* other,
                DType expected) {
  if (got != expected) {
    fail(op, argument, std::string("the type of ") + other + " (" + name(expected) + ")",
         name(got));
  }
}

void head_columns(const char* op, const char* argument, std::int64_t cols) {
  if (cols <= 0 || cols % 32 != 0 || cols > kMostHeadCols) {
    fail(op, argument,
         "a positive multiple of 32 columns, at most " + std::to_string(kMostHeadCols),
         std::to_string(cols));
  }
}

void heads(const char* op, const char* argument, const ConstHeads& x, std::int64_t batch,
           std::int64_t count, std::int64_t rows, std::int64_t cols) {
  if (x.batch < 0 || x.heads < 0 || x.rows < 0) {
    fail(op, argument, "no negative dimension", dims(x));
  }
  if (x.batch != batch || x.heads != count || x.rows != rows || x.cols != cols) {
    fail(op, argument, "shape " + dims({nullptr, x.dtype, batch, count, rows, cols, 0, 0, 0}),
         dims(x));
  }
  dtype(op, argument, x.dtype);
  if (batch > 0 && count > 0 && rows > 0) data(op, argument, x.data);
}

void score_scale(const char* op, float scale) {
  if (!(scale > 0.0f) || !std::isfinite(scale)) {
    fail(op, "scale", "a number above 0", std::to_string(scale));
  }
}

void finite(const char* op, const char* argument, const char* expected, const ConstMatrix& m) {
  for (std::int64_t i = 0; i < m.rows; ++i) {
    for (std::int64_t j = 0; j < m.cols; ++j) {
      const float value = element(m, i, j);
      if (!std::isfinite(value)) {
        fail(op, argument, expected, std::to_string(value) + " at " + dims(i, j));
      }
    }
  }
}

void g_idx(const char* op, const std::int32_t* g_idx, const QuantFormat& f) {
  const std::int64_t groups = f.groups();
  for (std::int64_t k = 0; k < f.in_features; ++k) {
    if (g_idx[k] < 0 || g_idx[k] >= groups) {
      fail(op, "g_idx", "entries from 0 to " + std::to_string(groups - 1),
           std::to_string(g_idx[k]) + " at " + std::to_string(k));
    }
  }
}

void packed(const char* op, const void* packed, Device device) {
  constexpr std::uintptr_t kCudaAlignment = 16;  // what its kernels copy at a time
  data(op, "packed", packed);
  if (device == Device::cuda && reinterpret_cast<std::uintptr_t>(packed) % kCudaAlignment != 0) {
    fail(op, "packed", "an address aligned to 16 bytes on CUDA", "one that is not");
  }
}

void weight(const char* op, const QuantWeight& w, bool with_scales, Device device) {
  format(op, w.format, device);
  packed(op, w.packed, device);
  if (with_scales) shape(op, "scales", w.scales, w.format.groups(), w.format.out_features);
  if (w.g_idx != nullptr && device == Device::cpu) g_idx(op, w.g_idx, w.format);
}

void on_cpu(const char* op, const Execution& exec) {
  if (exec.device != Device::cpu) throw Error(std::string(op) + ": computed on the CPU alone");
}

void permutation(const char* op, const char* argument, const std::int32_t* order,
                 std::int64_t count) {
  std::vector<bool> seen(static_cast<std::size_t>(count), false);
  for (std::int64_t i = 0; i < count; ++i) {
    if (order[i] < 0 || order[i] >= count || seen[static_cast<std::size_t>(order[i])]) {
      fail(op, argument, "a permutation of 0 to " + std::to_string(count - 1),
           std::to_string(order[i]) + " at " + std::to_string(i));
    }
    seen[static_cast<std::size_t>(order[i])] = true;
  }
}

const char* name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
  }
  return "an unknown type";
}

}  // namespace lowbitcore::check

namespace lowbitcore {

void unsupported_bits(int bits) {
  check::fail("kernel", "bits", "2, 3, 4 or 8", std::to_string(bits));
}

void unknown_device() { check::fail("execution", "device", "cpu or cuda", "another"); }

}  // namespace lowbitcore
