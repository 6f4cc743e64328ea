// What a backend has to do. Arguments were checked before (check.h), so implementations only
// compute.
#pragma once

#include <lowbitcore/gptq.h>
#include <lowbitcore/qgemm.h>
#include <lowbitcore/quantize.h>

namespace lowbitcore {

struct GptqProblem {
  ConstMatrix weight;
  const std::int32_t* order;
  const std::uint8_t* dead;
  View<const float> u;
  // [K]: what a column's squared error costs, 1 / U_ii^2; in the order in which groups take
  // columns.
  const float* importance;
  QuantFormat format;
  GptqOptions options;
  View<std::uint8_t> codes;
  View<float> scales;
  View<std::uint8_t> zeros;
  double* loss;  // one entry per kLanes outputs, so that their sum has a fixed order
};

// Outputs are quantized in strips of this many, on every backend and level.
constexpr std::int64_t kLanes = 64;

struct Backend {
  const char* name;
  void (*qgemm_nt)(ConstMatrix x, const QuantWeight&, const float* bias, Matrix y, int threads,
                   void* workspace);
  void (*qgemm_nn)(ConstMatrix dy, const QuantWeight&, Matrix dx, int threads, void* workspace);
  void (*qgemm_grad_scales)(ConstMatrix dy, ConstMatrix x, const QuantWeight&, View<float> ds,
                            int threads, void* workspace);
  std::size_t (*qgemm_nt_workspace)(const QuantFormat&, std::int64_t m, int threads);
  std::size_t (*qgemm_nn_workspace)(const QuantFormat&, std::int64_t m, int threads);
  std::size_t (*qgemm_grad_scales_workspace)(const QuantFormat&, std::int64_t m, int threads);
  void (*dequantize)(const QuantWeight&, Matrix out, int threads);
  void (*quantize_rtn)(ConstMatrix weight, const QuantFormat&, const GridOptions&,
                       View<std::uint8_t> codes, View<float> scales, View<std::uint8_t> zeros,
                       int threads);
  void (*accumulate_hessian)(ConstMatrix x, View<float> hessian, int threads, void* workspace);
  std::size_t (*accumulate_hessian_workspace)(std::int64_t m, std::int64_t k);
  void (*accumulate_cross)(ConstMatrix a, ConstMatrix b, View<float> cross, int threads,
                           void* workspace);
  std::size_t (*accumulate_cross_workspace)(std::int64_t m, std::int64_t k);
  void (*gptq)(const GptqProblem&, int threads);
};

// The throwing default of every switch over bits. Defined out of line: kernels must not instantiate
// exceptions of their own (see cpu/kernels_impl.h).
[[noreturn]] void unsupported_bits(int bits);

// The CPU backend at the instruction set in use (cpu/isa.cpp).
const Backend& cpu_backend();

// Scratch of a call: what the host brought, if it is large enough; else a buffer that the calling
// thread keeps.
void* workspace(const char* op, const Execution& exec, std::size_t bytes);

}  // namespace lowbitcore
