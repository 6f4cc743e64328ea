// What the tensor-core kernels share: arguments, tiles in shared memory, groups.
#pragma once

#include "dequant.cuh"
#include "kernels.h"

namespace lowbitcore::cuda {

constexpr int kStep = 64;             // of the contraction, between two barriers
constexpr int kRowBytes = kStep * 2;  // of an activation tile in shared memory
constexpr int kChunk = 16;            // bytes that one cp.async copies
constexpr int kChunksPerRow = kRowBytes / kChunk;

// Where a chunk of an activation tile lies: permuted so that ldmatrix has no bank conflicts.
__device__ __forceinline__ int activation_offset(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) * kChunk);
}

// The smallest power of two that is not below n.
constexpr int power_of_two(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

// The steps of a contraction that blockIdx.z takes: an equal share, which may be none.
struct Share {
  int first, last;

  __device__ __forceinline__ explicit Share(int steps) {
    const int count = (steps + gridDim.z - 1) / gridDim.z;
    first = blockIdx.z * count;
    last = min(steps, first + count);
  }
};

// What one thread copies of the activations: step after step, kRows rows x 64 columns of a
// [rows, columns] matrix. What lies outside of it becomes zero.
template <int kRows, int kThreads>
class ActivationCopy {
 public:
  __device__ __forceinline__ ActivationCopy(const void* matrix, std::int64_t stride, int first_row,
                                            int rows, int first_column, int columns) {
    const int row = threadIdx.x / kChunksPerRow, chunk = threadIdx.x % kChunksPerRow;
    const int column = first_column + chunk * 8;
    offset_ = activation_offset(row, chunk);
    source_ = static_cast<const char*>(matrix) + ((first_row + row) * stride + column) * 2;
    pitch_ = kRowsPerPass * stride * 2;
    rows_ = rows - first_row - row;
    columns_ = columns - column;
  }

  __device__ __forceinline__ void next(std::uint32_t shared) {
#pragma unroll
    for (int pass = 0; pass < kRows / kRowsPerPass; ++pass) {
      const bool valid = (pass * kRowsPerPass < rows_) & (columns_ > 0);
      ptx::copy_async(shared + offset_ + pass * kRowsPerPass * kRowBytes, source_ + pass * pitch_,
                      valid);
    }
    source_ += kRowBytes;
    columns_ -= kStep;
  }

 private:
  static constexpr int kRowsPerPass = kThreads / kChunksPerRow;
  static_assert(kRows % kRowsPerPass == 0 && kRowsPerPass % 8 == 0, "one pattern for all passes");

  const char* source_;
  std::int64_t pitch_;
  int rows_, columns_, offset_;
};

// What one thread copies of the weight: step after step, kAcross tiles that follow each other along
// K, for each of kStrips strips of 32 outputs. Tiles outside of the weight become zero.
template <int kBits, int kStrips, int kAcross, int kThreads>
class TileCopy {
 public:
  __device__ __forceinline__ TileCopy(const std::uint8_t* packed, int strip, int strips, int tile,
                                      int tiles) {
    const int lane = threadIdx.x % kLanes;
    strip += threadIdx.x / kLanes;
    offset_ = (threadIdx.x / kLanes * kStripChunks + lane) * kChunk;
    strip_bytes_ = static_cast<std::int64_t>(tiles) * kTileBytes<kBits>;
    source_ = packed + strip * strip_bytes_ + tile * kTileBytes<kBits> + lane * kChunk;
    strips_ = strips - strip;
    bytes_ = (tiles - tile) * kTileBytes<kBits> - lane * kChunk;
  }

  __device__ __forceinline__ void copy(std::uint32_t shared) const {
#pragma unroll
    for (int first = 0; first < kStrips; first += kStripsPerPass) {
#pragma unroll
      for (int chunk = 0; chunk < kStripChunks; chunk += kLanes) {
        // Lanes beyond the chunks of a strip have nothing to do.
        if (kStripChunks % kLanes != 0 && threadIdx.x % kLanes + chunk >= kStripChunks) continue;
        const bool valid = (first < strips_) & (chunk * kChunk < bytes_);
        ptx::copy_async(shared + offset_ + (first * kStripChunks + chunk) * kChunk,
                        source_ + first * strip_bytes_ + chunk * kChunk, valid);
      }
    }
  }
  // The next tiles along K, or the next strips.
  __device__ __forceinline__ void next_tiles() {
    source_ += kAcross * kTileBytes<kBits>;
    bytes_ -= kAcross * kTileBytes<kBits>;
  }
  __device__ __forceinline__ void next_strips() {
    source_ += kStrips * strip_bytes_;
    strips_ -= kStrips;
  }

 private:
  static constexpr int kStripChunks = kAcross * kTileBytes<kBits> / kChunk;
  static constexpr int kLanes =
      power_of_two(kStripChunks) < kThreads ? power_of_two(kStripChunks) : kThreads;
  static constexpr int kStripsPerPass = kThreads / kLanes;
  static_assert(kStrips % kStripsPerPass == 0, "a pass is whole strips");

  const std::uint8_t* source_;
  std::int64_t strip_bytes_;
  int strips_, bytes_, offset_;
};

// Scales and zeros of kOutputs outputs in shared memory: a row of each per group.
template <int kOutputs>
struct GridTile {
  static constexpr int kScaleBytes = kOutputs * 4, kZeroBytes = kOutputs;
  static constexpr int kChunks = (kScaleBytes + kZeroBytes) / kChunk;

  template <int kRows>
  static constexpr int bytes() {
    return kRows * (kScaleBytes + kZeroBytes);
  }

  // What one thread copies of it.
  template <int kRows, int kThreads>
  class Copy {
   public:
    __device__ __forceinline__ Copy(const GemmArgs& args, const std::uint8_t* zeros, int output) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int i = static_cast<int>(threadIdx.x) + pass * kThreads;
        const int chunk = i % kChunks, zero_chunk = chunk - kScaleBytes / kChunk;
        Part& part = parts_[pass];
        part.row = i / kChunks;
        part.is_scale = zero_chunk < 0;
        const int first = output + (part.is_scale ? chunk * 4 : zero_chunk * 16);
        part.outputs = args.n - first;
        part.source = part.is_scale ? reinterpret_cast<const char*>(args.scales + first)
                                    : reinterpret_cast<const char*>(zeros + first);
        part.pitch = part.is_scale ? args.scales_stride * 4 : args.n;
      }
    }

    // Rows `group`, `group + 1`, ...: as many as `rows`, at most kRows.
    __device__ __forceinline__ void copy(std::uint32_t shared, int group, int rows) const {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const Part& part = parts_[pass];
        if (part.row >= rows) continue;
        const int i = static_cast<int>(threadIdx.x) + pass * kThreads;
        ptx::copy_async(shared + i * kChunk, part.source + (group + part.row) * part.pitch,
                        part.outputs > 0);
      }
    }
    __device__ __forceinline__ void next_outputs() {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        parts_[pass].source += parts_[pass].is_scale ? kScaleBytes : kZeroBytes;
        parts_[pass].outputs -= kOutputs;
      }
    }

   private:
    static constexpr int kPasses = (kRows * kChunks + kThreads - 1) / kThreads;
    struct Part {
      const char* source;
      std::int64_t pitch;
      int row, outputs;
      bool is_scale;
    };
    Part parts_[kPasses];
  };

  // For the unit row at output `first` of the tile: scales of its outputs first + {0, 1, 8, 9} and
  // the zeros of these as bytes in the order 0, 1, 8, 9.
  static __device__ __forceinline__ void load(std::uint32_t shared, int row, int first,
                                              float (&scales)[4], std::uint32_t& zeros) {
    const std::uint32_t base = shared + row * (kScaleBytes + kZeroBytes);
    const uint2 a = ptx::load_shared_64(base + first * 4);
    const uint2 b = ptx::load_shared_64(base + first * 4 + 32);
    scales[0] = __uint_as_float(a.x);
    scales[1] = __uint_as_float(a.y);
    scales[2] = __uint_as_float(b.x);
    scales[3] = __uint_as_float(b.y);
    zeros = load_zeros(shared, row, first);
  }

  static __device__ __forceinline__ std::uint32_t load_zeros(std::uint32_t shared, int row,
                                                             int first) {
    const std::uint32_t base = shared + row * (kScaleBytes + kZeroBytes) + kScaleBytes + first;
    return ptx::load_shared_16(base) | ptx::load_shared_16(base + 8) << 16;
  }

  static __device__ __forceinline__ uint4 load_scales(std::uint32_t shared, int row, int first) {
    return ptx::load_shared_128(shared + row * (kScaleBytes + kZeroBytes) + first * 4);
  }
};

// Walks over the tiles of a row of W and tells their group.
struct GroupCursor {
  int group, left, tiles;

  __device__ __forceinline__ GroupCursor(int tile, int group_tiles)
      : group(tile / group_tiles), left(group_tiles - tile % group_tiles), tiles(group_tiles) {}

  // Goes on by one tile; true where that begins a group.
  __device__ __forceinline__ bool next() {
    if (--left > 0) return false;
    ++group;
    left = tiles;
    return true;
  }
};

}  // namespace lowbitcore::cuda
