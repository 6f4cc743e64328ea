// How the grid of a group is found, as the CPU does it (cpp/src/cpu/quantization.h): the same
// exactly rounded operations in the same order, so that integers, scales and zeros are the same.
// Multiplications are intrinsics because the compiler would fuse them with what follows.
#pragma once

#include <cuda_fp16.h>
#include <lowbitcore/quantize.h>

#include <cstdint>

namespace lowbitcore::cuda {

struct Grid {
  float scale, zero;
};

// The smallest positive fp16: where a tiny range would round to a scale of zero.
constexpr float kSmallestScale = 5.9604644775390625e-8f;

__device__ __forceinline__ float smaller(float a, float b) { return a < b ? a : b; }
__device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }
__device__ __forceinline__ float round_f16(float v) { return __half2float(__float2half_rn(v)); }

__device__ __forceinline__ float quantize(float w, const Grid& grid, float max_code) {
  const float q = rintf(__fdiv_rn(w, grid.scale)) + grid.zero;
  return smaller(larger(q, 0.0f), max_code);
}

// What quantization to `code` leaves of w.
__device__ __forceinline__ float residual(float w, const Grid& grid, float code) {
  return __fmaf_rn(-grid.scale, code - grid.zero, w);
}

__device__ __forceinline__ Grid make_grid(float low, float high, float max_code,
                                          const GridOptions& o) {
  const float range = high - low;
  Grid grid;
  grid.scale = 0.0f < range ? larger(round_f16(__fdiv_rn(range, max_code)), kSmallestScale) : 1.0f;
  if (o.sym) {
    grid.zero = rintf(__fmul_rn(max_code + 1.0f, 0.5f));
  } else {
    grid.zero = smaller(larger(rintf(__fdiv_rn(0.0f - low, grid.scale)), 0.0f), max_code);
  }
  return grid;
}

// The grid of the `count` values row(i), whose squared errors count importance[i] times, or once
// without `importance`.
template <typename Row>
__device__ Grid find_grid(const Row& row, const float* importance, int count, float max_code,
                          const GridOptions& options) {
  float low = 0.0f, high = 0.0f;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const float x = row(i);
    low = smaller(low, x);
    high = larger(high, x);
  }
  if (options.sym) {
    high = larger(0.0f - low, high);
    low = 0.0f - high;
  }
  Grid best = make_grid(low, high, max_code, options);
  if (!options.mse) return best;

  // Both ends are clipped alike, down to a fifth of the range; then scale and zero move apart. The
  // candidates are numbered, so that the loop over a group's values is there once.
  constexpr int kShrinks = 40, kSteps = 13;
  const int reach = options.sym ? 0 : 2;
  const int candidates = 1 + kShrinks + (2 * reach + 1) * kSteps;
  Grid centre = best, grid = best;
  float best_error = 0.0f;
  for (int candidate = 0; candidate < candidates; ++candidate) {
    if (candidate == 1 + kShrinks) centre = best;
    if (candidate > kShrinks) {
      const int at = candidate - 1 - kShrinks;
      const int shift = at / kSteps - reach, step = at % kSteps - kSteps / 2;
      const float factor = 1.0f + __fmul_rn(0.025f, static_cast<float>(step));
      grid.scale = larger(round_f16(__fmul_rn(centre.scale, factor)), kSmallestScale);
      grid.zero = smaller(larger(centre.zero + static_cast<float>(shift), 0.0f), max_code);
    } else if (candidate > 0) {
      const float shrink = 1.0f - __fmul_rn(0.02f, static_cast<float>(candidate));
      grid = make_grid(__fmul_rn(low, shrink), __fmul_rn(high, shrink), max_code, options);
    }
    float error = 0.0f;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const float x = row(i);
      const float e = residual(x, grid, quantize(x, grid, max_code));
      const float weighted = importance != nullptr ? __fmul_rn(e, importance[i]) : e;
      error = __fmaf_rn(weighted, e, error);
    }
    if (candidate == 0 || error < best_error) {
      best = grid;
      best_error = error;
    }
  }
  return best;
}

}  // namespace lowbitcore::cuda
