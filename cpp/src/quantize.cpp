#include <lowbitcore/quantize.h>

#include "call.h"
#include "grid.h"

namespace lowbitcore {

void check_scales_fit(const char* op, const View<float>& scales, const Execution& exec) {
  memory_of(exec).check_finite(op, "weight", "values whose scales fit fp16 (at most 65504)",
                               {scales.data, DType::f32, scales.rows, scales.cols, scales.stride},
                               exec.stream);
}

void quantize_rtn(ConstMatrix weight, const QuantFormat& format, const GridOptions& grid,
                  View<std::uint8_t> codes, View<float> scales, View<std::uint8_t> zeros,
                  const Execution& exec) {
  const char* op = "quantize_rtn";
  check::format(op, format);
  check::shape(op, "weight", weight, format.out_features, format.in_features);
  check::shape(op, "codes", codes, format.out_features, format.in_features);
  check::shape(op, "scales", scales, format.groups(), format.out_features);
  check::shape(op, "zeros", zeros, format.groups(), format.out_features);
  memory_of(exec).check_finite(op, "weight", "finite values", weight, exec.stream);
  const Backend& backend = backend_of(exec);
  const int threads = resolve_threads(exec);
  const Call call(op, exec, threads, backend.quantize_rtn_workspace(format, threads));
  backend.quantize_rtn(weight, format, grid, codes, scales, zeros, call);
  check_scales_fit(op, scales, exec);
}

std::size_t quantize_rtn_workspace_size(const QuantFormat& format, const Execution& exec) {
  check::format("quantize_rtn_workspace_size", format);
  return backend_of(exec).quantize_rtn_workspace(format, resolve_threads(exec));
}

void dequantize(const QuantWeight& weight, Matrix out, std::int64_t first_output,
                const Execution& exec) {
  const char* op = "dequantize";
  check::weight(op, weight, true, exec.device);
  const std::int64_t n = weight.format.out_features;
  if (first_output < 0 || first_output % 32 != 0 || first_output >= n) {
    check::fail(op, "first_output", "a multiple of 32 below " + std::to_string(n),
                std::to_string(first_output));
  }
  if (out.rows % 32 != 0 || out.rows > n - first_output) {
    check::fail(op, "out", "a multiple of 32 rows, at most " + std::to_string(n - first_output),
                std::to_string(out.rows));
  }
  check::shape(op, "out", out, out.rows, weight.format.in_features);
  backend_of(exec).dequantize(weight, out, first_output, Call(op, exec));
}

namespace {

void check_latent(const char* op, const LatentWeight& w) {
  check::bits(op, w.bits);
  check::vectors(op, "latent", w.latent);
  check::shape(op, "scales", w.scales, w.latent.rows, 1);
  check::shape(op, "zeros", w.zeros, w.latent.rows, 1);
}

}  // namespace

void add_fake_quantized(const LatentWeight& weight, Matrix out, const Execution& exec) {
  const char* op = "add_fake_quantized";
  check_latent(op, weight);
  check::shape(op, "out", out, weight.latent.rows, weight.latent.cols);
  backend_with(op, exec, &Backend::add_fake_quantized)
      .add_fake_quantized(weight, out, Call(op, exec));
}

void fake_quantized_grads(ConstMatrix dw, const LatentWeight& weight, View<float> d_latent,
                          View<float> d_scales, const Execution& exec) {
  const char* op = "fake_quantized_grads";
  check_latent(op, weight);
  check::shape(op, "dw", dw, weight.latent.rows, weight.latent.cols);
  check::shape(op, "d_latent", d_latent, weight.latent.rows, weight.latent.cols);
  check::shape(op, "d_scales", d_scales, weight.latent.rows, 1);
  backend_with(op, exec, &Backend::fake_quantized_grads)
      .fake_quantized_grads(dw, weight, d_latent, d_scales, Call(op, exec));
}

}  // namespace lowbitcore
