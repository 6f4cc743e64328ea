// A new token through a block. A linear comes as a tuple (packed, scales, bias or None, bits,
// group_size, in_features, out_features, adapters), an adapter as (a, b, scaling), a norm as
// (weight, eps); what they hold is looked at in each call, since any of it may be replaced.
#include <lowbitcore/lowbitcore.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <deque>
#include <optional>
#include <vector>

#include "check.h"
#include "views.h"

namespace lowbitcore::python {

namespace {

Array array_in(const char* op, const char* argument, nb::handle tensor) {
  Array array;
  if (!nb::try_cast<Array>(tensor, array)) {
    check::fail(op, argument, "a tensor", nb::str(nb::type_name(tensor.type())).c_str());
  }
  on_cpu(op, {{argument, &array}});
  return array;
}

View<const float> factor(const char* op, const char* argument, const Array& a) {
  const View<float> v = view<float>(op, argument, a);
  return {v.data, v.rows, v.cols, v.stride};
}

// Adapted weights, and the adapters that they point to.
class Weights {
 public:
  explicit Weights(const char* op) : op_(op) {}

  AdaptedWeight operator()(const nb::tuple& linear) {
    constexpr std::size_t kFields = 8;
    if (linear.size() != kFields) {
      check::fail(op_, "linear", std::to_string(kFields) + " fields",
                  std::to_string(linear.size()));
    }
    AdaptedWeight w;
    QuantFormat& format = w.weight.format;
    format = {nb::cast<int>(linear[3]), nb::cast<std::int64_t>(linear[4]),
              nb::cast<std::int64_t>(linear[5]), nb::cast<std::int64_t>(linear[6])};
    check::format(op_, format);
    w.weight.packed = vector<std::uint8_t>(op_, "packed", array_in(op_, "packed", linear[0]),
                                           static_cast<std::int64_t>(packed_size(format)));
    w.weight.scales = factor(op_, "scales", array_in(op_, "scales", linear[1]));
    if (!linear[2].is_none()) {
      w.bias = vector<float>(op_, "bias", array_in(op_, "bias", linear[2]), format.out_features);
    }
    const auto adapters = nb::cast<nb::tuple>(linear[7]);
    if (adapters.size() > 0) {
      std::vector<LowRank>& found = adapters_.emplace_back();
      for (const nb::handle item : adapters) {
        const auto adapter = nb::cast<nb::tuple>(item);
        found.push_back({factor(op_, "a", array_in(op_, "a", adapter[0])),
                         factor(op_, "b", array_in(op_, "b", adapter[1])),
                         nb::cast<float>(adapter[2])});
      }
      w.adapters = found.data();
      w.adapter_count = found.size();
    }
    return w;
  }

 private:
  const char* op_;
  std::deque<std::vector<LowRank>> adapters_;
};

Norm norm(const char* op, const std::optional<nb::tuple>& given) {
  if (!given) return {};
  return {const_matrix(op, "norm", array_in(op, "norm", (*given)[0])),
          nb::cast<float>((*given)[1])};
}

// [batch, heads, rows, cols]
ConstHeads cached(const char* op, const char* argument, const Array& a) {
  if (a.ndim() != 4) check::fail(op, argument, "4 dimensions", std::to_string(a.ndim()));
  if (a.shape(3) > 1 && a.stride(3) != 1) {
    check::fail(op, argument, "contiguous columns (stride 1)",
                "stride " + std::to_string(a.stride(3)));
  }
  return {a.data(),    dtype_of(op, argument, a),
          a.shape(0),  a.shape(1),
          a.shape(2),  a.shape(3),
          a.stride(0), a.stride(1),
          a.stride(2)};
}

void py_add_low_rank(const Array& x, const Array& a, const Array& b, float scaling,
                     const Array& y) {
  const char* op = "add_low_rank";
  on_cpu(op, {{"x", &x}, {"a", &a}, {"b", &b}, {"y", &y}});
  const ConstMatrix in = const_matrix(op, "x", x);
  const LowRank adapter{factor(op, "a", a), factor(op, "b", b), scaling};
  const Matrix out = matrix(op, "y", y);
  nb::gil_scoped_release release;
  add_low_rank(in, adapter, out);
}

void py_attend(const Array& q, const Array& keys, const Array& values, float scale,
               const Array& out) {
  const char* op = "attend";
  on_cpu(op, {{"q", &q}, {"keys", &keys}, {"values", &values}, {"out", &out}});
  const ConstMatrix in = const_matrix(op, "q", q);
  const ConstHeads k = cached(op, "keys", keys), v = cached(op, "values", values);
  const Matrix result = matrix(op, "out", out);
  nb::gil_scoped_release release;
  attend(in, k, v, scale, result);
}

void py_project_token(const Array& x, const nb::tuple& norm_of_x, const nb::tuple& q_proj,
                      const nb::tuple& k_proj, const nb::tuple& v_proj,
                      const std::optional<nb::tuple>& q_norm,
                      const std::optional<nb::tuple>& k_norm, const Array& cos, const Array& sin,
                      const Array& q, const Array& k, const Array& v) {
  const char* op = "project_token";
  on_cpu(op, {{"x", &x}, {"cos", &cos}, {"sin", &sin}, {"q", &q}, {"k", &k}, {"v", &v}});
  Weights weights(op);
  const Projections projections{norm(op, norm_of_x), weights(q_proj),  weights(k_proj),
                                weights(v_proj),     norm(op, q_norm), norm(op, k_norm)};
  const ConstMatrix in = const_matrix(op, "x", x);
  const ConstMatrix c = const_matrix(op, "cos", cos), s = const_matrix(op, "sin", sin);
  const Matrix queries = matrix(op, "q", q), keys = matrix(op, "k", k), values = matrix(op, "v", v);
  nb::gil_scoped_release release;
  project_token(in, projections, c, s, queries, keys, values);
}

void py_finish_token(const Array& x, const Array& q, const Array& keys, const Array& values,
                     float scale, const nb::tuple& o_proj, const nb::tuple& norm_of_h,
                     const nb::tuple& gate_proj, const nb::tuple& up_proj,
                     const nb::tuple& down_proj, const Array& y) {
  const char* op = "finish_token";
  on_cpu(op, {{"x", &x}, {"q", &q}, {"keys", &keys}, {"values", &values}, {"y", &y}});
  Weights weights(op);
  const RestOfBlock rest{weights(o_proj), norm(op, norm_of_h), weights(gate_proj), weights(up_proj),
                         weights(down_proj)};
  const ConstMatrix in = const_matrix(op, "x", x), query = const_matrix(op, "q", q);
  const ConstHeads k = cached(op, "keys", keys), v = cached(op, "values", values);
  const Matrix out = matrix(op, "y", y);
  nb::gil_scoped_release release;
  finish_token(in, query, k, v, scale, rest, out);
}

}  // namespace

void init_decode(nb::module_& m) {
  m.def("add_low_rank", &py_add_low_rank);
  m.def("attend", &py_attend);
  m.def("project_token", &py_project_token, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg());
  m.def("finish_token", &py_finish_token);
}

}  // namespace lowbitcore::python
