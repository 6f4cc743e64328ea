// Y = X W^T and dX = dY W on the tensor cores of sm_90a, for more rows than the kernels of sm_80
// are made for. Both compute the transposed result: the weight, dequantized in registers, is the
// left operand of wgmma, and the activations are its right one, as they lie in shared memory. A
// weight is then dequantized once for 128 rows, and nothing but packed bytes is ever written for
// it.
//
// A block has two groups of four warps and computes 128 rows x 256 columns of the result. Per step
// of 64 of the contraction the activations, packed tiles and the grid arrive in shared memory by
// cp.async, kStages - 1 steps ahead. A step has two halves; while the tensor cores work on one,
// the warps dequantize the next:
//
//   half 0 of this step multiplies | half 1 is dequantized
//   half 1 of this step multiplies | barrier, copies; half 0 of the next step is dequantized
//
// Nothing is under way where the loop goes back: ptxas serialises wgmmas that are (C7513).
//
// blockIdx.z takes an equal share of the steps, as in qgemm_nt.cuh.
//
// What differs between the directions is a class `Weights` (qgemm_nt_wgmma.cuh,
// qgemm_nn_wgmma.cuh):
//
//   Element                          type of activations and result
//   kWeightBytes, kGridBytes         of a step in shared memory
//   Weights(args, first step)
//   columns(args), depth(args)       of the result, of the contraction
//   load(to, step)                   copies a step; called for one step after the other
//   dequantize(from, step, half, a)  left operands: slab, k16; called in order, too
//   pair(c, part, i)                 two neighbouring columns of the result, of accumulators i
//   column(chunk)                    where 8 columns of this warp begin: chunk = 2 (g / 4) + part
#pragma once

#include "gemm.cuh"
#include "launch.h"

namespace lowbitcore::cuda {

constexpr int kWgmmaThreads = 256;
constexpr int kWgmmaRows = 128;     // of the activations, a block
constexpr int kWgmmaColumns = 256;  // of the result, a block
constexpr int kWgmmaStages = 4;

// Left operands of half a step: two slabs of 64 columns of the result by two times 16 of the
// contraction.
using WgmmaOperands = std::uint32_t[2][2][4];
using WgmmaSums = float[2][kWgmmaRows / 2];

template <typename Weights>
struct WgmmaShape {
  static constexpr int kActivationBytes = kWgmmaRows * kRowBytes;
  static constexpr int kGridOffset = kActivationBytes + Weights::kWeightBytes;
  // wgmma_operand wants activations at multiples of 1024 bytes.
  static constexpr int kStageBytes = (kGridOffset + Weights::kGridBytes + 1023) / 1024 * 1024;

  // What a warp leaves of its result before it is stored: for each row, 32 columns and some bytes
  // that keep writes and reads free of bank conflicts.
  static constexpr int kResultRowBytes = 64 + 16;
  static constexpr int kResultBytes = kWgmmaRows * kResultRowBytes;

  static constexpr int kSharedBytes = kWgmmaStages * kStageBytes;
  static_assert(kSharedBytes >= kWgmmaThreads / 32 * kResultBytes, "the result takes less");
};

// Half of a step: sums += a times the activations from `activations` on, in the background.
template <typename T>
__device__ __forceinline__ void multiply_half(WgmmaSums& sums, WgmmaOperands& a,
                                              std::uint32_t activations, int half) {
#pragma unroll
  for (int slab = 0; slab < 2; ++slab) {
#pragma unroll
    for (int q = 0; q < 2; ++q) ptx::hold(a[slab][q]);
  }
  ptx::wgmma_fence();
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const std::uint64_t b = ptx::wgmma_operand(activations + (half * 2 + q) * 32);
#pragma unroll
    for (int slab = 0; slab < 2; ++slab) ptx::wgmma(sums[slab], a[slab][q], b, T());
  }
  ptx::commit_wgmmas();
}

// The result of a warp in 16 bits: turned in shared memory, so that each row's columns are stored
// together. `scratch` is the warp's own.
template <typename Weights>
__device__ __forceinline__ void store_result(const GemmArgs& args, const Weights& weights,
                                             const WgmmaSums& sums, std::uint32_t scratch) {
  using T = typename Weights::Element;
  using Shape = WgmmaShape<Weights>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const auto place = [&](int row, int chunk) {
    return scratch + row * Shape::kResultRowBytes + (chunk ^ (row >> 1 & 1)) * kChunk;
  };
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int column = weights.column(2 * (g / 4) + part) + 2 * (g % 4);
    float2 bias = make_float2(0.0f, 0.0f);
    if (args.bias != nullptr && column < Weights::columns(args)) {
      bias = make_float2(args.bias[column], args.bias[column + 1]);
    }
#pragma unroll
    for (int j = 0; j < kWgmmaRows / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float2 v = Weights::pair(sums, part, 4 * j + c);
        ptx::store_shared_32(place(8 * j + 2 * t + c, 2 * (g / 4) + part) + g % 4 * 4,
                             ptx::pack2(v.x + bias.x, v.y + bias.y, T()));
      }
    }
  }
  __syncwarp();
  const int chunk = lane % 4, column = weights.column(chunk);
  if (column >= Weights::columns(args)) return;
  const int row0 = blockIdx.x * kWgmmaRows;
