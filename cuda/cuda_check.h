// Errors of the CUDA runtime become exceptions.
#pragma once

#include <cuda_runtime_api.h>
#include <lowbitcore/types.h>

#include <string>

namespace lowbitcore::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the runtime keeps it, too: the next check_launch would find it
  throw Error(std::string(what) + ": CUDA: " + cudaGetErrorString(error));
}

// After every launch: takes the launch's own error, which would otherwise surface in a later call.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

}  // namespace lowbitcore::cuda
