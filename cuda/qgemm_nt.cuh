// Y = X W^T on tensor cores, X and Y in 16 bits.
//
// A block computes a tile of Y with kWarpsM x kWarpsN warps, each 16 kRows rows and 32 kStrips
// outputs. Per step of 64 inputs, X, W and the grid arrive in shared memory by cp.async, kStages -
// 1 steps ahead. With few rows the scales are applied in fp32 to the sums of a group, which costs
// nothing there and leaves q - z exact; with many, to the weights, once each for all rows.
//
// blockIdx.z takes an equal share of the steps; with more than one, fp32 partial results go to
// args.partial and are added in a fixed order afterwards (reduce.cu).
#pragma once

#include "gemm.cuh"
#include "launch.h"

namespace lowbitcore::cuda {

template <int kBits, int kRows, int kStrips, int kWarpsM, int kWarpsN, int kStages>
struct NtShape {
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kM = 16 * kRows * kWarpsM, kN = 32 * kStrips * kWarpsN;
  static constexpr int kGroupRows = kStep / kTile;  // groups that a step may touch
  using Grid = GridTile<kN>;

  static constexpr int kActivationBytes = kM * kRowBytes;
  static constexpr int kStripBytes = kStep / kTile * kTileBytes<kBits>;
  static constexpr int kWeightBytes = kN / kTile * kStripBytes;
  static constexpr int kStageBytes =
      kActivationBytes + kWeightBytes + Grid::template bytes<kGroupRows>();
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

template <typename T, int kBits, int kRows, int kStrips, int kWarpsM, int kWarpsN, int kStages>
__global__ void __launch_bounds__(32 * kWarpsM * kWarpsN) qgemm_nt_kernel(GemmArgs args) {
  using Shape = NtShape<kBits, kRows, kStrips, kWarpsM, kWarpsN, kStages>;
  using Grid = typename Shape::Grid;
  constexpr bool kScaleSums = kRows == 1;

  extern __shared__ __align__(128) unsigned char shared_memory[];
  const std::uint32_t shared = ptx::shared_address(shared_memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp % kWarpsM, warp_n = warp / kWarpsM;
  const int g = lane / 4, t = lane % 4;
  const int row0 = blockIdx.x * Shape::kM, output0 = blockIdx.y * Shape::kN;
  const int strips = args.n / kTile, tiles = args.k / kTile;
  const std::uint8_t* zeros = args.packed + zeros_offset(kBits, args.n, args.k);

  const Share share((tiles + 1) / 2);

  ActivationCopy<Shape::kM, Shape::kThreads> activations(args.in, args.in_stride, row0, args.m,
                                                         share.first * kStep, args.k);
  TileCopy<kBits, Shape::kN / kTile, kStep / kTile, Shape::kThreads> weights_copy(
      args.packed, output0 / kTile, strips, share.first * 2, tiles);
  const typename Grid::template Copy<Shape::kGroupRows, Shape::kThreads> grid_copy(args, zeros,
                                                                                   output0);
  GroupCursor loaded(share.first * 2, args.group_tiles), used = loaded;
  const auto load = [&](int step, int stage) {
    if (step < share.last) {
      const std::uint32_t to = shared + stage * Shape::kStageBytes;
      activations.next(to);
      weights_copy.copy(to + Shape::kActivationBytes);
      weights_copy.next_tiles();
      const int group = loaded.group;
      const bool two = loaded.next() && step * 2 + 1 < tiles;
      loaded.next();
      grid_copy.copy(to + Shape::kActivationBytes + Shape::kWeightBytes, group, two ? 2 : 1);
    }
    ptx::commit_copies();
  };

  // Columns of a strip: mma number o, columns 2 t and 2 t + 1 of it.
  float y[kRows][kStrips * 4][4] = {}, sums[kScaleSums ? kStrips * 4 : 1][4] = {};

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load(share.first + stage, stage);

  // The grid of the group that is being worked on, of this thread's outputs.
  ScalePair<T> scales[kScaleSums ? 1 : kStrips][2];
  std::uint32_t z[kStrips];
  bool group_begins = true;

  int stage = 0;
  for (int step = share.first; step < share.last; ++step) {
    ptx::wait_copies<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);

    const std::uint32_t from = shared + stage * Shape::kStageBytes;
    const std::uint32_t weights = from + Shape::kActivationBytes;
    const std::uint32_t grid = weights + Shape::kWeightBytes;
    int grid_row = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (group_begins) {
#pragma unroll
        for (int i = 0; i < kStrips; ++i) {
          const int output = (warp_n * kStrips + i) * 32 + 16 * (g / 4) + 2 * (g % 4);
          if constexpr (kScaleSums) {
            z[i] = Grid::load_zeros(grid, grid_row, output);
          } else {
            float s[4];
            Grid::load(grid, grid_row, output, s, z[i]);
            scales[i][0] = ScalePair<T>(s[0], s[1]);
            scales[i][1] = ScalePair<T>(s[2], s[3]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kStrips; ++i) {
        const int strip = warp_n * kStrips + i;
        const Unit<kBits> unit(weights + strip * Shape::kStripBytes + h * kTileBytes<kBits>,
                               unit_position(g, t, h));
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          std::uint32_t a[kRows][4];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int row = (warp_m * kRows + r) * 16 + lane % 16;
            ptx::load_matrices(a[r], from + activation_offset(row, h * 4 + s * 2 + lane / 16));
          }
#pragma unroll
          for (int o = 0; o < 4; ++o) {
            // Outputs +0, +8, +1, +9 are bytes 0, 2, 1, 3 of the zeros.
            constexpr std::uint32_t kSame[4] = {0x4040, 0x4242, 0x4141, 0x4343};
            const ZeroPair<kBits, T> zero(z[i], kSame[o]);
            std::uint32_t b[2];
#pragma unroll
            for (int m = 0; m < 2; ++m) b[m] = centred(unit, o, 2 * s + m, zero);
            if constexpr (kScaleSums) {
              ptx::mma(sums[i * 4 + o], a[0], b[0], b[1], T());
            } else {
              const ScalePair<T> scale = scales[i][o % 2].same(o / 2);
#pragma unroll
              for (int m = 0; m < 2; ++m) b[m] = scale.apply(b[m]);
#pragma unroll
              for (int r = 0; r < kRows; ++r) ptx::mma(y[r][i * 4 + o], a[r], b[0], b[1], T());
            }
          }
        }
      }
      group_begins = used.next();
      if constexpr (kScaleSums) {
        if (group_begins || (h == 1 && step + 1 == share.last)) {
#pragma unroll
          for (int i = 0; i < kStrips; ++i) {
            // Columns 2 t and 2 t + 1 of mma o are outputs base + {0, 8, 1, 9}[o] + {0, 2}.
            const int base = (warp_n * kStrips + i) * 32 + 16 * (t / 2) + 4 * (t % 2);
            const uint4 near = Grid::load_scales(grid, grid_row, base);
            const uint4 far = Grid::load_scales(grid, grid_row, base + 8);
            const std::uint32_t scale[4][2] = {
                {near.x, near.z}, {far.x, far.z}, {near.y, near.w}, {far.y, far.w}};
#pragma unroll
            for (int o = 0; o < 4; ++o) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                y[0][i * 4 + o][j] += __uint_as_float(scale[o][j % 2]) * sums[i * 4 + o][j];
                sums[i * 4 + o][j] = 0.0f;
              }
            }
          }
        }
      }
      if (group_begins && h == 0 && step * 2 + 1 < tiles) grid_row = 1;
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      const int strip = warp_n * kStrips + i;
      if (output0 / kTile + strip >= strips) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + (warp_m * kRows + r) * 16 + g + 8 * half;
        if (row >= args.m) continue;
#pragma unroll
        for (int far = 0; far < 2; ++far) {
          const int output = output0 + strip * 32 + 16 * (t / 2) + 4 * (t % 2) + 8 * far;
          const float* low = y[r][i * 4 + far] + 2 * half;       // outputs + 0, + 2
          const float* high = y[r][i * 4 + 2 + far] + 2 * half;  // outputs + 1, + 3
          float4 v = make_float4(low[0], high[0], low[1], high[1]);
          if (gridDim.z > 1) {
            float* to = args.partial +
                        (static_cast<std::size_t>(blockIdx.z) * args.m + row) * args.n + output;
            *reinterpret_cast<float4*>(to) = v;
          } else {
            if (args.bias != nullptr) {
              v.x += args.bias[output];
              v.y += args.bias[output + 1];
              v.z += args.bias[output + 2];
              v.w += args.bias[output + 3];
            }
            T* to = static_cast<T*>(args.out) + row * args.out_stride + output;
            *reinterpret_cast<uint2*>(to) =
                make_uint2(ptx::pack2(v.x, v.y, T()), ptx::pack2(v.z, v.w, T()));
          }
        }
      }
    }
  }
}

