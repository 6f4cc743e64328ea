// dX = dY W on tensor cores, dY and dX in 16 bits, from the same packed bytes as the forward
// product.
//
// A block computes 16 kRows kWarpsM rows x 64 kWarpsN inputs and walks over the outputs in steps of
// 64. Its inputs belong to the same groups throughout, so that a step brings one row of scales and
// zeros for each of these. blockIdx.z takes an equal share of the steps, as in qgemm_nt.cuh.
#pragma once

#include "gemm.cuh"
#include "launch.h"

namespace lowbitcore::cuda {

template <int kBits, int kRows, int kWarpsM, int kWarpsN, int kStages>
struct NnShape {
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kM = 16 * kRows * kWarpsM, kK = 64 * kWarpsN;
  static constexpr int kTiles = kK / kTile;
  static constexpr int kGroupRows = kTiles;  // groups that the inputs of a block may belong to
  using Grid = GridTile<kStep>;

  static constexpr int kActivationBytes = kM * kRowBytes;
  static constexpr int kStripBytes = kTiles * kTileBytes<kBits>;
  static constexpr int kWeightBytes = kStep / kTile * kStripBytes;
  static constexpr int kStageBytes =
      kActivationBytes + kWeightBytes + Grid::template bytes<kGroupRows>();
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

template <typename T, int kBits, int kRows, int kWarpsM, int kWarpsN, int kStages>
__global__ void __launch_bounds__(32 * kWarpsM * kWarpsN) qgemm_nn_kernel(GemmArgs args) {
  using Shape = NnShape<kBits, kRows, kWarpsM, kWarpsN, kStages>;
  using Grid = typename Shape::Grid;

  extern __shared__ __align__(128) unsigned char shared_memory[];
  const std::uint32_t shared = ptx::shared_address(shared_memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp % kWarpsM, warp_k = warp / kWarpsM;
  const int g = lane / 4, t = lane % 4;
  const int row0 = blockIdx.x * Shape::kM, tile0 = blockIdx.y * Shape::kTiles;
  const int strips = args.n / kTile, tiles = args.k / kTile;
  const std::uint8_t* zeros = args.packed + zeros_offset(kBits, args.n, args.k);

  const int group0 = tile0 / args.group_tiles;
  const int groups = (min(tile0 + Shape::kTiles, tiles) - 1) / args.group_tiles - group0 + 1;
  // This thread multiplies with tile g / 4 of its warp's two; one outside of W counts as the last.
  const int my_tile = min(tile0 + warp_k * 2 + g / 4, tiles - 1);
  const int grid_row = my_tile / args.group_tiles - group0;

  const Share share((strips + 1) / 2);

  ActivationCopy<Shape::kM, Shape::kThreads> activations(args.in, args.in_stride, row0, args.m,
                                                         share.first * kStep, args.n);
  TileCopy<kBits, kStep / kTile, Shape::kTiles, Shape::kThreads> weights_copy(
      args.packed, share.first * 2, strips, tile0, tiles);
  typename Grid::template Copy<Shape::kGroupRows, Shape::kThreads> grid_copy(args, zeros,
                                                                             share.first * kStep);
  const auto load = [&](int step, int stage) {
    if (step < share.last) {
      const std::uint32_t to = shared + stage * Shape::kStageBytes;
      activations.next(to);
      weights_copy.copy(to + Shape::kActivationBytes);
      weights_copy.next_strips();
      grid_copy.copy(to + Shape::kActivationBytes + Shape::kWeightBytes, group0, groups);
      grid_copy.next_outputs();
    }
    ptx::commit_copies();
  };

  // Columns: mma number 2 m + e, columns 2 t and 2 t + 1 of it.
  float dx[kRows][8][4] = {};

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load(share.first + stage, stage);

  int stage = 0;
  for (int step = share.first; step < share.last; ++step) {
    ptx::wait_copies<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);

    const std::uint32_t from = shared + stage * Shape::kStageBytes;
    const std::uint32_t weights =
        from + Shape::kActivationBytes + (warp_k * 2 + g / 4) * kTileBytes<kBits>;
    const std::uint32_t grid = from + Shape::kActivationBytes + Shape::kWeightBytes;
#pragma unroll
    for (int q = 0; q < kStep / 16; ++q) {
      std::uint32_t a[kRows][4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = (warp_m * kRows + r) * 16 + lane % 16;
        ptx::load_matrices(a[r], from + activation_offset(row, q * 2 + lane / 16));
      }
      Unit<kBits> unit(weights + q / 2 * Shape::kStripBytes,
                       unit_position(t + 4 * (q % 2), g % 4, g / 4));
      unit.transpose();
      float scales[4];
      std::uint32_t z;
      Grid::load(grid, grid_row, q * 16 + 2 * t, scales, z);
      const ZeroPair<kBits, T> zero[2] = {{z, 0x4140}, {z, 0x4342}};
      const ScalePair<T> scale[2] = {{scales[0], scales[1]}, {scales[2], scales[3]}};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const std::uint32_t b0 = scale[0].apply(centred(unit, 2 * e, m, zero[0]));
          const std::uint32_t b1 = scale[1].apply(centred(unit, 2 * e + 1, m, zero[1]));
#pragma unroll
          for (int r = 0; r < kRows; ++r) ptx::mma(dx[r][2 * m + e], a[r], b0, b1, T());
        }
      }
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  const int out_tile = tile0 + warp_k * 2 + t / 2;
  if (out_tile >= tiles) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + (warp_m * kRows + r) * 16 + g + 8 * half;
      if (row >= args.m) continue;
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int input = out_tile * kTile + 4 * (t % 2) + 8 * m;
        const float* even = dx[r][2 * m] + 2 * half;     // inputs + 0, + 2
        const float* odd = dx[r][2 * m + 1] + 2 * half;  // inputs + 1, + 3
        if (gridDim.z > 1) {
          float* to =
              args.partial + (static_cast<std::size_t>(blockIdx.z) * args.m + row) * args.k + input;
          *reinterpret_cast<float4*>(to) = make_float4(even[0], odd[0], even[1], odd[1]);
        } else {
          T* to = static_cast<T*>(args.out) + row * args.out_stride + input;
          *reinterpret_cast<uint2*>(to) =
              make_uint2(ptx::pack2(even[0], odd[0], T()), ptx::pack2(even[1], odd[1], T()));
        }
      }
    }
  }
}

