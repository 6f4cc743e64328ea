// Matrices and packed weights an element at a time: for kernels that take any type, any row stride
// and any g_idx.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <lowbitcore/format.h>

#include "layout.cuh"

namespace lowbitcore::cuda {

__device__ __forceinline__ float load_as_float(const void* data, DType dtype, std::int64_t at) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(data)[at];
    case DType::bf16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
    default:
      return __half2float(static_cast<const __half*>(data)[at]);
  }
}

__device__ __forceinline__ void store_as(float value, void* data, DType dtype, std::int64_t at) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[at] = value;
      break;
    case DType::bf16:
      static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(value);
      break;
    default:
      static_cast<__half*>(data)[at] = __float2half_rn(value);
  }
}

// Columns of a whole group: no more than there are.
inline std::int64_t group_columns(const QuantFormat& f) {
  return f.group_size == -1 || f.group_size > f.in_features ? f.in_features : f.group_size;
}

// What an integer of one output and group stands for.
struct Affine {
  float scale, zero;

  __device__ __forceinline__ float operator()(std::uint32_t q) const {
    return scale * (static_cast<float>(q) - zero);
  }
};

// A QuantWeight as kernels take it.
struct PackedWeight {
  const std::uint32_t* packed;
  const std::uint8_t* zeros;  // [G, N]
  const float* scales;        // [G, N]
  std::int64_t scales_stride;
  const std::int32_t* g_idx;
  int bits, n, k, group_size, groups;

  explicit PackedWeight(const QuantWeight& w)
      : packed(static_cast<const std::uint32_t*>(w.packed)),
        zeros(static_cast<const std::uint8_t*>(w.packed) +
              zeros_offset(w.format.bits, w.format.out_features, w.format.in_features)),
        scales(w.scales.data),
        scales_stride(w.scales.stride),
        g_idx(w.g_idx),
        bits(w.format.bits),
        n(static_cast<int>(w.format.out_features)),
        k(static_cast<int>(w.format.in_features)),
        group_size(static_cast<int>(group_columns(w.format))),
        groups(static_cast<int>(w.format.groups())) {}

  // A g_idx in device memory is not checked before the kernel reads it.
  __device__ __forceinline__ int group(int column) const {
    if (g_idx == nullptr) return column / group_size;
    const int g = g_idx[column];
    if (g < 0 || g >= groups) __trap();
    return g;
  }

  // The groups of an even column and of the next; without g_idx they are the same.
  __device__ __forceinline__ int2 group_pair(int column) const {
    const int g = group(column);
    return make_int2(g, g_idx == nullptr ? g : group(column + 1));
  }

  __device__ __forceinline__ float zero(int g, int row) const {
    return static_cast<float>(zeros[static_cast<std::int64_t>(g) * n + row]);
  }

  __device__ __forceinline__ Affine affine(int g, int row) const {
    return {scales[g * scales_stride + row], zero(g, row)};
  }

  // The integers at an even column and at the next: e = 0 and 1 of one place in the layout, 16 bits
  // apart. `width` is `bits`, as a constant where the caller has one.
  __device__ __forceinline__ uint2 code_pair(int width, int row, int column) const {
    // Unsigned, so that the divisions in `locate` become shifts.
    const FieldPlace at =
        locate(width, k, static_cast<unsigned>(row), static_cast<unsigned>(column));
    const std::uint32_t low = packed[at.word] >> at.bit;
    const std::uint32_t mask = width == 3 ? 3u : (1u << width) - 1u;
    uint2 q = make_uint2(low & mask, low >> 16 & mask);
    if (width == 3) {
      const std::uint32_t high = packed[at.high_word] >> at.high_bit;
      q.x |= (high & 1u) << 2;
      q.y |= (high >> 16 & 1u) << 2;
    }
    return q;
  }

  __device__ __forceinline__ float2 value_pair(int row, int column, int2 g) const {
    const uint2 q = code_pair(bits, row, column);
    const Affine first = affine(g.x, row), second = g.y == g.x ? first : affine(g.y, row);
    return make_float2(first(q.x), second(q.y));
  }
};

}  // namespace lowbitcore::cuda
