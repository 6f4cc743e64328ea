// dX = dY W on the tensor cores of sm_90a: see gemm_wgmma.cuh.
//
// Warp w of each group of four takes tiles 2 w and 2 w + 1 of the block's 8, and thread (g, t) of
// it unit (t, g % 4) of tile g / 4, transposed, for each 16 outputs (qgemm_nn.cuh). Of the unit's
// inputs 2 (g % 4) + 8 m + e, e = 0, 1 are rows g and g + 8 of the left operand, and the two slabs
// of a group of warps have m = 0, 1 or m = 2, 3.
#pragma once

#include "gemm_wgmma.cuh"

namespace lowbitcore::cuda {

template <typename T, int kBits>
class TransposedWeights {
 public:
  using Element = T;
  using Grid = GridTile<kStep>;
  static constexpr int kTiles = kWgmmaColumns / kTile;
  static constexpr int kStripBytes = kTiles * kTileBytes<kBits>;
  static constexpr int kWeightBytes = kStep / kTile * kStripBytes;
  static constexpr int kGroupRows = kTiles;  // groups that the inputs of a block may belong to
  static constexpr int kGridBytes = Grid::template bytes<kGroupRows>();

  static __device__ __forceinline__ int columns(const GemmArgs& args) { return args.k; }
  static __device__ __forceinline__ int depth(const GemmArgs& args) { return args.n; }

  __device__ __forceinline__ TransposedWeights(const GemmArgs& args, int first)
      : copy_(args.packed, first * 2, args.n / kTile, blockIdx.y * kTiles, args.k / kTile),
        grid_copy_(args, args.packed + zeros_offset(kBits, args.n, args.k), first * kStep) {
    const int tile0 = blockIdx.y * kTiles, tiles = args.k / kTile;
    group0_ = tile0 / args.group_tiles;
    groups_ = (min(tile0 + kTiles, tiles) - 1) / args.group_tiles - group0_ + 1;
    // A tile outside of W counts as the last.
    grid_row_ = min(tile0 + my_tile(), tiles - 1) / args.group_tiles - group0_;
  }

  __device__ __forceinline__ void load(std::uint32_t to, int) {
    copy_.copy(to);
    copy_.next_strips();
    grid_copy_.copy(to + kWeightBytes, group0_, groups_);
    grid_copy_.next_outputs();
  }

  __device__ __forceinline__ void dequantize(std::uint32_t from, int, int half,
                                             WgmmaOperands& a) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const std::uint32_t tile = from + half * kStripBytes + my_tile() * kTileBytes<kBits>;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      Unit<kBits> unit(tile, unit_position(t + 4 * q, g % 4, g / 4), warpgroup());
      unit.transpose();
      float s[4];
      std::uint32_t z;
      Grid::load(from + kWeightBytes, grid_row_, half * 32 + q * 16 + 2 * t, s, z);
      const ZeroPair<kBits, T> zero[2] = {{z, 0x4140}, {z, 0x4342}};
      const ScalePair<T> scale[2] = {{s[0], s[1]}, {s[2], s[3]}};
#pragma unroll
      for (int slab = 0; slab < 2; ++slab) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            a[slab][q][2 * i + e] = scale[i].apply(centred(unit, 2 * e + i, slab, zero[i]));
          }
        }
      }
    }
  }

  static __device__ __forceinline__ float2 pair(const WgmmaSums& sums, int part, int i) {
    return make_float2(sums[part][i], sums[part][i + 2]);
  }
  static __device__ __forceinline__ int column(int chunk) {
    return blockIdx.y * kWgmmaColumns + threadIdx.x % 128 / 32 * 64 + 32 * (chunk / 2) +
           16 * warpgroup() + 8 * (chunk % 2);
  }

 private:
  static __device__ __forceinline__ int warpgroup() { return threadIdx.x / 128; }
  static __device__ __forceinline__ int my_tile() {
    return threadIdx.x % 128 / 32 * 2 + threadIdx.x % 32 / 16;
  }

  TileCopy<kBits, kStep / kTile, kTiles, kWgmmaThreads> copy_;
  typename Grid::template Copy<kGroupRows, kWgmmaThreads> grid_copy_;
  int group0_, groups_, grid_row_;
};

template <int kBits>
void launch_qgemm_nn_wgmma(DType dtype, const GemmArgs& args, int splits, cudaStream_t stream) {
  with_half_type(dtype, [&](auto element) {
    launch_qgemm_wgmma<TransposedWeights<decltype(element), kBits>>("qgemm_nn_wgmma", args.k, args,
                                                                    splits, stream);
  });
}

}  // namespace lowbitcore::cuda
