#include <lowbitcore/low_rank.h>

#include <string>
#include <utility>

#include "call.h"

namespace lowbitcore {

namespace {

// Of rows that an adapter of so many inputs adds to.
LowRankShape check_adapter(const char* op, const LowRank& adapter, std::int64_t inputs,
                           const char* name, const ConstMatrix& y) {
  const std::int64_t rank = adapter.a.rows;
  check::vectors(op, name, y);
  check::shape(op, "a", adapter.a, rank, inputs);
  check::vectors(op, "a", adapter.a);
  check::shape(op, "b", adapter.b, y.cols, rank);
  return {y.rows, inputs, y.cols, rank};
}

// The adapter's inputs, or their gradient, of the type of another argument.
void check_input(const char* op, const char* argument, const ConstMatrix& x,
                 const LowRankShape& shape, const char* other, DType dtype) {
  check::shape(op, argument, x, shape.rows, shape.in_features);
  check::same_dtype(op, argument, x.dtype, other, dtype);
}

std::size_t sized(const char* op, std::size_t (*Backend::*size)(const LowRankShape&, int),
                  const LowRankShape& shape, const Execution& exec) {
  check::row_count(op, "rows", shape.rows);
  check::columns(op, "in_features", shape.in_features);
  check::columns(op, "out_features", shape.out_features);
  check::row_count(op, "rank", shape.rank);
  const Backend& backend = backend_with(op, exec, &Backend::add_low_rank);
  return (backend.*size)(shape, resolve_threads(exec));
}

}  // namespace

void add_low_rank(ConstMatrix y, ConstMatrix x, const LowRank& adapter, View<float> low, Matrix sum,
                  const Execution& exec) {
  const char* op = "add_low_rank";
  check::vectors(op, "x", x);
  const LowRankShape shape = check_adapter(op, adapter, x.cols, "y", y);
  check_input(op, "x", x, shape, "y", y.dtype);
  check::shape(op, "low", low, shape.rows, shape.rank);
  check::like(op, "sum", sum, "y", y);
  const Backend& backend = backend_with(op, exec, &Backend::add_low_rank);
  const int threads = resolve_threads(exec);
  backend.add_low_rank(y, x, adapter, low, sum,
                       Call(op, exec, threads, backend.add_low_rank_workspace(shape, threads)));
}

void add_low_rank_backward(ConstMatrix dy, ConstMatrix x, View<const float> low,
                           const LowRank& adapter, const LowRankGrads& grads,
                           const Execution& exec) {
  const char* op = "add_low_rank_backward";
  const LowRankShape shape = check_adapter(op, adapter, adapter.a.cols, "dy", dy);
  if (grads.dx.data != nullptr) {
    check_input(op, "dx", grads.dx, shape, "dy", dy.dtype);
    check::apart(op, "dx", grads.dx, "dy", dy);
    if (grads.da.data != nullptr) check::apart(op, "dx", grads.dx, "x", x);
  }
  if (grads.da.data != nullptr) {
    check_input(op, "x", x, shape, "dy", dy.dtype);
    check::shape(op, "da", grads.da, shape.rank, shape.in_features);
  }
  if (grads.db.data != nullptr) {
    check::shape(op, "low", low, shape.rows, shape.rank);
    check::shape(op, "db", grads.db, shape.out_features, shape.rank);
  }
  for (const auto& [name, grad] : {std::pair("da", grads.da), std::pair("db", grads.db)}) {
    if (grad.data == nullptr) continue;
    check::apart(op, name, check::as_matrix(grad), "dy", dy);
    if (grads.da.data != nullptr) check::apart(op, name, check::as_matrix(grad), "x", x);
    if (grads.db.data != nullptr) {
      check::apart(op, name, check::as_matrix(grad), "low", check::as_matrix(low));
    }
  }
  const Backend& backend = backend_with(op, exec, &Backend::add_low_rank_backward);
  const int threads = resolve_threads(exec);
  backend.add_low_rank_backward(
      dy, x, low, adapter, grads,
      Call(op, exec, threads, backend.add_low_rank_backward_workspace(shape, threads)));
}

std::size_t add_low_rank_workspace_size(std::int64_t rows, std::int64_t in_features,
                                        std::int64_t out_features, std::int64_t rank,
                                        const Execution& exec) {
  return sized("add_low_rank_workspace_size", &Backend::add_low_rank_workspace,
               {rows, in_features, out_features, rank}, exec);
}

std::size_t add_low_rank_backward_workspace_size(std::int64_t rows, std::int64_t in_features,
                                                 std::int64_t out_features, std::int64_t rank,
                                                 const Execution& exec) {
  return sized("add_low_rank_backward_workspace_size", &Backend::add_low_rank_backward_workspace,
               {rows, in_features, out_features, rank}, exec);
}

}  // namespace lowbitcore
