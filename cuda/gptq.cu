// GPTQ: the integers, scales, zeros and loss of the CPU, bit for bit.
//
// The working copy of the weight is transposed, [K, N], so that neighbouring threads hold
// neighbouring outputs. Columns are quantized in blocks: within a block an output is one thread's,
// which applies all earlier errors to a column when it gets to it; then a product applies the
// block's errors to the columns that are left. Either way an entry takes the errors of earlier
// columns in their order, which fixes its bits. A column that is quantized leaves its row of the
// copy to its error.
#include "elements.cuh"
#include "grid.cuh"
#include "kernels.h"
#include "launch.h"

namespace lowbitcore::cuda {

namespace {

constexpr int kWarp = 32;
constexpr int kBlock = 128;  // columns whose errors are applied to the rest together

// The working copy: dead columns are zero.
constexpr int kLoadThreads = 256;
__global__ void __launch_bounds__(kLoadThreads)
    load_weight(ConstMatrix weight, const std::uint8_t* dead, float* w) {
  __shared__ float tile[kTile][kTile + 1];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::int64_t across = weight.cols / kTile;
  const std::int64_t n0 = blockIdx.x / across * kTile, k0 = blockIdx.x % across * kTile;
  const bool live = dead[k0 + lane] == 0;
  for (int n = warp; n < kTile; n += kLoadThreads / kWarp) {
    const std::int64_t at = (n0 + n) * weight.stride + k0 + lane;
    tile[n][lane] = live ? load_as_float(weight.data, weight.dtype, at) : 0.0f;
  }
  __syncthreads();
  for (int k = warp; k < kTile; k += kLoadThreads / kWarp) {
    w[(k0 + k) * weight.rows + n0 + lane] = tile[lane][k];
  }
}

// The grids of the groups from `first_group` on, a thread for each output. Groups are runs of the
// columns `order` lists, or of the original ones if it is null.
constexpr int kGridThreads = 64;
__global__ void __launch_bounds__(kGridThreads)
    find_grids(const float* w, std::int64_t n_total, int k_total, const std::int32_t* order,
               const float* importance, int group_size, int first_group, float max_code,
               GridOptions options, View<float> scales, View<std::uint8_t> zeros) {
  const int strips = static_cast<int>((n_total + kGridThreads - 1) / kGridThreads);
  const int group = first_group + static_cast<int>(blockIdx.x) / strips;
  const int n =
      static_cast<int>(blockIdx.x) % strips * kGridThreads + static_cast<int>(threadIdx.x);
  if (n >= n_total) return;
  const int k0 = group * group_size;
  const auto row = [&](int i) {
    return w[(order == nullptr ? k0 + i : order[k0 + i]) * n_total + n];
  };
  const Grid grid =
      find_grid(row, importance + k0, min(group_size, k_total - k0), max_code, options);
  scales.data[group * scales.stride + n] = grid.scale;
  zeros.data[group * zeros.stride + n] = static_cast<std::uint8_t>(grid.zero);
}

// Quantizes the columns [begin, end) of the processing order, whose grids are known. A thread has
// one output; the block is a warp, so that few outputs still fill the device.
__global__ void __launch_bounds__(kWarp)
    quantize_columns(GptqProblem p, int group_size, float max_code, int begin, int end, float* w) {
  __shared__ float columns[kBlock][kWarp];  // values, then errors
  const int lane = threadIdx.x;
  const std::int64_t n_total = p.weight.rows;
  const std::int64_t n = static_cast<std::int64_t>(blockIdx.x) * kWarp + lane;
  const int count = end - begin;
#pragma unroll 8
  for (int i = 0; i < count; ++i) columns[i][lane] = w[p.order[begin + i] * n_total + n];

  for (int i = 0; i < count; ++i) {
    const int column = p.order[begin + i];
    const int group = (p.options.static_groups ? column : begin + i) / group_size;
    const Grid grid = {p.scales.data[group * p.scales.stride + n],
                       static_cast<float>(p.zeros.data[group * p.zeros.stride + n])};
    const float* u = p.u.data + begin * p.u.stride + begin + i;
    const float diagonal = u[i * p.u.stride];
    float x = columns[i][lane];
#pragma unroll 8
    for (int j = 0; j < i; ++j) x = __fmaf_rn(-u[j * p.u.stride], columns[j][lane], x);
    const float code = quantize(x, grid, max_code);
    const float error = __fdiv_rn(residual(x, grid, code), diagonal);
    columns[i][lane] = error;
    w[column * n_total + n] = error;
    p.codes.data[n * p.codes.stride + column] = static_cast<std::uint8_t>(code);
  }
}

// Applies the errors of the columns [begin, end) to the later ones: a block has 64 columns x 64
// outputs, a thread 4 x 4.
constexpr int kApplyThreads = 256, kColumns = 64, kOutputs = 64, kEach = 4, kDepth = 32;
__global__ void __launch_bounds__(kApplyThreads)
    apply_errors(View<const float> u, const std::int32_t* order, std::int64_t n_total, int begin,
                 int end, float* w) {
  __shared__ __align__(16) float factors[kDepth][kColumns];
  __shared__ __align__(16) float errors[kDepth][kOutputs];
  const int strips = static_cast<int>((n_total + kOutputs - 1) / kOutputs);
  const int first_column = end + static_cast<int>(blockIdx.x) / strips * kColumns;
  const int first_output = static_cast<int>(blockIdx.x) % strips * kOutputs;
  const int across = threadIdx.x % (kOutputs / kEach) * kEach;
  const int down = threadIdx.x / (kOutputs / kEach) * kEach;
  const int n = first_output + across;
  const int k_total = static_cast<int>(u.cols);
  const bool valid = n < n_total && first_column + down < k_total;

  float sum[kEach][kEach] = {};
  float* rows[kEach];
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    rows[r] = valid ? w + order[first_column + down + r] * n_total + n : nullptr;
    for (int c = 0; c < kEach; ++c) sum[r][c] = valid ? rows[r][c] : 0.0f;
  }
  for (int j0 = begin; j0 < end; j0 += kDepth) {
#pragma unroll
    for (int i = threadIdx.x; i < kDepth * kColumns; i += kApplyThreads) {
      const int j = i / kColumns, c = i % kColumns;
      factors[j][c] =
          first_column + c < k_total ? u.data[(j0 + j) * u.stride + first_column + c] : 0.0f;
      errors[j][c] =
          first_output + c < n_total ? w[order[j0 + j] * n_total + first_output + c] : 0.0f;
    }
    __syncthreads();
#pragma unroll 8
    for (int j = 0; j < kDepth; ++j) {
      const float4 f = *reinterpret_cast<const float4*>(&factors[j][down]);
      const float4 e = *reinterpret_cast<const float4*>(&errors[j][across]);
      const float left[kEach] = {-f.x, -f.y, -f.z, -f.w}, right[kEach] = {e.x, e.y, e.z, e.w};
      for (int r = 0; r < kEach; ++r) {
        for (int c = 0; c < kEach; ++c) sum[r][c] = __fmaf_rn(left[r], right[c], sum[r][c]);
      }
    }
    __syncthreads();
  }
  if (!valid) return;
  for (int r = 0; r < kEach; ++r) {
    for (int c = 0; c < kEach; ++c) rows[r][c] = sum[r][c];
  }
}

// The sum of the squared errors of a strip of kStripOutputs outputs: column after column in
// processing order, output after output. One thread adds (the order is the result), the others
// load.
constexpr int kLossThreads = 256, kLossColumns = 64;
__global__ void __launch_bounds__(kLossThreads)
    sum_losses(const float* w, const std::int32_t* order, std::int64_t n_total, int k_total,
               double* loss) {
  __shared__ float errors[kLossColumns][kStripOutputs];
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kStripOutputs;
  const int outputs =
      static_cast<int>(n_total - first < kStripOutputs ? n_total - first : kStripOutputs);
  double sum = 0.0;
  for (int i0 = 0; i0 < k_total; i0 += kLossColumns) {
    const int columns = min(kLossColumns, k_total - i0);
    for (int i = threadIdx.x; i < columns * kStripOutputs; i += kLossThreads) {
      const int column = i / kStripOutputs, n = i % kStripOutputs;
      if (n < outputs) errors[column][n] = w[order[i0 + column] * n_total + first + n];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 0; i < columns; ++i) {
#pragma unroll 16
        for (int n = 0; n < outputs; ++n) {
          const double e = errors[i][n];
          sum = __fma_rn(e, e, sum);  // the square of an fp32 number is exact in fp64
        }
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) loss[blockIdx.x] = sum;
}

}  // namespace

std::size_t gptq_workspace(const QuantFormat& format) {
  return static_cast<std::size_t>(format.in_features * format.out_features) * sizeof(float);
}

void launch_gptq(const GptqProblem& p, void* workspace, cudaStream_t stream) {
  const std::int64_t n = p.format.out_features;
  const int k = static_cast<int>(p.format.in_features);
  const int group = static_cast<int>(group_columns(p.format));
  const bool static_groups = p.options.static_groups;
  const float max_code = static_cast<float>((1 << p.format.bits) - 1);
  float* w = static_cast<float*>(workspace);

  const auto launch_grids = [&](int first_group, std::int64_t groups) {
    find_grids<<<tiles_of(n, kGridThreads) * static_cast<unsigned>(groups), kGridThreads, 0,
                 stream>>>(w, n, k, static_groups ? nullptr : p.order, p.importance, group,
                           first_group, max_code, p.options.grid, p.scales, p.zeros);
    check_launch("gptq: find_grids");
  };

  load_weight<<<tiles_of(n * k, kTile * kTile), kLoadThreads, 0, stream>>>(p.weight, p.dead, w);
  check_launch("gptq: load_weight");
  if (static_groups) launch_grids(0, p.format.groups());
  for (int begin = 0, end; begin < k; begin = end) {
    // A group that is found on the way sees every earlier error: it begins with a block.
    const int room = static_groups ? k - begin : group - begin % group;
    end = begin + (room < kBlock ? room : kBlock);
    if (end > k) end = k;
    if (!static_groups && begin % group == 0) launch_grids(begin / group, 1);
    quantize_columns<<<tiles_of(n, kWarp), kWarp, 0, stream>>>(p, group, max_code, begin, end, w);
    check_launch("gptq: quantize_columns");
    if (end == k) break;
    apply_errors<<<tiles_of(k - end, kColumns) * tiles_of(n, kOutputs), kApplyThreads, 0, stream>>>(
        p.u, p.order, n, begin, end, w);
    check_launch("gptq: apply_errors");
  }
  sum_losses<<<tiles_of(n, static_cast<int>(kStripOutputs)), kLossThreads, 0, stream>>>(
      w, p.order, n, k, p.loss);
  check_launch("gptq: sum_losses");
}

}  // namespace lowbitcore::cuda
