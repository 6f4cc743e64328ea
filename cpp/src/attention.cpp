#include <lowbitcore/attention.h>

#include <algorithm>
#include <iterator>
#include <string>

#include "call.h"

namespace lowbitcore {

namespace {

void check_heads(const char* op, const char* argument, const ConstHeads& x, const ConstHeads& like,
                 std::int64_t count) {
  check::heads(op, argument, x, like.batch, count, like.rows, like.cols);
  check::same_dtype(op, argument, x.dtype, "q", like.dtype);
}

// What is written: no two elements in one place.
void check_result(const char* op, const char* argument, const ConstHeads& x, const ConstHeads& like,
                  std::int64_t count) {
  check_heads(op, argument, x, like, count);
  if (x.batch == 0 || x.heads == 0 || x.rows == 0) return;
  struct Dimension {
    std::int64_t stride, size;
  };
  Dimension order[] = {{x.batch_stride, x.batch}, {x.head_stride, x.heads}, {x.row_stride, x.rows}};
  std::sort(std::begin(order), std::end(order),
            [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
  std::int64_t extent = x.cols;
  for (const Dimension& dimension : order) {
    if (dimension.size <= 1) continue;
    if (dimension.stride < extent) {
      check::fail(op, argument, "a stride of at least " + std::to_string(extent),
                  std::to_string(dimension.stride));
    }
    extent += (dimension.size - 1) * dimension.stride;
  }
}

void check_inputs(const char* op, const AttentionInputs& in) {
  check::head_columns(op, "q", in.q.cols);
  check_heads(op, "q", in.q, in.q, in.q.heads);
  check_heads(op, "k", in.k, in.q, in.k.heads);
  check_heads(op, "v", in.v, in.q, in.k.heads);
  if (in.k.heads <= 0 || in.q.heads % in.k.heads != 0) {
    check::fail(op, "k", "a number of heads that divides q's " + std::to_string(in.q.heads),
                std::to_string(in.k.heads));
  }
  check::score_scale(op, in.scale);
}

std::size_t sized(const char* op,
                  std::size_t (*Backend::*size)(DType, std::int64_t, std::int64_t, int),
                  DType dtype, std::int64_t rows, std::int64_t cols, const Execution& exec) {
  check::dtype(op, "dtype", dtype);
  check::row_count(op, "rows", rows);
  check::head_columns(op, "cols", cols);
  const Backend& backend = backend_with(op, exec, &Backend::attention);
  return (backend.*size)(dtype, rows, cols, resolve_threads(exec));
}

}  // namespace

void attention(const AttentionInputs& in, Heads out, View<float> lse, const Execution& exec) {
  const char* op = "attention";
  check_inputs(op, in);
  check_result(op, "out", out, in.q, in.q.heads);
  check::shape(op, "lse", lse, in.q.batch * in.q.heads, in.q.rows);
  const Backend& backend = backend_with(op, exec, &Backend::attention);
  if (in.q.rows == 0) return;
  const int threads = resolve_threads(exec);
  const Call call(op, exec, threads,
                  backend.attention_workspace(in.q.dtype, in.q.rows, in.q.cols, threads));
  backend.attention(in, out, lse, call);
}

void attention_backward(ConstHeads d_out, const AttentionInputs& in, ConstHeads out,
                        View<const float> lse, Heads dq, Heads dk, Heads dv,
                        const Execution& exec) {
  const char* op = "attention_backward";
  check_inputs(op, in);
  check_heads(op, "d_out", d_out, in.q, in.q.heads);
  check_heads(op, "out", out, in.q, in.q.heads);
  check::shape(op, "lse", lse, in.q.batch * in.q.heads, in.q.rows);
  check_result(op, "dq", dq, in.q, in.q.heads);
  check_result(op, "dk", dk, in.q, in.k.heads);
  check_result(op, "dv", dv, in.q, in.k.heads);
  const Backend& backend = backend_with(op, exec, &Backend::attention);
  if (in.q.rows == 0) return;
  const int threads = resolve_threads(exec);
  const Call call(op, exec, threads,
                  backend.attention_backward_workspace(in.q.dtype, in.q.rows, in.q.cols, threads));
  backend.attention_backward(d_out, in, out, lse, dq, dk, dv, call);
}

std::size_t attention_workspace_size(DType dtype, std::int64_t rows, std::int64_t cols,
                                     const Execution& exec) {
  return sized("attention_workspace_size", &Backend::attention_workspace, dtype, rows, cols, exec);
}

std::size_t attention_backward_workspace_size(DType dtype, std::int64_t rows, std::int64_t cols,
                                              const Execution& exec) {
  return sized("attention_backward_workspace_size", &Backend::attention_backward_workspace, dtype,
               rows, cols, exec);
}

}  // namespace lowbitcore
