// Plain views and enums shared by every operation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

namespace lowbitcore {

// Results lie apart from what a call reads, unless a header says otherwise. Products, gradients of
// adapters and scales, and permutations refuse results that overlap their activations; of weights,
// and in other operations, it is the host's care.

// Anything that is not the caller's mistake: a matrix that is not positive definite, an instruction
// set the CPU lacks, a device this build has no kernels for. Mistakes of the caller throw
// std::invalid_argument with a message that names operation, argument, what was wanted and what
// came.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class DType { f32, bf16, f16 };

// Where the data of a call lies, all of it, and where it is computed.
enum class Device { cpu, cuda };

// A row-major matrix of a type known at compile time. `stride` is the distance between rows, in
// elements; columns are contiguous.
template <typename T>
struct View {
  T* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;

  template <typename U = T, typename = std::enable_if_t<!std::is_const_v<U>>>
  operator View<const U>() const {
    return {data, rows, cols, stride};
  }
};

// A row-major floating-point matrix whose type is known at run time.
struct ConstMatrix {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;
};

struct Matrix {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;

  operator ConstMatrix() const { return {data, dtype, rows, cols, stride}; }
};

// Heads of attention, [batch, heads, rows, cols], of a type known at run time. Strides are in
// elements; columns are contiguous.
struct ConstHeads {
  const void* data = nullptr;
  DType dtype = DType::bf16;
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t batch_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t row_stride = 0;
};

struct Heads {
  void* data = nullptr;
  DType dtype = DType::bf16;
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t batch_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t row_stride = 0;

  operator ConstHeads() const {
    return {data, dtype, batch, heads, rows, cols, batch_stride, head_stride, row_stride};
  }
};

// What a host brings to a call. A workspace lies at a multiple of 64 bytes, also where a call needs
// none. The sizes that *_workspace_size functions tell hold for those very arguments, and for this
// level of kernels, number of threads and current device: fewer rows may need more.
//
// On the CPU, zero threads means get_num_threads(), and no workspace means that the library keeps
// one per calling thread, as large as that thread's largest call, for as long as the thread lives.
//
// On CUDA, data and workspace are device memory of the current device, the call returns once its
// work is in `stream` (a cudaStream_t; null is the default stream), and no workspace means that one
// is allocated in the order of the stream, from a pool of the library's own. A CUDA graph may
// capture products; call each once before, since a kernel is loaded when first called.
struct Execution {
  int num_threads = 0;
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
  Device device = Device::cpu;
  void* stream = nullptr;
};

}  // namespace lowbitcore
