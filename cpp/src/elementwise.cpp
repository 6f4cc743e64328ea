#include <lowbitcore/elementwise.h>

#include <cmath>
#include <string>

#include "call.h"

namespace lowbitcore {

namespace {

void check_norm(const char* op, const ConstMatrix& x, const ConstMatrix& weight, float eps) {
  check::vectors(op, "x", x);
  check::shape(op, "weight", weight, 1, x.cols);
  check::same_dtype(op, "weight", weight.dtype, "x", x.dtype);
  if (!(eps >= 0.0f) || !std::isfinite(eps)) {
    check::fail(op, "eps", "a number of 0 or more", std::to_string(eps));
  }
}

void check_gate(const char* op, const ConstMatrix& gate, const ConstMatrix& up) {
  check::vectors(op, "gate", gate);
  check::like(op, "up", up, "gate", gate);
}

}  // namespace

void rms_norm(ConstMatrix x, ConstMatrix weight, float eps, Matrix y, const Execution& exec) {
  const char* op = "rms_norm";
  check_norm(op, x, weight, eps);
  check::like(op, "y", y, "x", x);
  backend_with(op, exec, &Backend::rms_norm).rms_norm(x, weight, eps, y, Call(op, exec));
}

void rms_norm_backward(ConstMatrix dy, ConstMatrix x, ConstMatrix weight, float eps, Matrix dx,
                       const Execution& exec) {
  const char* op = "rms_norm_backward";
  check_norm(op, x, weight, eps);
  check::like(op, "dy", dy, "x", x);
  check::like(op, "dx", dx, "x", x);
  backend_with(op, exec, &Backend::rms_norm_backward)
      .rms_norm_backward(dy, x, weight, eps, dx, Call(op, exec));
}

void rotate(ConstMatrix x, ConstMatrix cos, ConstMatrix sin, bool inverse, Matrix y,
            const Execution& exec) {
  const char* op = "rotate";
  check::vectors(op, "x", x);
  check::like(op, "y", y, "x", x);
  if (cos.cols <= 0 || cos.cols % 64 != 0 || x.cols % cos.cols != 0) {
    check::fail(op, "cos", "a multiple of 64 columns that divides x's " + std::to_string(x.cols),
                std::to_string(cos.cols));
  }
  if (cos.rows <= 0 || x.rows % cos.rows != 0) {
    check::fail(op, "cos", "a number of rows that divides x's " + std::to_string(x.rows),
                std::to_string(cos.rows));
  }
  check::shape(op, "cos", cos, cos.rows, cos.cols);
  check::same_dtype(op, "cos", cos.dtype, "x", x.dtype);
  check::like(op, "sin", sin, "cos", cos);
  backend_with(op, exec, &Backend::rotate).rotate(x, cos, sin, inverse, y, Call(op, exec));
}

void swiglu(ConstMatrix gate, ConstMatrix up, Matrix out, const Execution& exec) {
  const char* op = "swiglu";
  check_gate(op, gate, up);
  check::like(op, "out", out, "gate", gate);
  backend_with(op, exec, &Backend::swiglu).swiglu(gate, up, out, Call(op, exec));
}

void swiglu_backward(ConstMatrix d_out, ConstMatrix gate, ConstMatrix up, Matrix d_gate,
                     Matrix d_up, const Execution& exec) {
  const char* op = "swiglu_backward";
  check_gate(op, gate, up);
  check::like(op, "d_out", d_out, "gate", gate);
  check::like(op, "d_gate", d_gate, "gate", gate);
  check::like(op, "d_up", d_up, "gate", gate);
  backend_with(op, exec, &Backend::swiglu_backward)
      .swiglu_backward(d_out, gate, up, d_gate, d_up, Call(op, exec));
}

void dropout(ConstMatrix x, std::uint64_t seed, std::uint32_t dropped, Matrix y,
             const Execution& exec) {
  const char* op = "dropout";
  check::vectors(op, "x", x);
  check::like(op, "y", y, "x", x);
  if (dropped >= 1u << 16) check::fail(op, "dropped", "less than 65536", std::to_string(dropped));
  backend_with(op, exec, &Backend::dropout).dropout(x, seed, dropped, y, Call(op, exec));
}

}  // namespace lowbitcore
