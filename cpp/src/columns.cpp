#include <lowbitcore/columns.h>
#include <lowbitcore/qgemm.h>

#include <algorithm>
#include <string>

#include "check.h"
#include "parallel.h"
#include "rows.h"

namespace lowbitcore {

namespace {

// Rows that a thread takes at a time.
constexpr std::int64_t kRows = 8;

template <typename Element>
void permute(const ConstMatrix& x, const std::int32_t* order, const Matrix& y, int threads) {
  parallel_for((x.rows + kRows - 1) / kRows, threads, [&](std::int64_t i, int) {
    for (std::int64_t r = i * kRows; r < std::min(x.rows, (i + 1) * kRows); ++r) {
      const Element* from = static_cast<const Element*>(x.data) + r * x.stride;
      Element* to = static_cast<Element*>(y.data) + r * y.stride;
      for (std::int64_t k = 0; k < x.cols; ++k) to[k] = from[order[k]];
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