template <typename T, int kBits, int kRows, int kWarpsM, int kWarpsN, int kStages>
void launch_qgemm_nn_tile(const GemmArgs& args, int splits, cudaStream_t stream) {
  using Shape = NnShape<kBits, kRows, kWarpsM, kWarpsN, kStages>;
  const dim3 grid(tiles_of(args.m, Shape::kM), tiles_of(args.k, Shape::kK), splits);
  launch(qgemm_nn_kernel<T, kBits, kRows, kWarpsM, kWarpsN, kStages>, "qgemm_nn", grid,
         Shape::kThreads, Shape::kSharedBytes, args, stream);
}

template <int kBits>
void launch_qgemm_nn(DType dtype, RowClass kind, const GemmArgs& args, int splits,
                     cudaStream_t stream) {
  with_half_type(dtype, [&](auto element) {
    using T = decltype(element);
    if (kind == RowClass::few) {
      launch_qgemm_nn_tile<T, kBits, 1, 1, 4, 3>(args, splits, stream);
    } else if (kind == RowClass::some) {
      launch_qgemm_nn_tile<T, kBits, 2, 2, 2, 3>(args, splits, stream);
    } else {
      launch_qgemm_nn_tile<T, kBits, 4, 2, 2, 3>(args, splits, stream);
    }
  });
}

}  // namespace lowbitcore::cuda
