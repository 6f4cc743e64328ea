// dS[g,n] = sum over k in g of (q - z) sum over m of dY[m,n] X[m,k] on tensor cores.
//
// A block computes a 128 x 128 tile of dY^T X in registers, multiplies it there by the integers and
// sums along the inputs of each tile of 32: dW never exists. The sums, [N] for each tile of inputs
// and each share of the tokens (blockIdx.z), are fp32 in args.partial [splits, K/32, N]; reduce.cu
// adds those of a group in a fixed order.
#pragma once

#include "gemm.cuh"
#include "launch.h"

namespace lowbitcore::cuda {

template <int kStages>
struct GradScalesShape {
  static constexpr int kN = 128, kK = 128, kTokens = 32, kThreads = 128;
  static constexpr int kOperandRowBytes = 256;
  static constexpr int kOperandBytes = kTokens * kOperandRowBytes;
  static constexpr int kStageBytes = 2 * kOperandBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

// The integers that belong to a thread's accumulators: of outputs o and o + 1 (8 apart) of a unit.
template <int kBits>
struct Pairs {
  std::uint32_t word[kBits == 8 ? 4 : kBits == 4 ? 2 : 1], high = 0;
  int o;

  // `o` is 0 or 2.
  __device__ __forceinline__ Pairs(const std::uint8_t* tile, int u, int first) : o(first) {
    if constexpr (kBits == 8) {
#pragma unroll
      for (int plane = 0; plane < 2; ++plane) {
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(tile + plane * 512 + u * 16 + o * 4));
        word[plane * 2] = v.x;
        word[plane * 2 + 1] = v.y;
      }
    } else if constexpr (kBits == 4) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(tile + u * 16 + o * 4));
      word[0] = v.x;
      word[1] = v.y;
    } else {
      word[0] = __ldg(reinterpret_cast<const std::uint32_t*>(tile + u * 8 + o * 2));
      if constexpr (kBits == 3) {
        high = __ldg(reinterpret_cast<const std::uint32_t*>(tile + 256 + u * 4)) >> (o * 4);
      }
    }
  }

  // q of output o (i = 0) or o + 1 (i = 1), input (m, e).
  __device__ __forceinline__ float integer(int i, int m, int e) const {
    if constexpr (kBits == 8) {
      return static_cast<float>(word[m / 2 * 2 + i] >> (m % 2 * 8 + e * 16) & 0xffu);
    } else if constexpr (kBits == 4) {
      return static_cast<float>(word[i] >> (m * 4 + e * 16) & 0xfu);
    } else {
      std::uint32_t q = word[0] >> (i * 8 + m * 2 + e * 16) & 0x3u;
      if constexpr (kBits == 3) q |= (high >> (i + m * 2 + e * 16) & 1u) << 2;
      return static_cast<float>(q);
    }
  }
};

