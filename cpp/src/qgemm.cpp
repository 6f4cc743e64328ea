#include <lowbitcore/qgemm.h>

#include <string>

#include "call.h"

namespace lowbitcore {

namespace {

std::size_t sized(const char* op, std::size_t (*size)(const QuantFormat&, std::int64_t, int),
                  const QuantFormat& format, std::int64_t m, const Execution& exec) {
  check::format(op, format, exec.device);
  check::row_count(op, "m", m);
  return size(format, m, resolve_threads(exec));
}

}  // namespace

void qgemm_nt(ConstMatrix x, const QuantWeight& w, const float* bias, Matrix y,
              const Execution& exec) {
  const char* op = "qgemm_nt";
  check::weight(op, w, true, exec.device);
  check::shape(op, "x", x, x.rows, w.format.in_features);
  check::row_count(op, "x", x.rows);
  check::shape(op, "y", y, x.rows, w.format.out_features);
  check::same_dtype(op, "y", y.dtype, "x", x.dtype);
  check::apart(op, "y", y, "x", x);
  if (x.rows == 0) return;
  const Backend& backend = backend_of(exec);
  const int threads = resolve_threads(exec);
  const Call call(op, exec, threads, backend.qgemm_nt_workspace(w.format, x.rows, threads));
  backend.qgemm_nt(x, w, bias, y, call);
}

void qgemm_nn(ConstMatrix dy, const QuantWeight& w, Matrix dx, const Execution& exec) {
  const char* op = "qgemm_nn";
  check::weight(op, w, true, exec.device);
  check::shape(op, "dy", dy, dy.rows, w.format.out_features);
  check::row_count(op, "dy", dy.rows);
  check::shape(op, "dx", dx, dy.rows, w.format.in_features);
  check::same_dtype(op, "dx", dx.dtype, "dy", dy.dtype);
  check::apart(op, "dx", dx, "dy", dy);
  if (dy.rows == 0) return;
  const Backend& backend = backend_of(exec);
  const int threads = resolve_threads(exec);
  const Call call(op, exec, threads, backend.qgemm_nn_workspace(w.format, dy.rows, threads));
  backend.qgemm_nn(dy, w, dx, call);
}

void qgemm_grad_scales(ConstMatrix dy, ConstMatrix x, const QuantWeight& w, View<float> ds,
                       const Execution& exec) {
  const char* op = "qgemm_grad_scales";
  check::weight(op, w, false, exec.device);
  check::shape(op, "dy", dy, dy.rows, w.format.out_features);
  check::row_count(op, "dy", dy.rows);
  check::shape(op, "x", x, dy.rows, w.format.in_features);
  check::same_dtype(op, "x", x.dtype, "dy", dy.dtype);
  check::shape(op, "ds", ds, w.format.groups(), w.format.out_features);
  check::apart(op, "ds", check::as_matrix(ds), "dy", dy);
  check::apart(op, "ds", check::as_matrix(ds), "x", x);
  const Backend& backend = backend_of(exec);
  const int threads = resolve_threads(exec);
  const Call call(op, exec, threads,
                  backend.qgemm_grad_scales_workspace(w.format, dy.rows, threads));
  backend.qgemm_grad_scales(dy, x, w, ds, call);
}

std::size_t qgemm_nt_workspace_size(const QuantFormat& format, std::int64_t m,
                                    const Execution& exec) {
  return sized("qgemm_nt_workspace_size", backend_of(exec).qgemm_nt_workspace, format, m, exec);
}

std::size_t qgemm_nn_workspace_size(const QuantFormat& format, std::int64_t m,
                                    const Execution& exec) {
  return sized("qgemm_nn_workspace_size", backend_of(exec).qgemm_nn_workspace, format, m, exec);
}

std::size_t qgemm_grad_scales_workspace_size(const QuantFormat& format, std::int64_t m,
                                             const Execution& exec) {
  return sized("qgemm_grad_scales_workspace_size", backend_of(exec).qgemm_grad_scales_workspace,
               format, m, exec);
}

}  // namespace lowbitcore
