// Round-to-nearest quantization, its inverse, and a weight that trains through it
// (quantization-aware training with a straight-through estimator).
#pragma once

#include <lowbitcore/format.h>
#include <lowbitcore/types.h>

namespace lowbitcore {

// How the grid of a group is found. Scales are rounded to fp16 before the integers are chosen, so
// that a file with fp16 scales holds exactly the weights that were meant.
struct GridOptions {
  bool sym = false;  // z = 2^(bits-1), scale from max|w|; otherwise scale and z from min and max
  // Shrink the clipping range where that lowers the group's squared error; GPTQ weighs the errors
  // of columns as its objective does.
  bool mse = false;
};

// W [N,K] -> codes [N,K], scales [G,N], zeros [G,N]. Weights are finite, and so large at most that
// scales stay within fp16, 65504. Scales are no smaller than fp16's least number above 0, 6e-8:
// groups of much smaller weights become 0.
void quantize_rtn(ConstMatrix weight, const QuantFormat& format, const GridOptions& grid,
                  View<std::uint8_t> codes, View<float> scales, View<std::uint8_t> zeros,
                  const Execution& exec = {});
std::size_t quantize_rtn_workspace_size(const QuantFormat& format, const Execution& exec = {});

// The dense weight, or the rows of it [rows, K] from `first_output` on; both multiples of 32.
void dequantize(const QuantWeight& weight, Matrix out, std::int64_t first_output = 0,
                const Execution& exec = {});

// A weight in training. Rows are groups: `latent` [R,C] counts in steps of the grid, C a multiple
// of 32; `scales` and `zeros` [R,1]. An integer q is its latent value, rounded (ties to even) and
// clamped to 0 .. 2^bits - 1.
struct LatentWeight {
  View<const float> latent, scales, zeros;
  int bits = 4;
};

// out [R,C] += scales (q - zeros). On the CPU.
void add_fake_quantized(const LatentWeight& weight, Matrix out, const Execution& exec = {});

// From the gradient dw of that sum, as if nothing were rounded or clamped: d_latent [R,C] = dw
// scales, and d_scales [R,1], the sums of dw (q - zeros). On the CPU.
void fake_quantized_grads(ConstMatrix dw, const LatentWeight& weight, View<float> d_latent,
                          View<float> d_scales, const Execution& exec = {});

}  // namespace lowbitcore