template <typename T, int kBits, int kStages>
__global__ void __launch_bounds__(GradScalesShape<kStages>::kThreads)
    qgemm_grad_scales_kernel(GradScalesArgs args) {
  using Shape = GradScalesShape<kStages>;
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const std::uint32_t shared = ptx::shared_address(shared_memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_n = warp % 2, warp_k = warp / 2;
  const int g = lane / 4, t = lane % 4;
  const int output0 = blockIdx.x * Shape::kN, input0 = blockIdx.y * Shape::kK;

  const Share share((args.m + Shape::kTokens - 1) / Shape::kTokens);

  const auto offset = [](int row, int chunk) {
    return row * Shape::kOperandRowBytes + ((chunk ^ (row & 7)) * kChunk);
  };
  const auto copy = [&](std::uint32_t to, const void* matrix, std::int64_t stride, int step,
                        int column, int columns) {
    constexpr int kRowChunks = Shape::kOperandRowBytes / kChunk;
#pragma unroll
    for (int j = 0; j < Shape::kTokens * kRowChunks / Shape::kThreads; ++j) {
      const int i = static_cast<int>(threadIdx.x) + j * Shape::kThreads;
      const int token = i / kRowChunks, chunk = i % kRowChunks;
      const int row = step * Shape::kTokens + token, at = column + chunk * 8;
      const bool valid = (row < args.m) & (at < columns);
      ptx::copy_async(to + offset(token, chunk),
                      static_cast<const T*>(matrix) + (valid ? row * stride + at : 0), valid);
    }
  };
  const auto load = [&](int step, int stage) {
    if (step < share.last) {
      const std::uint32_t to = shared + stage * Shape::kStageBytes;
      copy(to, args.dy, args.dy_stride, step, output0, args.n);
      copy(to + Shape::kOperandBytes, args.x, args.x_stride, step, input0, args.k);
    }
    ptx::commit_copies();
  };

  // 16 outputs x 8 inputs each: [16 outputs of the warp's 64][8 inputs of its 64].
  float dw[4][8][4] = {};

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load(share.first + stage, stage);

  int stage = 0;
  for (int step = share.first; step < share.last; ++step) {
    ptx::wait_copies<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    const std::uint32_t from = shared + stage * Shape::kStageBytes;
#pragma unroll
    for (int q = 0; q < Shape::kTokens / 16; ++q) {
      std::uint32_t a[4][4], b[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = q * 16 + lane % 8 + 8 * (lane / 16);
        const int chunk = (warp_n * 64 + i * 16) / 8 + lane / 8 % 2;
        ptx::load_matrices_transposed(a[i], from + offset(row, chunk));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = q * 16 + lane % 16, chunk = (warp_k * 64 + i * 16) / 8 + lane / 16;
        ptx::load_matrices_transposed(b[i], from + Shape::kOperandBytes + offset(row, chunk));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          ptx::mma(dw[i][2 * j], a[i], b[j][0], b[j][1], T());
          ptx::mma(dw[i][2 * j + 1], a[i], b[j][2], b[j][3], T());
        }
      }
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  const int tiles = args.k / kTile;
  const std::uint8_t* zeros = args.packed + zeros_offset(kBits, args.n, args.k);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int output = output0 + warp_n * 64 + i * 16;  // this thread has outputs + g and + g + 8
    if (output >= args.n) continue;
    const int ob = 4 * (output / 16 % 2) + g / 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int tile = input0 / kTile + warp_k * 2 + half;
      if (tile >= tiles) continue;
      const std::uint8_t* at =
          args.packed +
          (static_cast<std::size_t>(output / kTile) * tiles + tile) * kTileBytes<kBits>;
      const Pairs<kBits> q(at, unit_position(ob, t, half), g % 2 * 2);
      const std::int64_t group = tile / args.group_tiles;
      float z[2], sum[2] = {};
#pragma unroll
      for (int r = 0; r < 2; ++r) z[r] = zeros[group * args.n + output + g + 8 * r];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float* d = dw[i][half * 4 + m];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          sum[r] += d[2 * r] * (q.integer(r, m, 0) - z[r]);
          sum[r] += d[2 * r + 1] * (q.integer(r, m, 1) - z[r]);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
          sum[r] += __shfl_xor_sync(~0u, sum[r], lanes);
        }
        if (t == 0) {
          args.partial[(static_cast<std::size_t>(blockIdx.z) * tiles + tile) * args.n + output + g +
                       8 * r] = sum[r];
        }
      }
    }
  }
}

template <int kBits>
void launch_qgemm_grad_scales(DType dtype, const GradScalesArgs& args, int splits,
                              cudaStream_t stream) {
  constexpr int kStages = 3;
  using Shape = GradScalesShape<kStages>;
  const dim3 grid(tiles_of(args.n, Shape::kN), tiles_of(args.k, Shape::kK), splits);
  with_half_type(dtype, [&](auto element) {
    launch(qgemm_grad_scales_kernel<decltype(element), kBits, kStages>, "qgemm_grad_scales", grid,
           Shape::kThreads, Shape::kSharedBytes, args, stream);
  });
}

}  // namespace lowbitcore::cuda
