// Launching a tensor-core kernel: its shared memory, its element type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_check.h"
#include "kernels.h"

namespace lowbitcore::cuda {

// Calls body with a value of the element type.
template <typename Body>
void with_half_type(DType dtype, const Body& body) {
  if (dtype == DType::f16) {
    body(__half());
  } else {
    body(__nv_bfloat16());
  }
}

template <typename Args>
void launch(void (*kernel)(Args), const char* name, dim3 grid, int threads, int shared_bytes,
            const Args& args, cudaStream_t stream) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        name);
  kernel<<<grid, threads, shared_bytes, stream>>>(args);
  check_launch(name);
}

// How many tiles of `size` cover `count`.
inline unsigned tiles_of(std::int64_t count, int size) {
  return static_cast<unsigned>((count + size - 1) / size);
}

}  // namespace lowbitcore::cuda
