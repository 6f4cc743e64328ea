#include <lowbitcore/qgemm.h>

#include <cstdint>
#include <memory>
#include <new>
#include <string>

#include "backend.h"
#include "check.h"
#include "parallel.h"

namespace lowbitcore {

namespace {

constexpr std::size_t kAlignment = 64;

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};

std::size_t sized(const char* op, std::size_t (*size)(const QuantFormat&, std::int64_t, int),
                  const QuantFormat& format, std::int64_t m, int num_threads) {
  check::format(op, format);
  if (m < 0) check::fail(op, "m", "a count of rows", std::to_string(m));
  return size(format, m, resolve_threads(num_threads));
}

}  // namespace

void* workspace(const char* op, const Execution& exec, std::size_t bytes) {
  if (exec.workspace != nullptr) {
    if (exec.workspace_bytes < bytes) {
      check::fail(op, "workspace_bytes", "at least " + std::to_string(bytes),
                  std::to_string(exec.workspace_bytes));
    }
    if (reinterpret_cast<std::uintptr_t>(exec.workspace) % kAlignment != 0) {
      check::fail(op, "workspace", "an address aligned to 64 bytes", "one that is not");
    }
    return exec.workspace;
  }
  thread_local std::unique_ptr<void, AlignedDelete> kept;
  thread_local std::size_t kept_bytes = 0;
  if (kept_bytes < bytes) {
    kept.reset();
    kept_bytes = 0;
    kept.reset(::operator new(bytes, std::align_val_t{kAlignment}));
    kept_bytes = bytes;
  }
  return kept.get();
}

void qgemm_nt(ConstMatrix x, const QuantWeight& w, const float* bias, Matrix y,
              const Execution& exec) {
  const char* op = "qgemm_nt";
  check::weight(op, w, true);
  check::shape(op, "x", x, x.rows, w.format.in_features);
  check::shape(op, "y", y, x.rows, w.format.out_features);
  check::same_dtype(op, "y", y.dtype, "x", x.dtype);
  if (x.rows == 0) return;
  const int threads = resolve_threads(exec.num_threads);
  const Backend& backend = cpu_backend();
  backend.qgemm_nt(x, w, bias, y, threads,
                   workspace(op, exec, backend.qgemm_nt_workspace(w.format, x.rows, threads)));
}

void qgemm_nn(ConstMatrix dy, const QuantWeight& w, Matrix dx, const Execution& exec) {
  const char* op = "qgemm_nn";
  check::weight(op, w, true);
  check::shape(op, "dy", dy, dy.rows, w.format.out_features);
  check::shape(op, "dx", dx, dy.rows, w.format.in_features);
  check::same_dtype(op, "dx", dx.dtype, "dy", dy.dtype);
  if (dy.rows == 0) return;
  const int threads = resolve_threads(exec.num_threads);
  const Backend& backend = cpu_backend();
  backend.qgemm_nn(dy, w, dx, threads,
                   workspace(op, exec, backend.qgemm_nn_workspace(w.format, dy.rows, threads)));
}

void qgemm_grad_scales(ConstMatrix dy, ConstMatrix x, const QuantWeight& w, View<float> ds,
                       const Execution& exec) {
  const char* op = "qgemm_grad_scales";
  check::weight(op, w, false);
  check::shape(op, "dy", dy, dy.rows, w.format.out_features);
  check::shape(op, "x", x, dy.rows, w.format.in_features);
  check::same_dtype(op, "x", x.dtype, "dy", dy.dtype);
  check::shape(op, "ds", ds, w.format.groups(), w.format.out_features);
  const int threads = resolve_threads(exec.num_threads);
  const Backend& backend = cpu_backend();
  backend.qgemm_grad_scales(
      dy, x, w, ds, threads,
      workspace(op, exec, backend.qgemm_grad_scales_workspace(w.format, dy.rows, threads)));
}

std::size_t qgemm_nt_workspace_size(const QuantFormat& format, std::int64_t m, int num_threads) {
  return sized("qgemm_nt_workspace_size", cpu_backend().qgemm_nt_workspace, format, m, num_threads);
}

std::size_t qgemm_nn_workspace_size(const QuantFormat& format, std::int64_t m, int num_threads) {
  return sized("qgemm_nn_workspace_size", cpu_backend().qgemm_nn_workspace, format, m, num_threads);
}

std::size_t qgemm_grad_scales_workspace_size(const QuantFormat& format, std::int64_t m,
                                             int num_threads) {
  return sized("qgemm_grad_scales_workspace_size", cpu_backend().qgemm_grad_scales_workspace,
               format, m, num_threads);
}

}  // namespace lowbitcore
