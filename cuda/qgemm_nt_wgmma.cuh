// Y = X W^T on the tensor cores of sm_90a: see gemm_wgmma.cuh.
//
// A warp takes the tiles of one strip of 32 outputs, and thread (g, t) of it unit (g, t) of each:
// what it takes of the right operand of mma.m16n8k16 (qgemm_nt.cuh) is as much of the left operand
// of wgmma. Outputs o = 0, 1 are its rows g and g + 8 in slab 0, o = 2, 3 in slab 1; pairs m are
// its registers along the contraction.
#pragma once

#include "gemm_wgmma.cuh"

namespace lowbitcore::cuda {

template <typename T, int kBits>
class ForwardWeights {
 public:
  using Element = T;
  using Grid = GridTile<kWgmmaColumns>;
  static constexpr int kStripBytes = kStep / kTile * kTileBytes<kBits>;
  static constexpr int kWeightBytes = kWgmmaColumns / kTile * kStripBytes;
  static constexpr int kGroupRows = kStep / kTile;  // groups that a step may touch
  static constexpr int kGridBytes = Grid::template bytes<kGroupRows>();

  static __device__ __forceinline__ int columns(const GemmArgs& args) { return args.n; }
  static __device__ __forceinline__ int depth(const GemmArgs& args) { return args.k; }

  __device__ __forceinline__ ForwardWeights(const GemmArgs& args, int first)
      : tiles_(args.k / kTile),
        copy_(args.packed, blockIdx.y * kWgmmaColumns / kTile, args.n / kTile, first * 2,
              args.k / kTile),
        grid_copy_(args, args.packed + zeros_offset(kBits, args.n, args.k),
                   blockIdx.y * kWgmmaColumns),
        loaded_(first * 2, args.group_tiles),
        used_(loaded_) {}

  __device__ __forceinline__ void load(std::uint32_t to, int step) {
    copy_.copy(to);
    copy_.next_tiles();
    const int group = loaded_.group;
    const bool two = loaded_.next() && step * 2 + 1 < tiles_;
    loaded_.next();
    grid_copy_.copy(to + kWeightBytes, group, two ? 2 : 1);
  }

  __device__ __forceinline__ void dequantize(std::uint32_t from, int step, int half,
                                             WgmmaOperands& a) {
    const int lane = threadIdx.x % 32, strip = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    // A second tile that begins a group has the second row; one beyond the last may take any.
    if (group_begins_ && step * 2 + half < tiles_) {
      const int output = strip * 32 + 16 * (g / 4) + 2 * (g % 4);
      float s[4];
      std::uint32_t z;
      Grid::load(from + kWeightBytes, half, output, s, z);
      const ScalePair<T> scales[2] = {{s[0], s[1]}, {s[2], s[3]}};
#pragma unroll
      for (int o = 0; o < 4; ++o) {
        // Outputs +0, +8, +1, +9 are bytes 0, 2, 1, 3 of the zeros.
        constexpr std::uint32_t kSame[4] = {0x4040, 0x4242, 0x4141, 0x4343};
        zero_[o] = ZeroPair<kBits, T>(z, kSame[o]);
        scale_[o] = scales[o % 2].same(o / 2);
      }
    }
    group_begins_ = used_.next();
    const Unit<kBits> unit(from + strip * kStripBytes + half * kTileBytes<kBits>,
                           unit_position(g, t, half));
#pragma unroll
    for (int o = 0; o < 4; ++o) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        a[o / 2][m / 2][m % 2 * 2 + o % 2] = scale_[o].apply(centred(unit, o, m, zero_[o]));
      }
    }
  }

  static __device__ __forceinline__ float2 pair(const WgmmaSums& sums, int part, int i) {
    return make_float2(sums[0][i + 2 * part], sums[1][i + 2 * part]);
  }
  static __device__ __forceinline__ int column(int chunk) {
    return blockIdx.y * kWgmmaColumns + threadIdx.x / 32 * 32 + 8 * chunk;
  }

 private:
  int tiles_;
  TileCopy<kBits, kWgmmaColumns / kTile, kStep / kTile, kWgmmaThreads> copy_;
  typename Grid::template Copy<kGroupRows, kWgmmaThreads> grid_copy_;
  GroupCursor loaded_, used_;

  // Of this thread's outputs o, in the group that is being worked on.
  ZeroPair<kBits, T> zero_[4];
  ScalePair<T> scale_[4];
  bool group_begins_ = true;
};

template <int kBits>
void launch_qgemm_nt_wgmma(DType dtype, const GemmArgs& args, int splits, cudaStream_t stream) {
  with_half_type(dtype, [&](auto element) {
    launch_qgemm_wgmma<ForwardWeights<decltype(element), kBits>>("qgemm_nt_wgmma", args.n, args,
                                                                 splits, stream);
  });
}

}  // namespace lowbitcore::cuda
