// Every kernel family of the CUDA backend, as its launchers. Matrices lie in device memory of the
// current device; arguments were checked before. Launchers return once the work is in the stream.
#pragma once

#include <cuda_runtime_api.h>

#include "../cpp/src/backend.h"

namespace lowbitcore::cuda {

// ---- tensor cores (qgemm_*.cuh, one object per family): 16-bit activations, trivial g_idx, rows
// aligned to 16 bytes ----

// Rows of activations that a block of a tensor-core kernel works on: 16, 64 or 128.
enum class RowClass { few, some, many };

// One product with a packed weight, forward or transposed. With more than one split of the
// contraction, results go to `partial` and launch_reduce_splits adds them (and the bias).
struct GemmArgs {
  const void* in;  // [M, K] forward, [M, N] transposed
  std::int64_t in_stride;
  const std::uint8_t* packed;
  const float* scales;  // [G, N]
  std::int64_t scales_stride;
  const float* bias;  // [N] or null
  void* out;
  std::int64_t out_stride;
  float* partial;  // [splits, M, columns of out]
  int m, n, k;
  int group_tiles;  // tiles of 32 inputs in a group
};

// Results go to `partial`; launch_reduce_groups adds them.
struct GradScalesArgs {
  const void* dy;
  std::int64_t dy_stride;
  const void* x;
  std::int64_t x_stride;
  const std::uint8_t* packed;
  float* partial;  // [splits, K/32, N]
  int m, n, k;
  int group_tiles;
};

template <int kBits>
void launch_qgemm_nt(DType dtype, RowClass kind, const GemmArgs& args, int splits,
                     cudaStream_t stream);
template <int kBits>
void launch_qgemm_nn(DType dtype, RowClass kind, const GemmArgs& args, int splits,
                     cudaStream_t stream);
template <int kBits>
void launch_qgemm_grad_scales(DType dtype, const GradScalesArgs& args, int splits,
                              cudaStream_t stream);

// The same for many rows, by instructions that devices of compute capability 9.0 have and no others
// (gemm_wgmma.cuh). In builds with LOWBITCORE_WITH_WGMMA.
template <int kBits>
void launch_qgemm_nt_wgmma(DType dtype, const GemmArgs& args, int splits, cudaStream_t stream);
template <int kBits>
void launch_qgemm_nn_wgmma(DType dtype, const GemmArgs& args, int splits, cudaStream_t stream);

// ---- any activations, any g_idx (qgemm_simt.cu): slower ----

void launch_simt_nt(ConstMatrix x, const QuantWeight& w, const float* bias, Matrix y,
                    cudaStream_t stream);
void launch_simt_nn(ConstMatrix dy, const QuantWeight& w, Matrix dx, cudaStream_t stream);
std::size_t simt_grad_scales_workspace(const QuantFormat& format);
void launch_simt_grad_scales(ConstMatrix dy, ConstMatrix x, const QuantWeight& w, View<float> ds,
                             void* workspace, cudaStream_t stream);

// ---- reduce.cu: sums of partial results in a fixed order ----

// out [rows, cols] = sum over s of partial[s, rows, cols] (+ bias [cols], may be null)
void launch_reduce_splits(const float* partial, int splits, const float* bias, Matrix out,
                          cudaStream_t stream);
// ds [G, N] = sum over s and over the tiles of a group of partial[s, tiles, N]
void launch_reduce_groups(const float* partial, int splits, int tiles, int group_tiles,
                          View<float> ds, cudaStream_t stream);

// ---- the weight itself ----

void launch_prepack(const QuantFormat& format, View<const std::int32_t> qweight,
                    View<const std::int32_t> qzeros, std::uint8_t* packed, cudaStream_t stream);
void launch_unpack(const QuantFormat& format, const std::uint8_t* packed,
                   View<std::int32_t> qweight, View<std::int32_t> qzeros, cudaStream_t stream);
void launch_dequantize(const QuantWeight& w, Matrix out, std::int64_t first_output,
                       cudaStream_t stream);
void launch_quantize_rtn(ConstMatrix weight, const QuantFormat& format, const GridOptions& grid,
                         View<std::uint8_t> codes, View<float> scales, View<std::uint8_t> zeros,
                         cudaStream_t stream);
std::size_t gptq_workspace(const QuantFormat& format);
// Fills problem.loss as the CPU does; it lies in device memory like the rest.
void launch_gptq(const GptqProblem& problem, void* workspace, cudaStream_t stream);

// Whether every entry is finite. Waits for the stream.
bool all_finite(ConstMatrix matrix, void* workspace, cudaStream_t stream);
constexpr std::size_t kAllFiniteWorkspace = 16;

}  // namespace lowbitcore::cuda
