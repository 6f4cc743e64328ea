#include <lowbitcore/gptq.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "backend.h"
#include "check.h"
#include "grid.h"
#include "linalg.h"
#include "parallel.h"

namespace lowbitcore {

namespace {

void check_square(const char* op, const char* argument, const View<const float>& m) {
  if (m.rows <= 0 || m.rows % 32 != 0) {
    check::fail(op, argument, "a positive multiple of 32 rows", std::to_string(m.rows));
  }
  check::shape(op, argument, m, m.rows, m.rows);
}

}  // namespace

void accumulate_hessian(ConstMatrix x, View<float> hessian, const Execution& exec) {
  const char* op = "accumulate_hessian";
  check_square(op, "hessian", {hessian.data, hessian.rows, hessian.cols, hessian.stride});
  check::shape(op, "x", x, x.rows, hessian.rows);
  if (x.rows == 0) return;
  const Backend& backend = cpu_backend();
  backend.accumulate_hessian(
      x, hessian, resolve_threads(exec.num_threads),
      workspace(op, exec, backend.accumulate_hessian_workspace(x.rows, x.cols)));
}

void accumulate_cross(ConstMatrix a, ConstMatrix b, View<float> cross, const Execution& exec) {
  const char* op = "accumulate_cross";
  check_square(op, "cross", {cross.data, cross.rows, cross.cols, cross.stride});
  check::shape(op, "a", a, a.rows, cross.rows);
  check::shape(op, "b", b, a.rows, cross.rows);
  if (a.rows == 0) return;
  const Backend& backend = cpu_backend();
  backend.accumulate_cross(a, b, cross, resolve_threads(exec.num_threads),
                           workspace(op, exec, backend.accumulate_cross_workspace(a.rows, a.cols)));
}

double gptq_factorize(View<const float> hessian, const FactorOptions& options, std::int32_t* order,
                      std::uint8_t* dead, View<float> u) {
  const char* op = "gptq_factorize";
  check_square(op, "hessian", hessian);
  const std::int64_t k = hessian.rows;
  check::shape(op, "u", u, k, k);
  if (!(options.percdamp >= 0.0 && options.percdamp <= 1.0)) {
    check::fail(op, "percdamp", "a fraction from 0 to 1", std::to_string(options.percdamp));
  }
  check::finite(op, "hessian", hessian);

  const auto diagonal = [&](std::int64_t i) { return hessian.data[i * hessian.stride + i]; };
  double sum = 0.0;
  std::int64_t live = 0;
  for (std::int64_t i = 0; i < k; ++i) {
    dead[i] = diagonal(i) == 0.0f;
    if (!dead[i]) {
      sum += diagonal(i);
      ++live;
    }
  }
  const double mean = live > 0 ? sum / static_cast<double>(live) : 1.0;

  std::iota(order, order + k, 0);
  if (options.act_order) {
    std::stable_sort(order, order + k,
                     [&](std::int32_t a, std::int32_t b) { return diagonal(a) > diagonal(b); });
  }

  constexpr int kRaises = 3;
  double percdamp = options.percdamp;
  for (int attempt = 0; attempt <= kRaises; ++attempt) {
    if (inverse_factor(hessian, order, dead, mean, percdamp * mean, u)) return percdamp;
    if (attempt < kRaises) percdamp = percdamp > 0.0 ? percdamp * 10.0 : 1e-4;
  }
  throw Error("gptq_factorize: hessian: not positive definite, even with percdamp raised from " +
              std::to_string(options.percdamp) + " to " + std::to_string(percdamp));
}

double gptq_quantize(ConstMatrix weight, const std::int32_t* order, const std::uint8_t* dead,
                     View<const float> u, const QuantFormat& format, const GptqOptions& options,
                     View<std::uint8_t> codes, View<float> scales, View<std::uint8_t> zeros,
                     std::int32_t* g_idx, const Execution& exec) {
  const char* op = "gptq_quantize";
  check::format(op, format);
  const std::int64_t n = format.out_features, k = format.in_features;
  check::shape(op, "weight", weight, n, k);
  check::shape(op, "u", u, k, k);
  check::shape(op, "codes", codes, n, k);
  check::shape(op, "scales", scales, format.groups(), n);
  check::shape(op, "zeros", zeros, format.groups(), n);
  check::permutation(op, "order", order, k);
  check::finite(op, "weight", weight);
  for (std::int64_t i = 0; i < k; ++i) {
    const float d = u.data[i * u.stride + i];
    if (!(d > 0.0f && std::isfinite(d))) {
      check::fail(op, "u", "a factor with a positive diagonal",
                  std::to_string(d) + " at " + std::to_string(i));
    }
  }

  // GPTQ's objective is the sum of (w - q)^2 / U_ii^2 with w as updated: grids minimise those
  // terms.
  std::vector<float> importance(static_cast<std::size_t>(k));
  for (std::int64_t i = 0; i < k; ++i) {
    const float d = u.data[i * u.stride + i];
    importance[static_cast<std::size_t>(options.static_groups ? order[i] : i)] = 1.0f / (d * d);
  }
  std::vector<double> loss(static_cast<std::size_t>((n + kLanes - 1) / kLanes), 0.0);
  cpu_backend().gptq({weight, order, dead, u, importance.data(), format, options, codes, scales,
                      zeros, loss.data()},
                     resolve_threads(exec.num_threads));
  check_scales_fit(op, scales);

  const std::int64_t group = format.group_size == -1 ? k : format.group_size;
  for (std::int64_t i = 0; i < k; ++i) {
    g_idx[options.static_groups ? i : order[i]] = static_cast<std::int32_t>(i / group);
  }
  return std::accumulate(loss.begin(), loss.end(), 0.0);
}

}  // namespace lowbitcore
