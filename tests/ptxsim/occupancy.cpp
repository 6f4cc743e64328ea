// Blocks that a multiprocessor holds, by NVIDIA's own rules: lines "major minor threads registers
// shared" on standard input; blocks, or -1 if a launch would fail, on standard output.
#include <cuda_occupancy.h>

#include <cstdio>

// Shared memory of a multiprocessor: CUDA programming guide, technical specifications.
static std::size_t shared_of_multiprocessor(int major, int minor) {
  if (major == 9) return 228 * 1024;
  return major == 8 && minor == 0 ? 164 * 1024 : 100 * 1024;
}

int main() {
  constexpr std::size_t kReserved = 1024;  // of each block, for the system
  int major = 0, minor = 0, threads = 0, registers = 0;
  std::size_t shared = 0;
  while (std::scanf("%d %d %d %d %zu", &major, &minor, &threads, &registers, &shared) == 5) {
    const std::size_t all = shared_of_multiprocessor(major, minor);
    cudaOccDeviceProp device = {};
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = major == 8 && minor != 0 ? 1536 : 2048;
    device.regsPerBlock = 65536;
    device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = all;
    device.numSms = 1;
    device.sharedMemPerBlockOptin = all - kReserved;
    device.reservedSharedMemPerBlock = kReserved;
    cudaOccFuncAttributes kernel = {};
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = all - kReserved;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state = {};
    state.cacheConfig = CACHE_PREFER_SHARED;
    state.carveoutConfig = 100;
    cudaOccResult result = {};
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
    std::printf("%d\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1);
  }
}
