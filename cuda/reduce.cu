// Sums of partial results, always in the same order.
#include "elements.cuh"
#include "kernels.h"
#include "launch.h"

namespace lowbitcore::cuda {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    reduce_splits(const float* partial, int splits, const float* bias, Matrix out) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t count = out.rows * out.cols;
  if (i >= count) return;
  const std::int64_t row = i / out.cols, col = i % out.cols;
  float sum = partial[i];
#pragma unroll 4
  for (int s = 1; s < splits; ++s) sum += partial[s * count + i];
  if (bias != nullptr) sum += bias[col];
  store_as(sum, out.data, out.dtype, row * out.stride + col);
}

// Tile after tile of the group, and within a tile split after split.
__global__ void __launch_bounds__(kThreads)
    reduce_groups(const float* partial, int splits, int tiles, int group_tiles, View<float> ds) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= ds.rows * ds.cols) return;
  const std::int64_t group = i / ds.cols, n = i % ds.cols;
  const std::int64_t begin = group * group_tiles;
  const std::int64_t end = begin + group_tiles < tiles ? begin + group_tiles : tiles;
  const std::int64_t split_step = tiles * ds.cols;
  float sum = 0.0f;
#pragma unroll 4
  for (std::int64_t tile = begin; tile < end; ++tile) {
    const float* p = partial + tile * ds.cols + n;
#pragma unroll 4
    for (int s = 0; s < splits; ++s) sum += p[s * split_step];
  }
  ds.data[group * ds.stride + n] = sum;
}

}  // namespace

void launch_reduce_splits(const float* partial, int splits, const float* bias, Matrix out,
                          cudaStream_t stream) {
  const std::int64_t count = out.rows * out.cols;
  if (count == 0) return;
  reduce_splits<<<tiles_of(count, kThreads), kThreads, 0, stream>>>(partial, splits, bias, out);
  check_launch("reduce_splits");
}

void launch_reduce_groups(const float* partial, int splits, int tiles, int group_tiles,
                          View<float> ds, cudaStream_t stream) {
  reduce_groups<<<tiles_of(ds.rows * ds.cols, kThreads), kThreads, 0, stream>>>(
      partial, splits, tiles, group_tiles, ds);
  check_launch("reduce_groups");
}

}  // namespace lowbitcore::cuda
