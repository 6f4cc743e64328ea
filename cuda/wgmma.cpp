// Which devices the kernels of gemm_wgmma.cuh run on.
#include <lowbitcore/runtime.h>

#include "cuda_check.h"
#include "kernels.h"

namespace lowbitcore {

bool cuda_has_wgmma() { return true; }

namespace cuda {

// Asked for every time: the runtime answers from memory.
bool supports_wgmma() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "cudaDeviceGetAttribute");
  return major == 9 && minor == 0;
}

}  // namespace cuda

}  // namespace lowbitcore
