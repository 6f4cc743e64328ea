// Multiplication without tensor cores: any type of activations, any g_idx, any row strides. Weights
// and sums are fp32.
#include "elements.cuh"
#include "kernels.h"
#include "launch.h"

namespace lowbitcore::cuda {

namespace {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kDepth = 32;  // of the contraction, between two barriers
constexpr int kRows = 64, kCols = 64, kEach = 4;
// Rows of 4 floats more than needed: still aligned for vectors, and without bank conflicts.
constexpr int kPad = 4;

__device__ __forceinline__ void load4(float (&v)[4], const float* p) {
  const float4 f = *reinterpret_cast<const float4*>(p);
  v[0] = f.x;
  v[1] = f.y;
  v[2] = f.z;
  v[3] = f.w;
}

// out = a W^T (+ bias), or a W if kTransposed. A block computes 64 x 64, a thread 4 x 4.
template <bool kTransposed>
__global__ void __launch_bounds__(kThreads)
    multiply(ConstMatrix a, PackedWeight w, const float* bias, Matrix out) {
  __shared__ __align__(16) float activations[kRows][kDepth + kPad];
  __shared__ __align__(16) float weights[kDepth][kCols + kPad];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int x = threadIdx.x % (kCols / kEach) * kEach, y = threadIdx.x / (kCols / kEach) * kEach;
  const int across = (static_cast<int>(out.cols) + kCols - 1) / kCols;
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) / across * kRows;
  const int first_col = static_cast<int>(blockIdx.x) % across * kCols;

  const int col = first_col + x;
  const bool needed = first_row + y < out.rows && col < out.cols;

  // Transposed, a thread always loads the same two inputs, so their groups stay.
  const int own_input = first_col + 2 * lane;
  const bool own_valid = kTransposed && own_input < w.k;
  const int2 own_groups = own_valid ? w.group_pair(own_input) : make_int2(0, 0);

  float sum[kEach][kEach] = {};
  for (int depth = 0; depth < static_cast<int>(a.cols); depth += kDepth) {
#pragma unroll
    for (int r = warp; r < kRows; r += kWarps) {
      const std::int64_t row = first_row + r;
      activations[r][lane] =
          row < a.rows ? load_as_float(a.data, a.dtype, row * a.stride + depth + lane) : 0.0f;
    }
    if constexpr (kTransposed) {
#pragma unroll
      for (int n = warp; n < kDepth; n += kWarps) {
        const float2 v =
            own_valid ? w.value_pair(depth + n, own_input, own_groups) : make_float2(0.0f, 0.0f);
        *reinterpret_cast<float2*>(&weights[n][2 * lane]) = v;
      }
    } else {
#pragma unroll
      for (int k = 2 * warp; k < kDepth; k += 2 * kWarps) {
        const int2 g = w.group_pair(depth + k);
#pragma unroll
        for (int n = lane; n < kCols; n += kWarp) {
          const float2 v = first_col + n < w.n ? w.value_pair(first_col + n, depth + k, g)
                                               : make_float2(0.0f, 0.0f);
          weights[k][n] = v.x;
          weights[k + 1][n] = v.y;
        }
      }
    }
    __syncthreads();
    if (needed) {
#pragma unroll
      for (int d = 0; d < kDepth; d += 4) {
        float left[kEach][4];
        for (int r = 0; r < kEach; ++r) load4(left[r], &activations[y + r][d]);
        for (int i = 0; i < 4; ++i) {
          float right[kEach];
          load4(right, &weights[d + i][x]);
          for (int r = 0; r < kEach; ++r) {
            for (int c = 0; c < kEach; ++c) sum[r][c] = fmaf(left[r][i], right[c], sum[r][c]);
          }
        }
      }
    }
    __syncthreads();
  }

