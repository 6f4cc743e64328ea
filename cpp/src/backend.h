// What a backend has to do. Arguments were checked before (check.h), so implementations only
// compute.
#pragma once

#include <lowbitcore/attention.h>
#include <lowbitcore/decode.h>
#include <lowbitcore/dense.h>
#include <lowbitcore/elementwise.h>
#include <lowbitcore/gptq.h>
#include <lowbitcore/losses.h>
#include <lowbitcore/low_rank.h>
#include <lowbitcore/qgemm.h>
#include <lowbitcore/quantize.h>

namespace lowbitcore {

// What a call may use, resolved from its Execution.
struct Resources {
  int threads;
  void* workspace;
  void* stream;  // of CUDA
};

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
  double* loss;  // one entry per kStripOutputs outputs, so that their sum has a fixed order
};

struct LowRankShape {
  std::int64_t rows, in_features, out_features, rank;
};

// Outputs are quantized in strips of this many, on every backend and level.
constexpr std::int64_t kStripOutputs = 64;

// Heads of attention have at most so many columns.
constexpr std::int64_t kMostHeadCols = 256;

// Hessians are factored in square tiles of this size.
constexpr std::int64_t kFactorTile = 96;

// A null function pointer is an operation that a backend does not have.
struct Backend {
  const char* name;
  void (*qgemm_nt)(ConstMatrix x, const QuantWeight&, const float* bias, Matrix y,
                   const Resources&);
  void (*qgemm_nn)(ConstMatrix dy, const QuantWeight&, Matrix dx, const Resources&);
  void (*qgemm_grad_scales)(ConstMatrix dy, ConstMatrix x, const QuantWeight&, View<float> ds,
                            const Resources&);
  std::size_t (*qgemm_nt_workspace)(const QuantFormat&, std::int64_t m, int threads);
  std::size_t (*qgemm_nn_workspace)(const QuantFormat&, std::int64_t m, int threads);
  std::size_t (*qgemm_grad_scales_workspace)(const QuantFormat&, std::int64_t m, int threads);
  void (*dequantize)(const QuantWeight&, Matrix out, std::int64_t first_output, const Resources&);
  void (*quantize_rtn)(ConstMatrix weight, const QuantFormat&, const GridOptions&,
                       View<std::uint8_t> codes, View<float> scales, View<std::uint8_t> zeros,
                       const Resources&);
  std::size_t (*quantize_rtn_workspace)(const QuantFormat&, int threads);
  void (*accumulate_hessian)(ConstMatrix x, View<float> hessian, const Resources&);
  std::size_t (*accumulate_hessian_workspace)(std::int64_t m, std::int64_t k);
  void (*accumulate_cross)(ConstMatrix a, ConstMatrix b, View<float> cross, const Resources&);
  std::size_t (*accumulate_cross_workspace)(std::int64_t m, std::int64_t k);
  void (*gptq)(const GptqProblem&, const Resources&);
  std::size_t (*gptq_workspace)(const QuantFormat&, int threads);
  // c -= a b for tiles of a Hessian's factor, rows of `c` `stride` apart. Of the CPU alone.
  void (*subtract_product)(const double* a, const double* b, double* c, std::int64_t stride);
  void (*add_fake_quantized)(const LatentWeight&, Matrix out, const Resources&);
  void (*fake_quantized_grads)(ConstMatrix dw, const LatentWeight&, View<float> d_latent,
                               View<float> d_scales, const Resources&);
  void (*rms_norm)(ConstMatrix x, ConstMatrix weight, float eps, Matrix y, const Resources&);
  void (*rms_norm_backward)(ConstMatrix dy, ConstMatrix x, ConstMatrix weight, float eps, Matrix dx,
                            const Resources&);
  void (*rotate)(ConstMatrix x, ConstMatrix cos, ConstMatrix sin, bool inverse, Matrix y,
                 const Resources&);
  void (*swiglu)(ConstMatrix gate, ConstMatrix up, Matrix out, const Resources&);
  void (*swiglu_backward)(ConstMatrix d_out, ConstMatrix gate, ConstMatrix up, Matrix d_gate,
                          Matrix d_up, const Resources&);
  void (*dropout)(ConstMatrix x, std::uint64_t seed, std::uint32_t dropped, Matrix y,
                  const Resources&);
  void (*token_losses)(ConstMatrix logits, View<const std::int64_t> targets, const LossTerms&,
                       View<float> losses, Matrix gradient, const Resources&);
  void (*attention)(const AttentionInputs&, Heads out, View<float> lse, const Resources&);
  std::size_t (*attention_workspace)(DType, std::int64_t rows, std::int64_t cols, int threads);
  void (*attention_backward)(ConstHeads d_out, const AttentionInputs&, ConstHeads out,
                             View<const float> lse, Heads dq, Heads dk, Heads dv, const Resources&);
  std::size_t (*attention_backward_workspace)(DType, std::int64_t rows, std::int64_t cols,
                                              int threads);
  void (*attend)(ConstMatrix q, const ConstHeads& keys, const ConstHeads& values, float scale,
                 Matrix out, const Resources&);
  void (*add_low_rank)(ConstMatrix y, ConstMatrix x, const LowRank&, View<float> low, Matrix sum,
                       const Resources&);
  std::size_t (*add_low_rank_workspace)(const LowRankShape&, int threads);
  void (*add_low_rank_backward)(ConstMatrix dy, ConstMatrix x, View<const float> low,
                                const LowRank&, const LowRankGrads&, const Resources&);
  std::size_t (*add_low_rank_backward_workspace)(const LowRankShape&, int threads);
  void (*gemm_nt)(ConstMatrix x, ConstMatrix weight, const float* bias, Matrix y, const Resources&);
  std::size_t (*gemm_nt_workspace)(std::int64_t m, std::int64_t cols, int threads);
  void (*gemm_nn)(ConstMatrix x, ConstMatrix weight, const float* bias, Matrix y, const Resources&);
  std::size_t (*gemm_nn_workspace)(std::int64_t m, std::int64_t cols, int threads);
  void (*add)(ConstMatrix a, ConstMatrix b, Matrix sum, const Resources&);
};