#pragma unroll
  for (int j = 0; j < kWgmmaRows / 8; ++j) {
    // Rows of 8 lanes that read at once lie 4 apart: in different banks.
    const int row = 8 * j + lane / 8 + lane / 4 % 2 * 4;
    const uint4 v = ptx::load_shared_128(place(row, chunk));
    if (row0 + row >= args.m) continue;
    *reinterpret_cast<uint4*>(static_cast<T*>(args.out) + (row0 + row) * args.out_stride + column) =
        v;
  }
}

// A partial result of a warp in fp32.
template <typename Weights>
__device__ __forceinline__ void store_partial(const GemmArgs& args, const Weights& weights,
                                              const WgmmaSums& sums) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int columns = Weights::columns(args);
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int column = weights.column(2 * (g / 4) + part) + 2 * (g % 4);
    if (column >= columns) continue;
#pragma unroll
    for (int j = 0; j < kWgmmaRows / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int row = blockIdx.x * kWgmmaRows + 8 * j + 2 * t + c;
        if (row >= args.m) continue;
        float* to =
            args.partial + (static_cast<std::size_t>(blockIdx.z) * args.m + row) * columns + column;
        *reinterpret_cast<float2*>(to) = Weights::pair(sums, part, 4 * j + c);
      }
    }
  }
}

template <typename Weights>
__global__ void __launch_bounds__(kWgmmaThreads, 1) qgemm_wgmma_kernel(GemmArgs args) {
  using T = typename Weights::Element;
  using Shape = WgmmaShape<Weights>;
  constexpr int kStages = kWgmmaStages;

  extern __shared__ __align__(1024) unsigned char wgmma_memory[];
  const std::uint32_t shared = ptx::shared_address(wgmma_memory);
  const int depth = Weights::depth(args);
  const Share share((depth + kStep - 1) / kStep);

  ActivationCopy<kWgmmaRows, kWgmmaThreads> activations(
      args.in, args.in_stride, blockIdx.x * kWgmmaRows, args.m, share.first * kStep, depth);
  Weights weights(args, share.first);
  const auto load = [&](int step, int stage) {
    if (step < share.last) {
      const std::uint32_t to = shared + stage * Shape::kStageBytes;
      activations.next(to);
      weights.load(to + Shape::kActivationBytes, step);
    }
    ptx::commit_copies();
  };
  const auto dequantize = [&](int step, int stage, int half, WgmmaOperands& a) {
    weights.dequantize(shared + stage * Shape::kStageBytes + Shape::kActivationBytes, step, half,
                       a);
  };

  WgmmaSums sums = {};
  WgmmaOperands a[2];  // of the two halves

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load(share.first + stage, stage);
  if (share.first < share.last) {
    ptx::wait_copies<kStages - 2>();
    ptx::publish_to_wgmma();
    __syncthreads();
    dequantize(share.first, 0, 0, a[0]);
  }

  int stage = 0;
  for (int step = share.first; step < share.last; ++step) {
    const std::uint32_t from = shared + stage * Shape::kStageBytes;
    multiply_half<T>(sums, a[0], from, 0);
    dequantize(step, stage, 1, a[1]);
    multiply_half<T>(sums, a[1], from, 1);
    const int previous = stage == 0 ? kStages - 1 : stage - 1;
    stage = stage + 1 == kStages ? 0 : stage + 1;
    if (step + 1 < share.last) {
      ptx::wait_copies<kStages - 3>();
      ptx::publish_to_wgmma();
      // Beyond it the next step can be read, and nobody reads the step before this one any more.
      __syncthreads();
      load(step + kStages - 1, previous);
      ptx::wait_wgmmas<1>();
#pragma unroll
      for (int slab = 0; slab < 2; ++slab) {
#pragma unroll
        for (int q = 0; q < 2; ++q) ptx::hold(a[0][slab][q]);
      }
      dequantize(step + 1, stage, 0, a[0]);
    }
    ptx::wait_wgmmas<0>();
    ptx::hold(sums[0]);
    ptx::hold(sums[1]);
  }

  if (gridDim.z > 1) {
    store_partial(args, weights, sums);
    return;
  }
  __syncthreads();  // the stages become scratch
  store_result(args, weights, sums, shared + threadIdx.x / 32 * Shape::kResultBytes);
}

template <typename Weights>
void launch_qgemm_wgmma(const char* name, int columns, const GemmArgs& args, int splits,
                        cudaStream_t stream) {
  const dim3 grid(tiles_of(args.m, kWgmmaRows), tiles_of(columns, kWgmmaColumns), splits);
  launch(qgemm_wgmma_kernel<Weights>, name, grid, kWgmmaThreads, WgmmaShape<Weights>::kSharedBytes,
         args, stream);
}

}  // namespace lowbitcore::cuda
