// Checks of data that lies on the device, and of the device.
#include <lowbitcore/runtime.h>

#include "elements.cuh"
#include "kernels.h"
#include "launch.h"

namespace lowbitcore::cuda {

namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMostBlocks = 1024;  // each takes as many elements as that leaves it

__global__ void __launch_bounds__(kThreads) find_nonfinite(ConstMatrix m, int* found) {
  const std::int64_t count = m.rows * m.cols;
  bool bad = false;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    bad |= !isfinite(load_as_float(m.data, m.dtype, i / m.cols * m.stride + i % m.cols));
  }
  if (bad) atomicOr(found, 1);
}

}  // namespace

bool all_finite(ConstMatrix matrix, void* workspace, cudaStream_t stream) {
  const std::int64_t blocks = (matrix.rows * matrix.cols + kThreads - 1) / kThreads;
  if (blocks == 0) return true;
  int* device_found = static_cast<int*>(workspace);
  check(cudaMemsetAsync(device_found, 0, sizeof(int), stream), "all_finite");
  find_nonfinite<<<static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks), kThreads, 0,
                   stream>>>(matrix, device_found);
  check_launch("all_finite");
  int found = 0;
  check(cudaMemcpyAsync(&found, device_found, sizeof(int), cudaMemcpyDeviceToHost, stream),
        "all_finite");
  check(cudaStreamSynchronize(stream), "all_finite");
  return found == 0;
}

}  // namespace lowbitcore::cuda

// Asks for one kernel, which makes the runtime load it, or compile it from PTX.
std::string lowbitcore::cuda_why_not(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, cuda::find_nonfinite);
    cudaSetDevice(before);
  }
  cudaGetLastError();  // said here, and not by the next launch
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
