#include <lowbitcore/quantize.h>

#include <cmath>
#include <string>

#include "backend.h"
#include "check.h"
#include "grid.h"
#include "parallel.h"

namespace lowbitcore {

void check_scales_fit(const char* op, const View<float>& scales) {
  for (std::int64_t g = 0; g < scales.rows; ++g) {
    for (std::int64_t n = 0; n < scales.cols; ++n) {
      if (!std::isfinite(scales.data[g * scales.stride + n])) {
        check::fail(op, "weight", "values whose scales fit fp16 (at most 65504)",
                    "a range beyond that in row " + std::to_string(n));
      }
    }
  }
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
  check::finite(op, "weight", weight);
  cpu_backend().quantize_rtn(weight, format, grid, codes, scales, zeros,
                             resolve_threads(exec.num_threads));
  check_scales_fit(op, scales);
}

void dequantize(const QuantWeight& weight, Matrix out, const Execution& exec) {
  const char* op = "dequantize";
  check::weight(op, weight, true);
  check::shape(op, "out", out, weight.format.out_features, weight.format.in_features);
  cpu_backend().dequantize(weight, out, resolve_threads(exec.num_threads));
}

}  // namespace lowbitcore
