#include <lowbitcore/columns.h>
#include <lowbitcore/qgemm.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "check.h"
#include "parallel.h"
#include "rows.h"

namespace lowbitcore {

namespace {

// Rows that a thread takes at a time.
constexpr std::int64_t kRows = 8;

// Two rows, which may be the same one, in little-endian words that a store takes whole: storing
// each element is what takes the time.
template <typename Element>
void permute_two(const Element* const (&from)[2], Element* const (&to)[2], std::int64_t cols,
                 const std::int32_t* order) {
  constexpr int kElements = 8 / sizeof(Element), kBits = 8 * sizeof(Element);
  std::int64_t k = 0;
  for (; k + kElements <= cols; k += kElements) {
    for (int r = 0; r < 2; ++r) {
      std::uint64_t word = 0;
      for (int i = 0; i < kElements; ++i) {
        word |= static_cast<std::uint64_t>(from[r][order[k + i]]) << (i * kBits);
      }
      std::memcpy(to[r] + k, &word, sizeof(word));
    }
  }
  for (; k < cols; ++k) {
    for (int r = 0; r < 2; ++r) to[r][k] = from[r][order[k]];
  }
}

template <typename Element>
void permute(const ConstMatrix& x, const std::int32_t* order, const Matrix& y, int threads) {
  parallel_for((x.rows + kRows - 1) / kRows, threads, [&](std::int64_t i, int) {
    const std::int64_t end = std::min(x.rows, (i + 1) * kRows);
    for (std::int64_t r = i * kRows; r < end; r += 2) {
      const std::int64_t next = std::min(r + 1, end - 1);
      const auto* from = static_cast<const Element*>(x.data);
      auto* to = static_cast<Element*>(y.data);
      permute_two<Element>({from + r * x.stride, from + next * x.stride},
                           {to + r * y.stride, to + next * y.stride}, x.cols, order);
    }
  });
}

}  // namespace

void permute_columns(ConstMatrix x, const std::int32_t* order, Matrix y, const Execution& exec) {
  const char* op = "permute_columns";
  check::on_cpu(op, exec);
  check::shape(op, "x", x, x.rows, x.cols);
  check::shape(op, "y", y, x.rows, x.cols);
  check::same_dtype(op, "y", y.dtype, "x", x.dtype);
  check::apart(op, "y", y, "x", x);
  if (x.cols > 0) check::data(op, "order", order);
  for (std::int64_t k = 0; k < x.cols; ++k) {
    if (order[k] < 0 || order[k] >= x.cols) {
      check::fail(op, "order", "entries from 0 to " + std::to_string(x.cols - 1),
                  std::to_string(order[k]));
    }
  }
  const int threads = resolve_threads(exec);
  if (x.dtype == DType::f32) {
    permute<std::uint32_t>(x, order, y, threads);
  } else {
    permute<std::uint16_t>(x, order, y, threads);
  }
}

void qgemm_nt_in_order(ConstMatrix x, const std::int32_t* order, const QuantWeight& w,
                       const float* bias, Matrix y, const Execution& exec) {
  if (order == nullptr) return qgemm_nt(x, w, bias, y, exec);
  const char* op = "qgemm_nt";
  check::format(op, w.format);
  check::shape(op, "x", x, x.rows, w.format.in_features);
  check::row_count(op, "x", x.rows);
  const Rows ordered(x.dtype, x.rows, x.cols);
  permute_columns(x, order, ordered, exec);
  qgemm_nt(ordered, w, bias, y, exec);
}

}  // namespace lowbitcore