// What a device does with memory, whatever its kernels are.
struct Memory {
  // Scratch of a call, aligned to 64 bytes, until release.
  void* (*allocate)(std::size_t bytes, void* stream);
  void (*release)(void* scratch, void* stream);
  // Rows of `width` bytes. Both wait until the copy is done.
  void (*to_host)(void* host, const void* device, std::size_t pitch, std::size_t width,
                  std::size_t rows, void* stream);
  void (*from_host)(void* device, const void* host, std::size_t bytes, void* stream);
  // Throws in the name of an operation and an argument where an entry is NaN or infinite.
  void (*check_finite)(const char* op, const char* argument, const char* expected, ConstMatrix,
                       void* stream);
  void (*prepack)(const QuantFormat&, View<const std::int32_t> qweight,
                  View<const std::int32_t> qzeros, void* packed, void* stream);
  void (*unpack)(const QuantFormat&, const void* packed, View<std::int32_t> qweight,
                 View<std::int32_t> qzeros, void* stream);
};

// The throwing default of every switch over bits. Defined out of line: kernels must not instantiate
// exceptions of their own (see cpu/kernels_impl.h).
[[noreturn]] void unsupported_bits(int bits);
[[noreturn]] void unknown_device();

// The CPU backend at the instruction set in use (cpu/isa.cpp).
const Backend& cpu_backend();
const Memory& cpu_memory();

// The CUDA backend; Error in a build without it (cuda/).
const Backend& cuda_backend();
const Memory& cuda_memory();

inline bool on_cuda(const Execution& exec) {
  if (exec.device != Device::cpu && exec.device != Device::cuda) unknown_device();
  return exec.device == Device::cuda;
}

inline const Backend& backend_of(const Execution& exec) {
  return on_cuda(exec) ? cuda_backend() : cpu_backend();
}

inline const Memory& memory_of(const Execution& exec) {
  return on_cuda(exec) ? cuda_memory() : cpu_memory();
}

}  // namespace lowbitcore