  if (!needed) return;
  for (int r = 0; r < kEach; ++r) {
    const std::int64_t row = first_row + y + r;
    if (row >= out.rows) break;
    for (int c = 0; c < kEach; ++c) {
      const float v = bias == nullptr ? sum[r][c] : sum[r][c] + bias[col + c];
      store_as(v, out.data, out.dtype, row * out.stride + col + c);
    }
  }
}

template <bool kTransposed>
void launch_multiply(const char* name, ConstMatrix a, const QuantWeight& w, const float* bias,
                     Matrix out, cudaStream_t stream) {
  if (out.rows == 0) return;
  const unsigned blocks = tiles_of(out.rows, kRows) * tiles_of(out.cols, kCols);
  multiply<kTransposed><<<blocks, kThreads, 0, stream>>>(a, PackedWeight(w), bias, out);
  check_launch(name);
}

// ---- gradient of the scales ----

// The columns in the order of their groups, stable, and where each group begins in it (and the last
// ends). A warp per group reads all of g_idx: no warp waits for another.
__global__ void __launch_bounds__(kThreads)
    order_columns(const std::int32_t* g_idx, int k, int groups, std::int32_t* order,
                  std::int32_t* begins) {
  constexpr unsigned kAll = ~0u;
  const int lane = threadIdx.x % kWarp;
  const int group = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  if (group > groups) return;
  int at = 0;
  for (int i = lane; i < k; i += kWarp) {
    const int g = g_idx[i];
    if (g < 0 || g >= groups) __trap();
    at += __popc(__ballot_sync(kAll, g < group));
  }
  if (lane == 0) begins[group] = at;
  for (int i = lane; i < k; i += kWarp) {
    const bool mine = g_idx[i] == group;
    const unsigned members = __ballot_sync(kAll, mine);
    if (mine) order[at + __popc(members & ((1u << lane) - 1u))] = i;
    at += __popc(members);
  }
}

constexpr int kColumns = 32;     // inputs that a block takes at a time
constexpr int kColumnsEach = 2;  // of these, for a thread
constexpr int kAcross = kColumns / kColumnsEach;

// A block per 64 outputs and group: dY^T X for 32 of the group's columns at a time, multiplied by
// the integers in registers and summed. Without g_idx, `order` and `begins` are null.
__global__ void __launch_bounds__(kThreads)
    grad_scales(ConstMatrix dy, ConstMatrix x, PackedWeight w, const std::int32_t* order,
                const std::int32_t* begins, View<float> ds) {
  __shared__ __align__(16) float gradients[kDepth][kCols + kPad];
  __shared__ __align__(16) float inputs[kDepth][kColumns];
  __shared__ float totals[kCols][kAcross + 1];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int strips = (w.n + kCols - 1) / kCols;
  const int group = static_cast<int>(blockIdx.x) / strips;
  const int first_output = static_cast<int>(blockIdx.x) % strips * kCols;
  const int across = threadIdx.x % kAcross, outputs = threadIdx.x / kAcross * kEach;
  const int begin = order == nullptr ? group * w.group_size : begins[group];
  const int end = order == nullptr ? min(begin + w.group_size, w.k) : begins[group + 1];
  const auto column = [&](int i) { return order == nullptr ? i : order[i]; };

  float total[kEach] = {};
  for (int first = begin; first < end; first += kColumns) {
    const int own_column = first + lane < end ? column(first + lane) : -1;
    float sum[kEach][kColumnsEach] = {};
    for (std::int64_t row = 0; row < dy.rows; row += kDepth) {
#pragma unroll
      for (int m = warp; m < kDepth; m += kWarps) {
        const bool valid = row + m < dy.rows;
#pragma unroll
        for (int n = lane; n < kCols; n += kWarp) {
          gradients[m][n] =
              valid && first_output + n < w.n
                  ? load_as_float(dy.data, dy.dtype, (row + m) * dy.stride + first_output + n)
                  : 0.0f;
        }
        inputs[m][lane] = valid && own_column >= 0
                              ? load_as_float(x.data, x.dtype, (row + m) * x.stride + own_column)
                              : 0.0f;
      }
      __syncthreads();
#pragma unroll
      for (int m = 0; m < kDepth; ++m) {
        float left[kEach];
        load4(left, &gradients[m][outputs]);
        const float2 right = *reinterpret_cast<const float2*>(&inputs[m][across * kColumnsEach]);
        for (int r = 0; r < kEach; ++r) {
          sum[r][0] = fmaf(left[r], right.x, sum[r][0]);
          sum[r][1] = fmaf(left[r], right.y, sum[r][1]);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int c = 0; c < kColumnsEach; ++c) {
      const int i = first + across * kColumnsEach + c;
      if (i < end && first_output + outputs < w.n) {
        const int k = column(i);
#pragma unroll
        for (int r = 0; r < kEach; ++r) {
          const int n = first_output + outputs + r;
          const float q = static_cast<float>(load_field(w.packed, w.bits, w.k, n, k));
          total[r] = fmaf(q - w.zero(group, n), sum[r][c], total[r]);
        }
      }
    }
  }

  for (int r = 0; r < kEach; ++r) totals[outputs + r][across] = total[r];
  __syncthreads();
  const int n = first_output + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= kCols || n >= w.n) return;
  float result = 0.0f;
  for (int i = 0; i < kAcross; ++i) result += totals[threadIdx.x][i];
  ds.data[group * ds.stride + n] = result;
}

}  // namespace

void launch_simt_nt(ConstMatrix x, const QuantWeight& w, const float* bias, Matrix y,
                    cudaStream_t stream) {
  launch_multiply<false>("simt_nt", x, w, bias, y, stream);
}

void launch_simt_nn(ConstMatrix dy, const QuantWeight& w, Matrix dx, cudaStream_t stream) {
  launch_multiply<true>("simt_nn", dy, w, nullptr, dx, stream);
}

std::size_t simt_grad_scales_workspace(const QuantFormat& format) {
  return static_cast<std::size_t>(format.in_features + format.groups() + 1) * sizeof(std::int32_t);
}

void launch_simt_grad_scales(ConstMatrix dy, ConstMatrix x, const QuantWeight& w, View<float> ds,
                             void* workspace, cudaStream_t stream) {
  const PackedWeight weight(w);
  std::int32_t *order = nullptr, *begins = nullptr;
  if (w.g_idx != nullptr) {
    order = static_cast<std::int32_t*>(workspace);
    begins = order + weight.k;
    order_columns<<<tiles_of(weight.groups + 1, kWarps), kThreads, 0, stream>>>(
        w.g_idx, weight.k, weight.groups, order, begins);
    check_launch("order_columns");
  }
  const unsigned blocks = tiles_of(weight.n, kCols) * static_cast<unsigned>(weight.groups);
  grad_scales<<<blocks, kThreads, 0, stream>>>(dy, x, weight, order, begins, ds);
  check_launch("simt_grad_scales");
}

}  // namespace lowbitcore::cuda
