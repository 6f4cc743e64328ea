#include <lowbitcore/dense.h>

#include "call.h"

namespace lowbitcore {

namespace {

void check_types(const char* op, const ConstMatrix& x, const ConstMatrix& weight,
                 const ConstMatrix& y) {
  check::same_dtype(op, "weight", weight.dtype, "x", x.dtype);
  check::same_dtype(op, "y", y.dtype, "x", x.dtype);
}

std::size_t sized(const char* op, std::size_t (*Backend::*size)(std::int64_t, std::int64_t, int),
                  std::int64_t rows, std::int64_t in_features, const Execution& exec) {
  check::row_count(op, "rows", rows);
  check::columns(op, "in_features", in_features);
  return (backend_with(op, exec, size).*size)(rows, in_features, resolve_threads(exec));
}

}  // namespace

void gemm_nt(ConstMatrix x, ConstMatrix weight, const float* bias, Matrix y,
             const Execution& exec) {
  const char* op = "gemm_nt";
  check::vectors(op, "x", x);
  check::shape(op, "weight", weight, weight.rows, x.cols);
  check::shape(op, "y", y, x.rows, weight.rows);
  check_types(op, x, weight, y);
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
  check_types(op, x, weight, y);
  const Backend& backend = backend_with(op, exec, &Backend::gemm_nn);
  const int threads = resolve_threads(exec);
  backend.gemm_nn(x, weight, bias, y,
                  Call(op, exec, threads, backend.gemm_nn_workspace(y.rows, y.cols, threads)));
}

std::size_t gemm_nt_workspace_size(std::int64_t rows, std::int64_t in_features,
                                   const Execution& exec) {
  return sized("gemm_nt_workspace_size", &Backend::gemm_nt_workspace, rows, in_features, exec);
}

std::size_t gemm_nn_workspace_size(std::int64_t rows, std::int64_t in_features,
                                   const Execution& exec) {
  return sized("gemm_nn_workspace_size", &Backend::gemm_nn_workspace, rows, in_features, exec);
}

}  // namespace lowbitcore
