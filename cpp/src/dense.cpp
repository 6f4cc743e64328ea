#include <lowbitcore/dense.h>

#include <string>

#include "call.h"

namespace lowbitcore {

namespace {

// Of a weight, and the types of a product with it.
void check_weight(const char* op, const ConstMatrix& x, const ConstMatrix& weight,
                  const ConstMatrix& y) {
  if (weight.rows < 1) check::fail(op, "weight", "at least 1 row", std::to_string(weight.rows));
  check::same_dtype(op, "weight", weight.dtype, "x", x.dtype);
  check::same_dtype(op, "y", y.dtype, "x", x.dtype);
}

std::size_t sized(const char* op, std::size_t (*Backend::*size)(std::int64_t, std::int64_t, int),
                  std::int64_t rows, std::int64_t cols, const Execution& exec) {
  check::row_count(op, "rows", rows);
  check::columns(op, "cols", cols);
  return (backend_with(op, exec, size).*size)(rows, cols, resolve_threads(exec));
}

}  // namespace

void gemm_nt(ConstMatrix x, ConstMatrix weight, const float* bias, Matrix y,
             const Execution& exec) {
  const char* op = "gemm_nt";
  check::vectors(op, "x", x);
  check::shape(op, "weight", weight, weight.rows, x.cols);
  check::shape(op, "y", y, x.rows, weight.rows);
  check_weight(op, x, weight, y);
  check::apart(op, "y", y, "x", x);
  const Backend& backend = backend_with(op, exec, &Backend::gemm_nt);
  const int threads = resolve_threads(exec);
  backend.gemm_nt(x, weight, bias, y,
                  Call(op, exec, threads, backend.gemm_nt_workspace(x.rows, x.cols, threads)));
}

void gemm_nn(ConstMatrix x, ConstMatrix weight, const float* bias, Matrix y,
             const Execution& exec) {
  const char* op = "gemm_nn";
  check::vectors(op, "weight", weight);
  check::shape(op, "x", x, x.rows, weight.rows);
  check::shape(op, "y", y, x.rows, weight.cols);
  check_weight(op, x, weight, y);
  check::apart(op, "y", y, "x", x);
  const Backend& backend = backend_with(op, exec, &Backend::gemm_nn);
  const int threads = resolve_threads(exec);
  backend.gemm_nn(x, weight, bias, y,
                  Call(op, exec, threads, backend.gemm_nn_workspace(y.rows, y.cols, threads)));
}

std::size_t gemm_nt_workspace_size(std::int64_t rows, std::int64_t cols, const Execution& exec) {
  return sized("gemm_nt_workspace_size", &Backend::gemm_nt_workspace, rows, cols, exec);
}

std::size_t gemm_nn_workspace_size(std::int64_t rows, std::int64_t cols, const Execution& exec) {
  return sized("gemm_nn_workspace_size", &Backend::gemm_nn_workspace, rows, cols, exec);
}

}  // namespace lowbitcore
