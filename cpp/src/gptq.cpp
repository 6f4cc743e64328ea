#include <lowbitcore/gptq.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "call.h"
#include "grid.h"
#include "linalg.h"

namespace lowbitcore {

namespace {

void check_square(const char* op, const char* argument, const View<const float>& m) {
  if (m.rows <= 0 || m.rows % 32 != 0) {
    check::fail(op, argument, "a positive multiple of 32 rows", std::to_string(m.rows));
  }
  check::shape(op, argument, m, m.rows, m.rows);
}

// Room for an array, so that the next one is aligned to 64 bytes.
template <typename T>
std::size_t room(std::size_t count) {
  return (count * sizeof(T) + 63) / 64 * 64;
}

// Of gptq_quantize: the backend's, the importance of columns, and a loss for each strip of outputs.
struct Scratch {
  std::size_t of_backend, columns, strips;

  Scratch(const Backend& backend, const QuantFormat& format, int threads)
      : of_backend(room<char>(backend.gptq_workspace(format, threads))),
        columns(static_cast<std::size_t>(format.in_features)),
        strips(
            static_cast<std::size_t>((format.out_features + kStripOutputs - 1) / kStripOutputs)) {}

  std::size_t bytes() const { return of_backend + room<float>(columns) + room<double>(strips); }
};

std::size_t sized(const char* op, std::size_t (*size)(std::int64_t, std::int64_t),
                  std::int64_t rows, std::int64_t cols) {
  check::row_count(op, "rows", rows);
  check::columns(op, "cols", cols);
  return rows == 0 ? 0 : size(rows, cols);
}

}  // namespace

void accumulate_hessian(ConstMatrix x, View<float> hessian, const Execution& exec) {
  const char* op = "accumulate_hessian";
  check_square(op, "hessian", {hessian.data, hessian.rows, hessian.cols, hessian.stride});
  check::shape(op, "x", x, x.rows, hessian.rows);
  if (x.rows == 0) return;
  const Backend& backend = backend_with(op, exec, &Backend::accumulate_hessian);
  const Call call(op, exec, resolve_threads(exec),
                  backend.accumulate_hessian_workspace(x.rows, x.cols));
  backend.accumulate_hessian(x, hessian, call);
}

void accumulate_cross(ConstMatrix a, ConstMatrix b, View<float> cross, const Execution& exec) {
  const char* op = "accumulate_cross";
  check_square(op, "cross", {cross.data, cross.rows, cross.cols, cross.stride});
  check::shape(op, "a", a, a.rows, cross.rows);
  check::shape(op, "b", b, a.rows, cross.rows);
  if (a.rows == 0) return;
  const Backend& backend = backend_with(op, exec, &Backend::accumulate_cross);
  const Call call(op, exec, resolve_threads(exec),
                  backend.accumulate_cross_workspace(a.rows, a.cols));
  backend.accumulate_cross(a, b, cross, call);
}

double gptq_factorize(View<const float> hessian, const FactorOptions& options, std::int32_t* order,
                      std::uint8_t* dead, View<float> u, const Execution& exec) {
  const char* op = "gptq_factorize";
  check::on_cpu(op, exec);
  check_square(op, "hessian", hessian);
  const std::int64_t k = hessian.rows;
  check::data(op, "order", order);
  check::data(op, "dead", dead);
  check::shape(op, "u", u, k, k);
  if (!(options.percdamp >= 0.0 && options.percdamp <= 1.0)) {
    check::fail(op, "percdamp", "a fraction from 0 to 1", std::to_string(options.percdamp));
  }
  check::finite(op, "hessian", "finite values",
                {hessian.data, DType::f32, hessian.rows, hessian.cols, hessian.stride});

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

  const Backend& backend = backend_of(exec);
  const int threads = resolve_threads(exec);
  constexpr int kRaises = 3;
  double percdamp = options.percdamp;
  for (int attempt = 0; attempt <= kRaises; ++attempt) {
    const Damping damping = {mean, percdamp * mean};
    if (inverse_factor(hessian, order, dead, damping, u, backend, threads)) return percdamp;
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
  check::data(op, "order", order);
  check::data(op, "dead", dead);
  check::data(op, "g_idx", g_idx);
  const Backend& backend = backend_of(exec);
  const Memory& memory = memory_of(exec);
  // The order and the diagonal of U are looked at here, wherever they lie.
  const std::size_t columns = static_cast<std::size_t>(k);
  std::vector<std::int32_t> steps(columns);
  std::vector<float> diagonal(columns);
  memory.to_host(steps.data(), order, 4, 4, columns, exec.stream);
  memory.to_host(diagonal.data(), u.data, static_cast<std::size_t>(u.stride + 1) * 4, 4, columns,
                 exec.stream);
  check::permutation(op, "order", steps.data(), k);
  memory.check_finite(op, "weight", "finite values", weight, exec.stream);
  // GPTQ's objective is the sum of (w - q)^2 / U_ii^2 with w as updated: grids minimise those
  // terms.
  std::vector<float> importance(columns);
  for (std::size_t i = 0; i < columns; ++i) {
    const float d = diagonal[i];
    if (!(d > 0.0f && std::isfinite(d))) {
      check::fail(op, "u", "a factor with a positive diagonal",
                  std::to_string(d) + " at " + std::to_string(i));
    }
    importance[options.static_groups ? static_cast<std::size_t>(steps[i]) : i] = 1.0f / (d * d);
  }

  const int threads = resolve_threads(exec);
  const Scratch scratch(backend, format, threads);
  const std::size_t strips = scratch.strips;
  const Call call(op, exec, threads, scratch.bytes());
  char* extra = static_cast<char*>(call.workspace()) + scratch.of_backend;
  auto* costs = reinterpret_cast<float*>(extra);
  auto* losses = reinterpret_cast<double*>(extra + room<float>(columns));
  memory.from_host(costs, importance.data(), columns * sizeof(float), exec.stream);
  backend.gptq({weight, order, dead, u, costs, format, options, codes, scales, zeros, losses},
               call);
  check_scales_fit(op, scales, exec);

  const std::int64_t group = format.group_size == -1 ? k : format.group_size;
  std::vector<std::int32_t> groups(columns);
  for (std::int64_t i = 0; i < k; ++i) {
    groups[static_cast<std::size_t>(options.static_groups ? i : steps[i])] =
        static_cast<std::int32_t>(i / group);
  }
  memory.from_host(g_idx, groups.data(), columns * sizeof(std::int32_t), exec.stream);
  std::vector<double> loss(strips);
  memory.to_host(loss.data(), losses, 8, 8, strips, exec.stream);
  const double sum = std::accumulate(loss.begin(), loss.end(), 0.0);
  if (!std::isfinite(sum)) {  // such integers mean nothing
    throw Error("gptq_quantize: expected errors of finite size, got " + std::to_string(sum) +
                ": is there NaN or Inf in u?");
  }
  return sum;
}

std::size_t accumulate_hessian_workspace_size(std::int64_t rows, std::int64_t cols,
                                              const Execution& exec) {
  const char* op = "accumulate_hessian_workspace_size";
  const Backend& backend = backend_with(op, exec, &Backend::accumulate_hessian);
  return sized(op, backend.accumulate_hessian_workspace, rows, cols);
}

std::size_t accumulate_cross_workspace_size(std::int64_t rows, std::int64_t cols,
                                            const Execution& exec) {
  const char* op = "accumulate_cross_workspace_size";
  const Backend& backend = backend_with(op, exec, &Backend::accumulate_cross);
  return sized(op, backend.accumulate_cross_workspace, rows, cols);
}

std::size_t gptq_quantize_workspace_size(const QuantFormat& format, const Execution& exec) {
  check::format("gptq_quantize_workspace_size", format);
  return Scratch(backend_of(exec), format, resolve_threads(exec)).bytes();
}

}  // namespace lowbitcore