template <typename T, int kBits, int kRows, int kStrips, int kWarpsM, int kWarpsN, int kStages>
void launch_qgemm_nt_tile(const GemmArgs& args, int splits, cudaStream_t stream) {
  using Shape = NtShape<kBits, kRows, kStrips, kWarpsM, kWarpsN, kStages>;
  const dim3 grid(tiles_of(args.m, Shape::kM), tiles_of(args.n, Shape::kN), splits);
  launch(qgemm_nt_kernel<T, kBits, kRows, kStrips, kWarpsM, kWarpsN, kStages>, "qgemm_nt", grid,
         Shape::kThreads, Shape::kSharedBytes, args, stream);
}

template <int kBits>
void launch_qgemm_nt(DType dtype, RowClass kind, const GemmArgs& args, int splits,
                     cudaStream_t stream) {
  with_half_type(dtype, [&](auto element) {
    using T = decltype(element);
    if (kind == RowClass::few) {
      // As many stages as leave room for two blocks: at 8 bits on sm_80, at 4 in the 100 KB of
      // sm_86.
      launch_qgemm_nt_tile<T, kBits, 1, 2, 1, 4, kBits >= 4 ? 3 : 4>(args, splits, stream);
    } else if (kind == RowClass::some) {
      launch_qgemm_nt_tile<T, kBits, 4, 1, 1, 4, 4>(args, splits, stream);
    } else {
      launch_qgemm_nt_tile<T, kBits, 8, 1, 1, 4, 3>(args, splits, stream);
    }
  });
}

}  // namespace lowbitcore::cuda
