// Round-to-nearest quantization.
#include "elements.cuh"
#include "grid.cuh"
#include "kernels.h"
#include "launch.h"

namespace lowbitcore::cuda {

namespace {

constexpr int kOutputs = 32;  // of a block, which is one warp: a thread finds an output's grid
constexpr std::int64_t kMostStaged = 256;  // longer groups do not fit into shared memory

// A block per 32 outputs and group. `pitch` is the length of a row of `staged`, or 0 where groups
// are read from global memory each time.
__global__ void __launch_bounds__(kOutputs)
    quantize_groups(ConstMatrix weight, int group_size, float max_code, GridOptions options,
                    int pitch, View<std::uint8_t> codes, View<float> scales,
                    View<std::uint8_t> zeros) {
  extern __shared__ float staged[];
  constexpr unsigned kAll = ~0u;
  const int lane = threadIdx.x;
  const int strips = static_cast<int>(weight.rows) / kOutputs;
  const int group = static_cast<int>(blockIdx.x) / strips;
  const int first = static_cast<int>(blockIdx.x) % strips * kOutputs;
  const int k0 = group * group_size;
  const int columns = min(group_size, static_cast<int>(weight.cols) - k0);
  const auto load = [&](int row, int column) {
    return load_as_float(weight.data, weight.dtype, (first + row) * weight.stride + k0 + column);
  };
  const auto value = [&](int row, int column) {
    return pitch > 0 ? staged[row * pitch + column] : load(row, column);
  };

  if (pitch > 0) {
    for (int row = 0; row < kOutputs; ++row) {
      for (int k = lane; k < columns; k += kOutputs) staged[row * pitch + k] = load(row, k);
    }
    __syncwarp();
  }
  const Grid own =
      find_grid([&](int k) { return value(lane, k); }, nullptr, columns, max_code, options);
  scales.data[group * scales.stride + first + lane] = own.scale;
  zeros.data[group * zeros.stride + first + lane] = static_cast<std::uint8_t>(own.zero);

  for (int row = 0; row < kOutputs; ++row) {
    const Grid grid = {__shfl_sync(kAll, own.scale, row), __shfl_sync(kAll, own.zero, row)};
    std::uint8_t* out = codes.data + (first + row) * codes.stride + k0;
    for (int k = lane; k < columns; k += kOutputs) {
      out[k] = static_cast<std::uint8_t>(quantize(value(row, k), grid, max_code));
    }
  }
}

}  // namespace

void launch_quantize_rtn(ConstMatrix weight, const QuantFormat& format, const GridOptions& grid,
                         View<std::uint8_t> codes, View<float> scales, View<std::uint8_t> zeros,
                         cudaStream_t stream) {
  const std::int64_t group = group_columns(format);
  const int pitch = group <= kMostStaged ? static_cast<int>(group) + 1 : 0;  // no bank conflicts
  const unsigned blocks =
      tiles_of(format.out_features, kOutputs) * static_cast<unsigned>(format.groups());
  quantize_groups<<<blocks, kOutputs, static_cast<std::size_t>(pitch) * kOutputs * sizeof(float),
                    stream>>>(weight, static_cast<int>(group),
                              static_cast<float>((1 << format.bits) - 1), grid, pitch, codes,
                              scales, zeros);
  check_launch("quantize_rtn");
}

}  // namespace lowbitcore::cuda
