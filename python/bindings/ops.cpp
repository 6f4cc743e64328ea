// Operations on DLPack arrays; outputs are given by the caller. The interpreter lock is released
// while the core computes.
#include <lowbitcore/lowbitcore.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <optional>

#include "check.h"
#include "views.h"

namespace lowbitcore::python {

namespace {

using i64 = std::int64_t;
using OptionalArray = std::optional<Array>;

const Array* present(const OptionalArray& array) { return array ? &*array : nullptr; }

// A packed weight of `format`; `scales` is left out where an operation does not read them.
QuantWeight weight(const char* op, const QuantFormat& format, const Array& packed,
                   const Array* scales, const OptionalArray& g_idx) {
  check::format(op, format);
  QuantWeight w;
  w.format = format;
  w.packed = vector<std::uint8_t>(op, "packed", packed, static_cast<i64>(packed_size(format)));
  if (scales != nullptr) w.scales = input<float>(op, "scales", *scales);
  if (g_idx) w.g_idx = vector<std::int32_t>(op, "g_idx", *g_idx, format.in_features);
  return w;
}

void py_pack_qweight(const Array& codes, int bits, const Array& qweight) {
  const char* op = "pack_qweight";
  on_cpu(op, {{"codes", &codes}, {"qweight", &qweight}});
  const auto in = input<std::uint8_t>(op, "codes", codes);
  const auto out = view<std::int32_t>(op, "qweight", qweight);
  nb::gil_scoped_release release;
  pack_qweight(in, bits, out);
}

void py_unpack_qweight(const Array& qweight, int bits, const Array& codes) {
  const char* op = "unpack_qweight";
  on_cpu(op, {{"codes", &codes}, {"qweight", &qweight}});
  const auto in = input<std::int32_t>(op, "qweight", qweight);
  const auto out = view<std::uint8_t>(op, "codes", codes);
  nb::gil_scoped_release release;
  unpack_qweight(in, bits, out);
}

void py_pack_qzeros(const Array& zeros, int bits, const Array& qzeros) {
  const char* op = "pack_qzeros";
  on_cpu(op, {{"zeros", &zeros}, {"qzeros", &qzeros}});
  const auto in = input<std::uint8_t>(op, "zeros", zeros);
  const auto out = view<std::int32_t>(op, "qzeros", qzeros);
  nb::gil_scoped_release release;
  pack_qzeros(in, bits, out);
}

void py_unpack_qzeros(const Array& qzeros, int bits, const Array& zeros) {
  const char* op = "unpack_qzeros";
  on_cpu(op, {{"zeros", &zeros}, {"qzeros", &qzeros}});
  const auto in = input<std::int32_t>(op, "qzeros", qzeros);
  const auto out = view<std::uint8_t>(op, "zeros", zeros);
  nb::gil_scoped_release release;
  unpack_qzeros(in, bits, out);
}

void py_check_format(const char* op, int bits, i64 group_size, i64 in_features, i64 out_features) {
  check::format(op, {bits, group_size, in_features, out_features});
}

i64 py_packed_size(int bits, i64 group_size, i64 in_features, i64 out_features) {
  return static_cast<i64>(packed_size({bits, group_size, in_features, out_features}));
}

void py_prepack(const Array& qweight, const Array& qzeros, int bits, i64 group_size,
                i64 in_features, i64 out_features, const Array& packed, std::uintptr_t stream) {
  const char* op = "prepack";
  const Execution exec =
      on_one_device(op, stream, {{"qweight", &qweight}, {"qzeros", &qzeros}, {"packed", &packed}});
  const QuantFormat format{bits, group_size, in_features, out_features};
  check::format(op, format);
  const auto words = input<std::int32_t>(op, "qweight", qweight);
  const auto zeros = input<std::int32_t>(op, "qzeros", qzeros);
  auto* out = vector<std::uint8_t>(op, "packed", packed, static_cast<i64>(packed_size(format)));
  nb::gil_scoped_release release;
  prepack(format, words, zeros, out, exec);
}

void py_unpack(const Array& packed, int bits, i64 group_size, i64 in_features, i64 out_features,
               const Array& qweight, const Array& qzeros, std::uintptr_t stream) {
  const char* op = "unpack";
  const Execution exec =
      on_one_device(op, stream, {{"packed", &packed}, {"qweight", &qweight}, {"qzeros", &qzeros}});
  const QuantFormat format{bits, group_size, in_features, out_features};
  check::format(op, format);
  const auto* in =
      vector<std::uint8_t>(op, "packed", packed, static_cast<i64>(packed_size(format)));
  const auto words = view<std::int32_t>(op, "qweight", qweight);
  const auto zeros = view<std::int32_t>(op, "qzeros", qzeros);
  nb::gil_scoped_release release;
  unpack(format, in, words, zeros, exec);
}

void py_dequantize(const Array& packed, const Array& scales, const OptionalArray& g_idx, int bits,
                   i64 group_size, i64 in_features, i64 out_features, i64 first_output,
                   const Array& out, std::uintptr_t stream) {
  const char* op = "dequantize";
  const Execution exec = on_one_device(
      op, stream,
      {{"packed", &packed}, {"scales", &scales}, {"g_idx", present(g_idx)}, {"out", &out}});
  const QuantWeight w =
      weight(op, {bits, group_size, in_features, out_features}, packed, &scales, g_idx);
  const Matrix dense = matrix(op, "out", out);
  nb::gil_scoped_release release;
  dequantize(w, dense, first_output, exec);
}

void py_qgemm_nt(const Array& x, const Array& packed, const Array& scales,
                 const OptionalArray& g_idx, const OptionalArray& bias, const OptionalArray& order,
                 int bits, i64 group_size, i64 in_features, i64 out_features, const Array& y,
                 std::uintptr_t stream) {
  const char* op = "qgemm_nt";
  const Execution exec = on_one_device(op, stream,
                                       {{"x", &x},
                                        {"packed", &packed},
                                        {"scales", &scales},
                                        {"g_idx", present(g_idx)},
                                        {"bias", present(bias)},
                                        {"order", present(order)},
                                        {"y", &y}});
  const QuantWeight w =
      weight(op, {bits, group_size, in_features, out_features}, packed, &scales, g_idx);
  const float* b = bias ? vector<float>(op, "bias", *bias, out_features) : nullptr;
  const auto* columns = order ? vector<std::int32_t>(op, "order", *order, in_features) : nullptr;
  const ConstMatrix in = const_matrix(op, "x", x);
  const Matrix out = matrix(op, "y", y);
  nb::gil_scoped_release release;
  qgemm_nt_in_order(in, columns, w, b, out, exec);
}

void py_qgemm_nn(const Array& dy, const Array& packed, const Array& scales,
                 const OptionalArray& g_idx, int bits, i64 group_size, i64 in_features,
                 i64 out_features, const Array& dx, std::uintptr_t stream) {
  const char* op = "qgemm_nn";
  const Execution exec = on_one_device(op, stream,
                                       {{"dy", &dy},
                                        {"packed", &packed},
                                        {"scales", &scales},
                                        {"g_idx", present(g_idx)},
                                        {"dx", &dx}});
  const QuantWeight w =
      weight(op, {bits, group_size, in_features, out_features}, packed, &scales, g_idx);
  const ConstMatrix in = const_matrix(op, "dy", dy);
  const Matrix out = matrix(op, "dx", dx);
  nb::gil_scoped_release release;
  qgemm_nn(in, w, out, exec);
}

void py_qgemm_grad_scales(const Array& dy, const Array& x, const Array& packed,
                          const OptionalArray& g_idx, int bits, i64 group_size, i64 in_features,
                          i64 out_features, const Array& ds, std::uintptr_t stream) {
  const char* op = "qgemm_grad_scales";
  const Execution exec = on_one_device(
      op, stream,
      {{"dy", &dy}, {"x", &x}, {"packed", &packed}, {"g_idx", present(g_idx)}, {"ds", &ds}});
  const QuantWeight w =
      weight(op, {bits, group_size, in_features, out_features}, packed, nullptr, g_idx);
  const ConstMatrix dy_in = const_matrix(op, "dy", dy), x_in = const_matrix(op, "x", x);
  const auto out = view<float>(op, "ds", ds);
  nb::gil_scoped_release release;
  qgemm_grad_scales(dy_in, x_in, w, out, exec);
}

void py_permute_columns(const Array& x, const Array& order, const Array& y) {
  const char* op = "permute_columns";
  on_cpu(op, {{"x", &x}, {"order", &order}, {"y", &y}});
  const ConstMatrix in = const_matrix(op, "x", x);
  const auto* columns = vector<std::int32_t>(op, "order", order, in.cols);
  const Matrix out = matrix(op, "y", y);
  nb::gil_scoped_release release;
  permute_columns(in, columns, out);
}

void py_gemm_nt(const Array& x, const Array& weight, const OptionalArray& bias, const Array& y) {
  const char* op = "gemm_nt";
  on_cpu(op, {{"x", &x}, {"weight", &weight}, {"bias", present(bias)}, {"y", &y}});
  const ConstMatrix in = const_matrix(op, "x", x), w = const_matrix(op, "weight", weight);
  const float* b = bias ? vector<float>(op, "bias", *bias, w.rows) : nullptr;
  const Matrix out = matrix(op, "y", y);
  nb::gil_scoped_release release;
  gemm_nt(in, w, b, out);
}

void py_gemm_nn(const Array& x, const Array& weight, const OptionalArray& bias, const Array& y) {
  const char* op = "gemm_nn";
  on_cpu(op, {{"x", &x}, {"weight", &weight}, {"bias", present(bias)}, {"y", &y}});
  const ConstMatrix in = const_matrix(op, "x", x), w = const_matrix(op, "weight", weight);
  const float* b = bias ? vector<float>(op, "bias", *bias, w.cols) : nullptr;
  const Matrix out = matrix(op, "y", y);
  nb::gil_scoped_release release;
  gemm_nn(in, w, b, out);
}

void py_add_low_rank(const Array& y, const Array& x, const Array& a, const Array& b, float scaling,
                     const Array& low, const Array& sum) {
  const char* op = "add_low_rank";
  on_cpu(op, {{"y", &y}, {"x", &x}, {"a", &a}, {"b", &b}, {"low", &low}, {"sum", &sum}});
  const ConstMatrix to = const_matrix(op, "y", y), in = const_matrix(op, "x", x);
  const LowRank adapter{input<float>(op, "a", a), input<float>(op, "b", b), scaling};
  const auto narrow = view<float>(op, "low", low);
  const Matrix out = matrix(op, "sum", sum);
  nb::gil_scoped_release release;
  add_low_rank(to, in, adapter, narrow, out);
}

void py_add_low_rank_backward(const Array& dy, const OptionalArray& x, const OptionalArray& low,
                              const Array& a, const Array& b, float scaling,
                              const OptionalArray& dx, const OptionalArray& da,
                              const OptionalArray& db) {
  const char* op = "add_low_rank_backward";
  const auto given = [](const OptionalArray& array) { return array ? &*array : nullptr; };
  on_cpu(op, {{"dy", &dy},
              {"x", given(x)},
              {"low", given(low)},
              {"a", &a},
              {"b", &b},
              {"dx", given(dx)},
              {"da", given(da)},
              {"db", given(db)}});
  const ConstMatrix grad = const_matrix(op, "dy", dy);
  const LowRank adapter{input<float>(op, "a", a), input<float>(op, "b", b), scaling};
  ConstMatrix in;
  View<const float> narrow;
  if (x) in = const_matrix(op, "x", *x);
  if (low) narrow = input<float>(op, "low", *low);
  LowRankGrads grads;
  if (dx) grads.dx = matrix(op, "dx", *dx);
  if (da) grads.da = view<float>(op, "da", *da);
  if (db) grads.db = view<float>(op, "db", *db);
  nb::gil_scoped_release release;
  add_low_rank_backward(grad, in, narrow, adapter, grads);
}

void py_attention(const Array& q, const Array& k, const Array& v, float scale, const Array& out,
                  const Array& lse) {
  const char* op = "attention";
  on_cpu(op, {{"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}, {"lse", &lse}});
  const AttentionInputs in{heads(op, "q", q), heads(op, "k", k), heads(op, "v", v), scale};
  const Heads o = heads(op, "out", out);
  const auto logs = view<float>(op, "lse", lse);
  nb::gil_scoped_release release;
  attention(in, o, logs);
}

void py_attention_backward(const Array& d_out, const Array& q, const Array& k, const Array& v,
                           const Array& out, const Array& lse, float scale, const Array& dq,
                           const Array& dk, const Array& dv) {
  const char* op = "attention_backward";
  on_cpu(op, {{"d_out", &d_out},
              {"q", &q},
              {"k", &k},
              {"v", &v},
              {"out", &out},
              {"lse", &lse},
              {"dq", &dq},
              {"dk", &dk},
              {"dv", &dv}});
  const AttentionInputs in{heads(op, "q", q), heads(op, "k", k), heads(op, "v", v), scale};
  const Heads g = heads(op, "d_out", d_out), o = heads(op, "out", out);
  const auto logs = input<float>(op, "lse", lse);
  const Heads grad_q = heads(op, "dq", dq);
  const Heads grad_k = heads(op, "dk", dk), grad_v = heads(op, "dv", dv);
  nb::gil_scoped_release release;
  attention_backward(g, in, o, logs, grad_q, grad_k, grad_v);
}

void py_quantize_rtn(const Array& weight, int bits, i64 group_size, bool sym, bool mse,
                     const Array& codes, const Array& scales, const Array& zeros,
                     std::uintptr_t stream) {
  const char* op = "quantize_rtn";
  const Execution exec = on_one_device(
      op, stream, {{"weight", &weight}, {"codes", &codes}, {"scales", &scales}, {"zeros", &zeros}});
  const ConstMatrix w = const_matrix(op, "weight", weight);
  const QuantFormat format{bits, group_size, w.cols, w.rows};
  const auto q = view<std::uint8_t>(op, "codes", codes);
  const auto s = view<float>(op, "scales", scales);
  const auto z = view<std::uint8_t>(op, "zeros", zeros);
  nb::gil_scoped_release release;
  quantize_rtn(w, format, {sym, mse}, q, s, z, exec);
}

void py_accumulate_hessian(const Array& hessian, const Array& x) {
  const char* op = "accumulate_hessian";
  on_cpu(op, {{"hessian", &hessian}, {"x", &x}});
  const auto h = view<float>(op, "hessian", hessian);
  const ConstMatrix in = const_matrix(op, "x", x);
  nb::gil_scoped_release release;
  accumulate_hessian(in, h);
}

void py_accumulate_cross(const Array& cross, const Array& a, const Array& b) {
  const char* op = "accumulate_cross";
  on_cpu(op, {{"cross", &cross}, {"a", &a}, {"b", &b}});
  const auto c = view<float>(op, "cross", cross);
  const ConstMatrix left = const_matrix(op, "a", a), right = const_matrix(op, "b", b);
  nb::gil_scoped_release release;
  accumulate_cross(left, right, c);
}

double py_gptq_factorize(const Array& hessian, double percdamp, bool act_order, const Array& order,
                         const Array& dead, const Array& u) {
  const char* op = "gptq_factorize";
  on_cpu(op, {{"hessian", &hessian}, {"order", &order}, {"dead", &dead}, {"u", &u}});
  const auto h = input<float>(op, "hessian", hessian);
  auto* permutation = vector<std::int32_t>(op, "order", order, h.rows);
  auto* is_dead = vector<std::uint8_t>(op, "dead", dead, h.rows);
  const auto factor = view<float>(op, "u", u);
  nb::gil_scoped_release release;
  return gptq_factorize(h, {percdamp, act_order}, permutation, is_dead, factor);
}

double py_gptq_quantize(const Array& weight, const Array& order, const Array& dead, const Array& u,
                        int bits, i64 group_size, bool sym, bool mse, bool static_groups,
                        const Array& codes, const Array& scales, const Array& zeros,
                        const Array& g_idx, std::uintptr_t stream) {
  const char* op = "gptq_quantize";
  const Execution exec = on_one_device(op, stream,
                                       {{"weight", &weight},
                                        {"order", &order},
                                        {"dead", &dead},
                                        {"u", &u},
                                        {"codes", &codes},
                                        {"scales", &scales},
                                        {"zeros", &zeros},
                                        {"g_idx", &g_idx}});
  const ConstMatrix w = const_matrix(op, "weight", weight);
  const QuantFormat format{bits, group_size, w.cols, w.rows};
  const auto* permutation = vector<std::int32_t>(op, "order", order, w.cols);
  const auto* is_dead = vector<std::uint8_t>(op, "dead", dead, w.cols);
  const auto factor = input<float>(op, "u", u);
  const auto q = view<std::uint8_t>(op, "codes", codes);
  const auto s = view<float>(op, "scales", scales);
  const auto z = view<std::uint8_t>(op, "zeros", zeros);
  auto* groups = vector<std::int32_t>(op, "g_idx", g_idx, w.cols);
  nb::gil_scoped_release release;
  return gptq_quantize(w, permutation, is_dead, factor, format, {{sym, mse}, static_groups}, q, s,
                       z, groups, exec);
}

LatentWeight latent_weight(const char* op, const Array& latent, const Array& scales,
                           const Array& zeros, int bits) {
  return {input<float>(op, "latent", latent), input<float>(op, "scales", scales),
          input<float>(op, "zeros", zeros), bits};
}

void py_add_fake_quantized(const Array& out, const Array& latent, const Array& scales,
                           const Array& zeros, int bits) {
  const char* op = "add_fake_quantized";
  on_cpu(op, {{"out", &out}, {"latent", &latent}, {"scales", &scales}, {"zeros", &zeros}});
  const LatentWeight w = latent_weight(op, latent, scales, zeros, bits);
  const Matrix sum = matrix(op, "out", out);
  nb::gil_scoped_release release;
  add_fake_quantized(w, sum);
}

void py_fake_quantized_grads(const Array& dw, const Array& latent, const Array& scales,
                             const Array& zeros, int bits, const Array& d_latent,
                             const Array& d_scales) {
  const char* op = "fake_quantized_grads";
  on_cpu(op, {{"dw", &dw},
              {"latent", &latent},
              {"scales", &scales},
              {"zeros", &zeros},
              {"d_latent", &d_latent},
              {"d_scales", &d_scales}});
  const LatentWeight w = latent_weight(op, latent, scales, zeros, bits);
  const ConstMatrix gradient = const_matrix(op, "dw", dw);
  const auto of_latent = view<float>(op, "d_latent", d_latent);
  const auto of_scales = view<float>(op, "d_scales", d_scales);
  nb::gil_scoped_release release;
  fake_quantized_grads(gradient, w, of_latent, of_scales);
}

void py_rms_norm(const Array& x, const Array& weight, float eps, const Array& y) {
  const char* op = "rms_norm";
  on_cpu(op, {{"x", &x}, {"weight", &weight}, {"y", &y}});
  const ConstMatrix in = const_matrix(op, "x", x), w = const_matrix(op, "weight", weight);
  const Matrix out = matrix(op, "y", y);
  nb::gil_scoped_release release;
  rms_norm(in, w, eps, out);
}

void py_rms_norm_backward(const Array& dy, const Array& x, const Array& weight, float eps,
                          const Array& dx) {
  const char* op = "rms_norm_backward";
  on_cpu(op, {{"dy", &dy}, {"x", &x}, {"weight", &weight}, {"dx", &dx}});
  const ConstMatrix grad = const_matrix(op, "dy", dy), in = const_matrix(op, "x", x);
  const ConstMatrix w = const_matrix(op, "weight", weight);
  const Matrix out = matrix(op, "dx", dx);
  nb::gil_scoped_release release;
  rms_norm_backward(grad, in, w, eps, out);
}

void py_rotate(const Array& x, const Array& cos, const Array& sin, bool inverse, const Array& y) {
  const char* op = "rotate";
  on_cpu(op, {{"x", &x}, {"cos", &cos}, {"sin", &sin}, {"y", &y}});
  const ConstMatrix in = const_matrix(op, "x", x);
  const ConstMatrix c = const_matrix(op, "cos", cos), s = const_matrix(op, "sin", sin);
  const Matrix out = matrix(op, "y", y);
  nb::gil_scoped_release release;
  rotate(in, c, s, inverse, out);
}

void py_swiglu(const Array& gate, const Array& up, const Array& out) {
  const char* op = "swiglu";
  on_cpu(op, {{"gate", &gate}, {"up", &up}, {"out", &out}});
  const ConstMatrix g = const_matrix(op, "gate", gate), u = const_matrix(op, "up", up);
  const Matrix product = matrix(op, "out", out);
  nb::gil_scoped_release release;
  swiglu(g, u, product);
}

void py_swiglu_backward(const Array& d_out, const Array& gate, const Array& up, const Array& d_gate,
                        const Array& d_up) {
  const char* op = "swiglu_backward";
  on_cpu(op,
         {{"d_out", &d_out}, {"gate", &gate}, {"up", &up}, {"d_gate", &d_gate}, {"d_up", &d_up}});
  const ConstMatrix grad = const_matrix(op, "d_out", d_out);
  const ConstMatrix g = const_matrix(op, "gate", gate), u = const_matrix(op, "up", up);
  const Matrix of_gate = matrix(op, "d_gate", d_gate), of_up = matrix(op, "d_up", d_up);
  nb::gil_scoped_release release;
  swiglu_backward(grad, g, u, of_gate, of_up);
}

void py_dropout(const Array& x, std::uint64_t seed, std::uint32_t dropped, const Array& y) {
  const char* op = "dropout";
  on_cpu(op, {{"x", &x}, {"y", &y}});
  const ConstMatrix in = const_matrix(op, "x", x);
  const Matrix out = matrix(op, "y", y);
  nb::gil_scoped_release release;
  dropout(in, seed, dropped, out);
}

void py_token_losses(const Array& logits, const Array& targets, float lambda_ce,
                     const OptionalArray& teacher, float lambda_kl, bool reverse,
                     const Array& losses, const OptionalArray& gradient) {
  const char* op = "token_losses";
  on_cpu(op, {{"logits", &logits},
              {"targets", &targets},
              {"teacher", present(teacher)},
              {"losses", &losses},
              {"gradient", present(gradient)}});
  const ConstMatrix in = const_matrix(op, "logits", logits);
  const auto wanted = input<i64>(op, "targets", targets);
  LossTerms terms{lambda_ce, {}, lambda_kl, reverse};
  if (teacher) terms.teacher = const_matrix(op, "teacher", *teacher);
  const auto values = view<float>(op, "losses", losses);
  const Matrix out = gradient ? matrix(op, "gradient", *gradient) : Matrix{};
  nb::gil_scoped_release release;
  token_losses(in, wanted, terms, values, out);
}

}  // namespace

void init_ops(nb::module_& m) {
  m.def("pack_qweight", &py_pack_qweight);
  m.def("unpack_qweight", &py_unpack_qweight);
  m.def("pack_qzeros", &py_pack_qzeros);
  m.def("unpack_qzeros", &py_unpack_qzeros);
  m.def("check_format", &py_check_format);
  m.def("packed_size", &py_packed_size);
  m.def("prepack", &py_prepack);
  m.def("unpack", &py_unpack);
  m.def("dequantize", &py_dequantize);
  m.def("qgemm_nt", &py_qgemm_nt);
  m.def("qgemm_nn", &py_qgemm_nn);
  m.def("qgemm_grad_scales", &py_qgemm_grad_scales);
  m.def("permute_columns", &py_permute_columns);
  m.def("gemm_nt", &py_gemm_nt);
  m.def("gemm_nn", &py_gemm_nn);
  m.def("add_low_rank", &py_add_low_rank);
  m.def("add_low_rank_backward", &py_add_low_rank_backward);
  m.def("attention", &py_attention);
  m.def("attention_backward", &py_attention_backward);
  m.def("quantize_rtn", &py_quantize_rtn);
  m.def("accumulate_hessian", &py_accumulate_hessian);
  m.def("accumulate_cross", &py_accumulate_cross);
  m.def("gptq_factorize", &py_gptq_factorize);
  m.def("gptq_quantize", &py_gptq_quantize);
  m.def("add_fake_quantized", &py_add_fake_quantized);
  m.def("fake_quantized_grads", &py_fake_quantized_grads);
  m.def("rms_norm", &py_rms_norm);
  m.def("rms_norm_backward", &py_rms_norm_backward);
  m.def("rotate", &py_rotate);
  m.def("swiglu", &py_swiglu);
  m.def("swiglu_backward", &py_swiglu_backward);
  m.def("dropout", &py_dropout);
  m.def("token_losses", &py_token_losses);
}

}  // namespace lowbitcore::python
