// The dense weight.
#include "elements.cuh"
#include "kernels.h"
#include "launch.h"
#include "ptx.cuh"

namespace lowbitcore::cuda {

namespace {

// A block writes 32 outputs x 64 inputs, a thread 8 neighbours of them: of 16-bit values, whole
// lines of 128 bytes.
constexpr int kThreads = 256, kInputs = 64, kPerThread = 8, kPerRow = kInputs / kPerThread;

template <typename T>
__device__ uint4 pack8(const float (&v)[kPerThread]) {
  return make_uint4(ptx::pack2(v[0], v[1], T()), ptx::pack2(v[2], v[3], T()),
                    ptx::pack2(v[4], v[5], T()), ptx::pack2(v[6], v[7], T()));
}

// `aligned`: every row of `out` begins at a multiple of 16 bytes.
template <int kBits>
__global__ void __launch_bounds__(kThreads)
    dequantize(PackedWeight w, Matrix out, int first_output, bool aligned) {
  const int across = (w.k + kInputs - 1) / kInputs;
  const int row =
      static_cast<int>(blockIdx.x) / across * kTile + static_cast<int>(threadIdx.x) / kPerRow;
  const int column = static_cast<int>(blockIdx.x) % across * kInputs +
                     static_cast<int>(threadIdx.x) % kPerRow * kPerThread;
  if (column >= w.k) return;

  float v[kPerThread];
  const int output = first_output + row;
  Affine first = w.affine(w.group(column), output), second = first;
#pragma unroll
  for (int i = 0; i < kPerThread; i += 2) {
    if (w.g_idx != nullptr) {
      first = w.affine(w.group(column + i), output);
      second = w.affine(w.group(column + i + 1), output);
    }
    const uint2 q = w.code_pair(kBits, output, column + i);
    v[i] = first(q.x);
    v[i + 1] = second(q.y);
  }

  const std::int64_t at = row * out.stride + column;
  if (!aligned) {
    for (int i = 0; i < kPerThread; ++i) store_as(v[i], out.data, out.dtype, at + i);
  } else if (out.dtype == DType::f32) {
    float4* p = reinterpret_cast<float4*>(static_cast<float*>(out.data) + at);
    p[0] = make_float4(v[0], v[1], v[2], v[3]);
    p[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    uint4* p = reinterpret_cast<uint4*>(static_cast<std::uint16_t*>(out.data) + at);
    *p = out.dtype == DType::bf16 ? pack8<__nv_bfloat16>(v) : pack8<__half>(v);
  }
}

}  // namespace

void launch_dequantize(const QuantWeight& w, Matrix out, std::int64_t first_output,
                       cudaStream_t stream) {
  const int element = out.dtype == DType::f32 ? 4 : 2;
  const bool aligned =
      reinterpret_cast<std::uintptr_t>(out.data) % 16 == 0 && out.stride * element % 16 == 0;
  const auto kernel = [&] {
    switch (w.format.bits) {
      case 2:
        return dequantize<2>;
      case 3:
        return dequantize<3>;
      case 4:
        return dequantize<4>;
      case 8:
        return dequantize<8>;
    }
    unsupported_bits(w.format.bits);
  }();
  const unsigned blocks =
      tiles_of(w.format.in_features, kInputs) * static_cast<unsigned>(out.rows / kTile);
  if (blocks == 0) return;
  kernel<<<blocks, kThreads, 0, stream>>>(PackedWeight(w), out, static_cast<int>(first_output),
                                          aligned);
  check_launch("dequantize");
}

}  // namespace lowbitcore::cuda
