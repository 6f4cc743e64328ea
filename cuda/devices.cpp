// What CUDA devices are there.
#include <cuda_runtime_api.h>
#include <lowbitcore/runtime.h>

namespace lowbitcore {

std::string cuda_status() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return std::string("built, but ") + cudaGetErrorString(error);
  std::string status = "built; devices:";
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    status += std::string(i == 0 ? " " : ", ") + properties.name + " (sm_" +
              std::to_string(properties.major) + std::to_string(properties.minor) + ")";
  }
  return count == 0 ? status + " none" : status;
}

bool cuda_has_wgmma() {
#ifdef LOWBITCORE_WITH_WGMMA
  return true;
#else
  return false;
#endif
}

}  // namespace lowbitcore
