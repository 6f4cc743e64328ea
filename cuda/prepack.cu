// Interchange layout <-> execution layout.
#include "../cpp/src/fields.h"
#include "kernels.h"
#include "launch.h"
#include "layout.cuh"

namespace lowbitcore::cuda {

namespace {

constexpr int kThreads = 256;

// Word `index` of an LSB-first bit stream; field(i) tells its fields.
template <typename Field>
__device__ std::uint32_t stream_word(std::int64_t index, int bits, const Field& field) {
  const std::int64_t first = index * 32;
  std::uint32_t word = 0;
  for (std::int64_t i = first / bits; i * bits < first + 32; ++i) {
    const int shift = static_cast<int>(i * bits - first);
    word |= shift < 0 ? field(i) >> -shift : field(i) << shift;
  }
  return word;
}

// A block per tile. Its fields meet in shared memory, so that `locate` needs no inverse.
__global__ void __launch_bounds__(kThreads)
    prepack_weight(int bits, std::int64_t k_total, View<const std::int32_t> qweight,
                   std::uint32_t* packed) {
  __shared__ std::uint32_t tile[kTile * 8];
  const std::int64_t k_tiles = k_total / kTile;
  const std::int64_t n0 = blockIdx.x / k_tiles * kTile, k0 = blockIdx.x % k_tiles * kTile;
  const int words = kTile * bits;
  const std::size_t first = static_cast<std::size_t>(blockIdx.x) * words;

  for (int i = threadIdx.x; i < words; i += kThreads) tile[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const std::int64_t n = n0 + i % kTile, k = k0 + i / kTile;
    const std::uint32_t q = get_field(qweight.data + n, qweight.stride, k, bits);
    const FieldPlace at = locate(bits, k_total, n, k);
    atomicOr(&tile[at.word - first], (bits == 3 ? q & 3u : q) << at.bit);
    if (bits == 3) atomicOr(&tile[at.high_word - first], q >> 2 << at.high_bit);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < words; i += kThreads) packed[first + i] = tile[i];
}

__global__ void __launch_bounds__(kThreads)
    prepack_zeros(int bits, std::int64_t n_total, View<const std::int32_t> qzeros,
                  std::uint8_t* zeros) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= qzeros.rows * n_total) return;
  const std::int32_t* row = qzeros.data + i / n_total * qzeros.stride;
  zeros[i] = static_cast<std::uint8_t>(get_field(row, 1, i % n_total, bits));
}

__global__ void __launch_bounds__(kThreads)
    unpack_weight(int bits, std::int64_t k_total, const std::uint32_t* packed,
                  View<std::int32_t> qweight) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= qweight.rows * qweight.cols) return;
  const std::int64_t row = i / qweight.cols, n = i % qweight.cols;
  const std::uint32_t word = stream_word(
      row, bits, [&](std::int64_t k) { return load_field(packed, bits, k_total, n, k); });
  qweight.data[row * qweight.stride + n] = static_cast<std::int32_t>(word);
}

__global__ void __launch_bounds__(kThreads)
    unpack_zeros(int bits, std::int64_t n_total, const std::uint8_t* zeros,
                 View<std::int32_t> qzeros) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= qzeros.rows * qzeros.cols) return;
  const std::int64_t g = i / qzeros.cols, column = i % qzeros.cols;
  const std::uint32_t word = stream_word(column, bits, [&](std::int64_t n) {
    return static_cast<std::uint32_t>(zeros[g * n_total + n]);
  });
  qzeros.data[g * qzeros.stride + column] = static_cast<std::int32_t>(word);
}

}  // namespace

void launch_prepack(const QuantFormat& format, View<const std::int32_t> qweight,
                    View<const std::int32_t> qzeros, std::uint8_t* packed, cudaStream_t stream) {
  const std::int64_t n = format.out_features, k = format.in_features;
  prepack_weight<<<tiles_of(n * k, kTile * kTile), kThreads, 0, stream>>>(
      format.bits, k, qweight, reinterpret_cast<std::uint32_t*>(packed));
  check_launch("prepack_weight");
  prepack_zeros<<<tiles_of(format.groups() * n, kThreads), kThreads, 0, stream>>>(
      format.bits, n, qzeros, packed + zeros_offset(format.bits, n, k));
  check_launch("prepack_zeros");
}

void launch_unpack(const QuantFormat& format, const std::uint8_t* packed,
                   View<std::int32_t> qweight, View<std::int32_t> qzeros, cudaStream_t stream) {
  const std::int64_t n = format.out_features, k = format.in_features;
  unpack_weight<<<tiles_of(qweight.rows * qweight.cols, kThreads), kThreads, 0, stream>>>(
      format.bits, k, reinterpret_cast<const std::uint32_t*>(packed), qweight);
  check_launch("unpack_weight");
  unpack_zeros<<<tiles_of(qzeros.rows * qzeros.cols, kThreads), kThreads, 0, stream>>>(
      format.bits, n, packed + zeros_offset(format.bits, n, k), qzeros);
  check_launch("unpack_zeros");
}

}  // namespace lowbitcore::cuda
