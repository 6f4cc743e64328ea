#include <lowbitcore/columns.h>
#include <lowbitcore/decode.h>
#include <lowbitcore/elementwise.h>

#include <string>
#include <vector>

#include "call.h"
#include "rows.h"

namespace lowbitcore {

namespace {

void check_attention(const char* op, const ConstMatrix& q, const ConstHeads& keys,
                     const ConstHeads& values, float scale, const Matrix& out) {
  const std::int64_t cols = keys.cols;
  check::head_columns(op, "keys", cols);
  if (keys.heads <= 0 || q.cols % cols != 0 || q.cols / cols % keys.heads != 0) {
    check::fail(op, "keys",
                "a number of heads of " + std::to_string(cols) + " columns that divides q's " +
                    std::to_string(q.cols),
                std::to_string(keys.heads));
  }
  if (keys.rows <= 0) check::fail(op, "keys", "at least 1 row", std::to_string(keys.rows));
  check::vectors(op, "q", q);
  check::like(op, "out", out, "q", q);
  check::heads(op, "keys", keys, q.rows, keys.heads, keys.rows, cols);
  check::heads(op, "values", values, q.rows, keys.heads, keys.rows, cols);
  check::same_dtype(op, "keys", keys.dtype, "q", q.dtype);
  check::same_dtype(op, "values", values.dtype, "q", q.dtype);
  check::score_scale(op, scale);
}

void add(const char* op, ConstMatrix a, ConstMatrix b, Matrix sum, const Execution& exec) {
  backend_with(op, exec, &Backend::add).add(a, b, sum, Call(op, exec));
}

// Of x, or what has its shape, and one of a block's weights.
void check_product(const char* op, const char* name, const ConstMatrix& x, const AdaptedWeight& w,
                   const Matrix& y) {
  check::format(op, w.weight.format);
  const std::int64_t inputs = w.weight.format.in_features, outputs = w.weight.format.out_features;
  if (inputs != x.cols || outputs != y.cols) {
    check::fail(op, name, "a weight of " + std::to_string(y.cols) + " x " + std::to_string(x.cols),
                std::to_string(outputs) + " x " + std::to_string(inputs));
  }
}

void multiply(const char* op, ConstMatrix x, const AdaptedWeight& w, const Matrix& y,
              const Execution& exec) {
  if (w.adapter_count > 0) check::data(op, "adapters", w.adapters);
  qgemm_nt_in_order(x, w.order, w.weight, w.bias, y, exec);
  for (std::size_t i = 0; i < w.adapter_count; ++i) {
    const std::int64_t rank = w.adapters[i].a.rows;
    check::row_count(op, "rank", rank);
    std::vector<float> low(static_cast<std::size_t>(x.rows * rank));
    add_low_rank(y, x, w.adapters[i], {low.data(), x.rows, rank, rank}, y, exec);
  }
}

// Turns the heads of x, which it takes apart from one another for their norm, if there is one.
void place(const Rows& x, const Norm& norm, ConstMatrix cos, ConstMatrix sin, Matrix y,
           const Execution& exec) {
  ConstMatrix in = x;
  if (norm.weight.data == nullptr) return rotate(in, cos, sin, false, y, exec);
  const std::int64_t cols = cos.cols;
  if (norm.weight.cols != cols || cols <= 0 || in.cols % cols != 0) {
    check::fail("project_token", "norm",
                "those of a head, " + std::to_string(cols) + " columns that divide " +
                    std::to_string(in.cols),
                std::to_string(norm.weight.cols));
  }
  const Rows normed(in.dtype, in.rows, in.cols);
  Matrix out = normed;
  out.rows = in.rows = in.rows * in.cols / cols;
  out.cols = out.stride = in.cols = in.stride = cols;
  rms_norm(in, norm.weight, norm.eps, out, exec);
  rotate(normed, cos, sin, false, y, exec);
}

}  // namespace

void attend(ConstMatrix q, const ConstHeads& keys, const ConstHeads& values, float scale,
            Matrix out, const Execution& exec) {
  const char* op = "attend";
  check_attention(op, q, keys, values, scale, out);
  backend_with(op, exec, &Backend::attend).attend(q, keys, values, scale, out, Call(op, exec));
}

void project_token(ConstMatrix x, const Projections& p, ConstMatrix cos, ConstMatrix sin, Matrix q,
                   Matrix k, Matrix v, const Execution& exec) {
  const char* op = "project_token";
  backend_with(op, exec, &Backend::attend);
  check::vectors(op, "x", x);
  check::format(op, p.q.weight.format);
  check::shape(op, "x", x, x.rows, p.q.weight.format.in_features);
  check::vectors(op, "q", q);
  check::vectors(op, "k", k);
  check::shape(op, "norm", p.norm.weight, 1, x.cols);
  if (cos.rows != 1 && cos.rows != x.rows) {
    check::fail(op, "cos", "1 row or " + std::to_string(x.rows), std::to_string(cos.rows));
  }
  check_product(op, "q", x, p.q, q);
  check_product(op, "k", x, p.k, k);
  check_product(op, "v", x, p.v, v);
  const Rows normed(x.dtype, x.rows, x.cols);
  rms_norm(x, p.norm.weight, p.norm.eps, normed, exec);
  const Rows queries(x.dtype, x.rows, q.cols), keys(x.dtype, x.rows, k.cols);
  multiply(op, normed, p.q, queries, exec);
  multiply(op, normed, p.k, keys, exec);
  multiply(op, normed, p.v, v, exec);
  place(queries, p.q_norm, cos, sin, q, exec);
  place(keys, p.k_norm, cos, sin, k, exec);
}

void finish_token(ConstMatrix x, ConstMatrix q, const ConstHeads& keys, const ConstHeads& values,
                  float scale, const RestOfBlock& rest, Matrix y, const Execution& exec) {
  const char* op = "finish_token";
  backend_with(op, exec, &Backend::attend);
  check::vectors(op, "x", x);
  check::like(op, "y", y, "x", x);
  check::shape(op, "q", q, x.rows, q.cols);
  check::vectors(op, "q", q);
  check::format(op, rest.gate.weight.format);
  check::shape(op, "norm", rest.norm.weight, 1, x.cols);
  const std::int64_t rows = x.rows, width = rest.gate.weight.format.out_features;
  const Rows attended(q.dtype, rows, q.cols), sum(x.dtype, rows, x.cols), to(x.dtype, rows, x.cols);
  attend(q, keys, values, scale, attended, exec);
  multiply(op, attended, rest.o, to, exec);
  add(op, x, to, sum, exec);
  rms_norm(sum, rest.norm.weight, rest.norm.eps, to, exec);
  const Rows gate(x.dtype, rows, width), up(x.dtype, rows, width);
  multiply(op, to, rest.gate, gate, exec);
  multiply(op, to, rest.up, up, exec);
  swiglu(gate, up, gate, exec);
  multiply(op, gate, rest.down, to, exec);
  add(op, sum, to, y, exec);
}

}  // namespace lowbitcore
