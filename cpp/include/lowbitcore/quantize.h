// Round-to-nearest quantization and its inverse.
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

// W [N,K] -> codes [N,K], scales [G,N], zeros [G,N].
void quantize_rtn(ConstMatrix weight, const QuantFormat& format, const GridOptions& grid,
                  View<std::uint8_t> codes, View<float> scales, View<std::uint8_t> zeros,
                  const Execution& exec = {});

// The dense weight, or the rows of it [rows, K] from `first_output` on; both multiples of 32.
void dequantize(const QuantWeight& weight, Matrix out, std::int64_t first_output = 0,
                const Execution& exec = {});

}  // namespace lowbitcore
