// A new token through a block. A linear comes as a tuple (packed, scales, bias or None, order
// or None, bits, group_size, in_features, out_features, adapters), an adapter as (a, b, scaling), a
// norm as (weight, eps); what they hold is looked at in each call, since any of it may be replaced.
#include <lowbitcore/lowbitcore.h>
#include <nanobind/nanobind.h>

#include <deque>
#include <string>
#include <vector>

#include "check.h"
#include "views.h"

namespace lowbitcore::python {

namespace {

template <typename T>
T field(const char* op, const std::string& argument, const char* expected, nb::handle value) {
  T result;
  if (!nb::try_cast<T>(value, result)) {
    check::fail(op, argument.c_str(), expected, nb::str(nb::type_name(value.type())).c_str());
  }
  return result;
}

nb::tuple fields(const char* op, const std::string& argument, nb::handle value, std::size_t count) {
  const auto tuple = field<nb::tuple>(op, argument, "a tuple", value);
  if (tuple.size() != count) {
    check::fail(op, argument.c_str(), std::to_string(count) + " fields",
                std::to_string(tuple.size()));
  }
  return tuple;
}

// Weights and norms of one call, what they point to, and the arrays whose memory that is.
class Parts {
 public:
  explicit Parts(const char* op) : op_(op) {}

  AdaptedWeight weight(const std::string& name, nb::handle linear) {
    const nb::tuple given = fields(op_, name, linear, 9);
    const auto integer = [&](std::size_t i) {
      return field<std::int64_t>(op_, name, "integers for its format", given[i]);
    };
    AdaptedWeight w;
    QuantFormat& format = w.weight.format;
    format = {static_cast<int>(integer(4)), integer(5), integer(6), integer(7)};
    check::format(op_, format);
    const std::string packed = name + ".packed";
    w.weight.packed = vector<std::uint8_t>(op_, packed.c_str(), array(packed, given[0]),
                                           static_cast<std::int64_t>(packed_size(format)));
    w.weight.scales = floats(name + ".scales", given[1]);
    if (!given[2].is_none()) {
      const std::string bias = name + ".bias";
      w.bias = vector<float>(op_, bias.c_str(), array(bias, given[2]), format.out_features);
    }
    if (!given[3].is_none()) {
      const std::string order = name + ".order";
      w.order =
          vector<std::int32_t>(op_, order.c_str(), array(order, given[3]), format.in_features);
    }
    const auto adapters = field<nb::tuple>(op_, name, "a tuple of adapters", given[8]);
    if (adapters.size() > 0) {
      std::vector<LowRank>& found = adapters_.emplace_back();
      for (const nb::handle item : adapters) {
        const nb::tuple adapter = fields(op_, name + "'s adapter", item, 3);
        found.push_back({floats(name + "'s adapter: a", adapter[0]),
                         floats(name + "'s adapter: b", adapter[1]),
                         field<float>(op_, name, "a number to scale an adapter by", adapter[2])});
      }
      w.adapters = found.data();
      w.adapter_count = found.size();
    }
    return w;
  }

  Norm norm(const std::string& name, nb::handle given) {
    if (given.is_none()) return {};
    const nb::tuple values = fields(op_, name, given, 2);
    return {const_matrix(op_, name.c_str(), array(name, values[0])),
            field<float>(op_, name, "a number for eps", values[1])};
  }

 private:
  const Array& array(const std::string& argument, nb::handle tensor) {
    const Array& found = arrays_.emplace_back(field<Array>(op_, argument, "a tensor", tensor));
    on_cpu(op_, {{argument.c_str(), &found}});
    return found;
  }

  View<const float> floats(const std::string& argument, nb::handle tensor) {
    return input<float>(op_, argument.c_str(), array(argument, tensor));
  }

  const char* op_;
  std::deque<Array> arrays_;
  std::deque<std::vector<LowRank>> adapters_;
};

void py_attend(const Array& q, const Array& keys, const Array& values, float scale,
               const Array& out) {
  const char* op = "attend";
  on_cpu(op, {{"q", &q}, {"keys", &keys}, {"values", &values}, {"out", &out}});
  const ConstMatrix in = const_matrix(op, "q", q);
  const ConstHeads k = heads(op, "keys", keys), v = heads(op, "values", values);
  const Matrix result = matrix(op, "out", out);
  nb::gil_scoped_release release;
  attend(in, k, v, scale, result);
}

void py_project_token(const Array& x, nb::handle norm_of_x, nb::handle q_proj, nb::handle k_proj,
                      nb::handle v_proj, nb::handle q_norm, nb::handle k_norm, const Array& cos,
                      const Array& sin, const Array& q, const Array& k, const Array& v) {
  const char* op = "project_token";
  on_cpu(op, {{"x", &x}, {"cos", &cos}, {"sin", &sin}, {"q", &q}, {"k", &k}, {"v", &v}});
  Parts parts(op);
  const Projections projections{parts.norm("norm", norm_of_x),  parts.weight("q_proj", q_proj),
                                parts.weight("k_proj", k_proj), parts.weight("v_proj", v_proj),
                                parts.norm("q_norm", q_norm),   parts.norm("k_norm", k_norm)};
  const ConstMatrix in = const_matrix(op, "x", x);
  const ConstMatrix c = const_matrix(op, "cos", cos), s = const_matrix(op, "sin", sin);
  const Matrix queries = matrix(op, "q", q), keys = matrix(op, "k", k), values = matrix(op, "v", v);
  nb::gil_scoped_release release;
  project_token(in, projections, c, s, queries, keys, values);
}

void py_finish_token(const Array& x, const Array& q, const Array& keys, const Array& values,
                     float scale, nb::handle o_proj, nb::handle norm_of_h, nb::handle gate_proj,
                     nb::handle up_proj, nb::handle down_proj, const Array& y) {
  const char* op = "finish_token";
  on_cpu(op, {{"x", &x}, {"q", &q}, {"keys", &keys}, {"values", &values}, {"y", &y}});
  Parts parts(op);
  const RestOfBlock rest{parts.weight("o_proj", o_proj), parts.norm("norm", norm_of_h),
                         parts.weight("gate_proj", gate_proj), parts.weight("up_proj", up_proj),
                         parts.weight("down_proj", down_proj)};
  const ConstMatrix in = const_matrix(op, "x", x), query = const_matrix(op, "q", q);
  const ConstHeads k = heads(op, "keys", keys), v = heads(op, "values", values);
  const Matrix out = matrix(op, "y", y);
  nb::gil_scoped_release release;
  finish_token(in, query, k, v, scale, rest, out);
}

}  // namespace

void init_decode(nb::module_& m) {
  m.def("attend", &py_attend);
  m.def("project_token", &py_project_token, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg());
  m.def("finish_token", &py_finish_token);
}

}  // namespace lowbitcore::python
