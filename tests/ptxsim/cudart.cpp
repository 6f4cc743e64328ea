// The CUDA runtime API on top of the interpreter: what nvcc's host code calls, and what the library
// uses. Linked instead of cudart. Streams and events are names; everything is done when it returns.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fatbin.h"
#include "simulator.h"

using ptxsim::GlobalMemory;
using ptxsim::Kernel;
using ptxsim::Launch;
using ptxsim::Module;
using ptxsim::Origin;
using ptxsim::Simulator;

namespace {

constexpr int kDefaultSharedBytes = 48 * 1024;  // more must be asked for
constexpr int kThreadsPerSm = 2048;
constexpr int kReservedSharedBytes = 1024;  // of each block, by the driver

// What nvcc's host code has registered for one translation unit.
struct FatBinary {
  const void* wrapper;
  std::map<uint32_t, const Module*> modules;  // by architecture, of those that were used

  // Of the pretended device as it is now.
  const Module& module() {
    Simulator& simulator = Simulator::get();
    const ptxsim::PtxImage image =
        ptxsim::ptx_of_fatbin(wrapper, static_cast<int>(simulator.options.compute_capability));
    const Module*& place = modules[image.architecture];
    if (place == nullptr) place = &simulator.load(std::string(image.text));
    return *place;
  }
};

struct Function {
  FatBinary* binary;
  std::string name;
  int max_dynamic_shared = -1;  // -1: not asked for

  const Kernel& kernel() const {
    try {
      return Simulator::get().kernel(name, &binary->module());
    } catch (const std::exception& error) {
      ptxsim::fail("%s: %s", name.c_str(), error.what());
    }
  }
  int dynamic_limit() const {
    return max_dynamic_shared >= 0
               ? max_dynamic_shared
               : kDefaultSharedBytes - static_cast<int>(kernel().dynamic_shared_offset);
  }
};

struct Variable {
  FatBinary* binary;
  std::string name;
};

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

struct Runtime {
  std::map<const void*, Function> functions;  // by the host function that stands for it
  std::map<const void*, Variable> variables;
  std::map<void*, size_t> allocations;
  std::vector<Configuration> configurations;
  std::string failure = "unspecified launch failure";
};

Runtime& runtime() {
  // Never destroyed: host code unregisters itself when the process ends, in no known order.
  static Runtime& instance = *new Runtime;
  return instance;
}

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// Runs `body` with the simulator locked; an interpreter error is a launch failure.
template <class Body>
cudaError_t guarded(Body body) {
  Simulator& simulator = Simulator::get();
  const std::lock_guard<std::recursive_mutex> lock(simulator.mutex);
  try {
    return remember(body(simulator));
  } catch (const std::exception& error) {
    simulator.error = error.what();
    runtime().failure = std::string("unspecified launch failure: ") + error.what();
    return remember(cudaErrorLaunchFailure);
  }
}

// A function by its host stand-in, or by the handle that __cudaGetKernel gave for it.
Function* find_function(const void* entry) {
  const auto found = runtime().functions.find(entry);
  if (found != runtime().functions.end()) return &found->second;
  for (auto& [host, function] : runtime().functions) {
    if (&function == entry) return &function;
  }
  return nullptr;
}

cudaError_t launch(Simulator& simulator, const void* entry, dim3 grid, dim3 block, void** arguments,
                   size_t shared) {
  const Function* function = find_function(entry);
  if (function == nullptr) return cudaErrorInvalidDeviceFunction;
  const bool empty =
      grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0;
  if (empty || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || block.x > 1024 ||
      block.y > 1024 || block.z > 64 || static_cast<uint64_t>(block.x) * block.y * block.z > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  const Kernel& kernel = function->kernel();
  if (block.x * block.y * block.z > kernel.max_threads) return cudaErrorInvalidValue;
  if (static_cast<int64_t>(shared) > function->dynamic_limit()) return cudaErrorInvalidValue;
  std::vector<uint8_t> parameters(kernel.parameter_bytes);
  for (size_t k = 0; k < kernel.parameters.size(); ++k) {
    const ptxsim::Parameter& parameter = kernel.parameters[k];
    std::memcpy(&parameters[parameter.offset], arguments[k], parameter.bytes);
  }
  const Launch launch = {{grid.x, grid.y, grid.z},
                         {block.x, block.y, block.z},
                         static_cast<uint32_t>(shared),
                         parameters.data()};
  simulator.launch(kernel, launch, kernel.parameter_bytes);
  return cudaSuccess;
}

void* allocate(Simulator& simulator, size_t bytes) {
  constexpr size_t kAlignment = 256;
  void* memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (memory == nullptr) return nullptr;
  constexpr int kPoison = 0xff;  // NaN in every floating type
  std::memset(memory, kPoison, bytes);
  simulator.memory.add(reinterpret_cast<uint64_t>(memory), bytes, Origin::kAllocation);
  runtime().allocations[memory] = bytes;
  return memory;
}

cudaError_t attribute(cudaDeviceAttr name, int* value) {
  const ptxsim::Options& options = Simulator::get().options;
  const int optin = static_cast<int>(options.max_dynamic_shared);
  const int capability = static_cast<int>(options.compute_capability);
  const std::map<cudaDeviceAttr, int> known = {
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxBlockDimX, 1024},
      {cudaDevAttrMaxBlockDimY, 1024},
      {cudaDevAttrMaxBlockDimZ, 64},
      {cudaDevAttrMaxGridDimX, 0x7fffffff},
      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},
      {cudaDevAttrMaxSharedMemoryPerBlock, kDefaultSharedBytes},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, optin},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, optin + kReservedSharedBytes},
      {cudaDevAttrReservedSharedMemoryPerBlock, kReservedSharedBytes},
      {cudaDevAttrMaxThreadsPerMultiProcessor, kThreadsPerSm},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
      {cudaDevAttrMultiProcessorCount, static_cast<int>(options.sms)},
      {cudaDevAttrComputeCapabilityMajor, capability / 10},
      {cudaDevAttrComputeCapabilityMinor, capability % 10},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrL2CacheSize, 40 << 20},
      {cudaDevAttrMemoryPoolsSupported, 1},
      {cudaDevAttrConcurrentKernels, 0},
      {cudaDevAttrCooperativeLaunch, 0},
  };
  const auto found = known.find(name);
  if (found == known.end()) return cudaErrorInvalidValue;
  *value = found->second;
  return cudaSuccess;
}

cudaError_t symbol_memory(const void* symbol, uint8_t** memory, size_t* bytes) {
  const auto found = runtime().variables.find(symbol);
  if (found == runtime().variables.end()) return cudaErrorInvalidSymbol;
  const Variable& variable = found->second;
  const Module& module = variable.binary->module();
  const auto storage = module.storage.find(variable.name);
  if (storage == module.storage.end()) return cudaErrorInvalidSymbol;
  *memory = storage->second.get();
  *bytes = module.variables.find(variable.name)->second.bytes;
  return cudaSuccess;
}

}  // namespace

extern "C" {

// ---- What nvcc's host code calls

void** __cudaRegisterFatBinary(void* wrapper) {
  auto* binary = new FatBinary{wrapper, {}};
  guarded([&](Simulator&) {
    try {
      binary->module();  // so that its kernels are known by name
    } catch (const std::exception&) {
      // Told when one of its kernels is launched.
    }
    return cudaSuccess;
  });
  return reinterpret_cast<void**>(binary);
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void** handle) {
  std::unique_ptr<FatBinary> binary(reinterpret_cast<FatBinary*>(handle));
  guarded([&](Simulator& simulator) {
    const auto drop = [&](auto& registered) {
      for (auto entry = registered.begin(); entry != registered.end();) {
        entry = entry->second.binary == binary.get() ? registered.erase(entry) : std::next(entry);
      }
    };
    drop(runtime().functions);
    drop(runtime().variables);
    for (const auto& [architecture, module] : binary->modules) {
      if (module != nullptr) simulator.unload(*module);
    }
    return cudaSuccess;
  });
}

char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  runtime().functions[host] = {reinterpret_cast<FatBinary*>(handle), name};
}

void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t, int, int) {
  runtime().variables[host] = {reinterpret_cast<FatBinary*>(handle), name};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  runtime().configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (runtime().configurations.empty()) return remember(cudaErrorMissingConfiguration);
  const Configuration configuration = runtime().configurations.back();
  runtime().configurations.pop_back();
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  Function* function = find_function(host);
  if (function == nullptr) return remember(cudaErrorInvalidDeviceFunction);
  *kernel = reinterpret_cast<cudaKernel_t>(function);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  return guarded([&](Simulator& simulator) {
    return launch(simulator, function, grid, block, arguments, shared);
  });
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                                    size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  for (unsigned k = 0; k < config->numAttrs; ++k) {
    // Clusters would need distributed shared memory; hints change nothing here.
    if (config->attrs[k].id == cudaLaunchAttributeClusterDimension) {
      return remember(cudaErrorNotSupported);
    }
  }
  return cudaLaunchKernel(function, config->gridDim, config->blockDim, arguments,
                          config->dynamicSmemBytes, config->stream);
}

// ---- Functions

cudaError_t cudaFuncSetAttribute(const void* entry, cudaFuncAttribute name, int value) {
  return guarded([&](Simulator& simulator) {
    Function* function = find_function(entry);
    if (function == nullptr) return cudaErrorInvalidDeviceFunction;
    if (name == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (name != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0) {
      return cudaErrorInvalidValue;
    }
    const int64_t total = static_cast<int64_t>(value) + function->kernel().dynamic_shared_offset;
    if (total > simulator.options.max_dynamic_shared) return cudaErrorInvalidValue;
    function->max_dynamic_shared = value;
    return cudaSuccess;
  });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* entry) {
  return guarded([&](Simulator& simulator) {
    const Function* function = find_function(entry);
    if (function == nullptr) return cudaErrorInvalidDeviceFunction;
    const Kernel& kernel = function->kernel();
    *attributes = {};
    attributes->sharedSizeBytes = kernel.static_shared;
    attributes->localSizeBytes = kernel.local_bytes;
    attributes->maxThreadsPerBlock = static_cast<int>(kernel.max_threads);
    attributes->maxDynamicSharedSizeBytes = function->dynamic_limit();
    attributes->ptxVersion = static_cast<int>(simulator.options.compute_capability);
    attributes->binaryVersion = attributes->ptxVersion;
    return cudaSuccess;
  });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* entry,
                                                                   int threads, size_t shared,
                                                                   unsigned) {
  return guarded([&](Simulator& simulator) {
    const Function* function = find_function(entry);
    if (function == nullptr) return cudaErrorInvalidDeviceFunction;
    if (threads <= 0) return cudaErrorInvalidValue;
    // Registers are not known before ptxas.
    const auto each = static_cast<int64_t>(function->kernel().dynamic_shared_offset + shared) +
                      kReservedSharedBytes;
    const int64_t by_shared = (simulator.options.max_dynamic_shared + kReservedSharedBytes) / each;
    const int64_t by_threads = kThreadsPerSm / ((threads + 31) / 32 * 32);
    *blocks = static_cast<int>(std::min<int64_t>({by_shared, by_threads, 32}));
    return cudaSuccess;
  });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* entry,
                                                          int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, entry, threads, shared, 0);
}

// ---- Errors

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorMissingConfiguration:
      return "__global__ function call is not configured";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidSymbol:
      return "invalid device symbol";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorLaunchFailure:
      return runtime().failure.c_str();
    default:
      return "an error that ptxsim does not know";
  }
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorMissingConfiguration:
      return "cudaErrorMissingConfiguration";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidSymbol:
      return "cudaErrorInvalidSymbol";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    default:
      return "an error that ptxsim does not know";
  }
}

// ---- The device

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return remember(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device) {
  return guarded(
      [&](Simulator&) { return device == 0 ? attribute(name, value) : cudaErrorInvalidDevice; });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  return guarded([&](Simulator& simulator) {
    if (device != 0) return cudaErrorInvalidDevice;
    const ptxsim::Options& options = simulator.options;
    const auto capability = static_cast<int>(options.compute_capability);
    std::memset(properties, 0, sizeof *properties);
    std::snprintf(properties->name, sizeof properties->name, "ptxsim (emulated sm_%d)", capability);
    properties->totalGlobalMem = size_t{40} << 30;
    properties->sharedMemPerBlock = kDefaultSharedBytes;
    properties->sharedMemPerBlockOptin = static_cast<size_t>(options.max_dynamic_shared);
    properties->sharedMemPerMultiprocessor =
        properties->sharedMemPerBlockOptin + kReservedSharedBytes;
    properties->reservedSharedMemPerBlock = kReservedSharedBytes;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = kThreadsPerSm;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 0x7fffffff;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->major = capability / 10;
    properties->minor = capability % 10;
    properties->multiProcessorCount = static_cast<int>(options.sms);
    properties->l2CacheSize = 40 << 20;
    return cudaSuccess;
  });
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// ---- Memory

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  return guarded([&](Simulator& simulator) {
    *pointer = bytes == 0 ? nullptr : allocate(simulator, bytes);
    return bytes != 0 && *pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
  });
}

cudaError_t cudaFree(void* pointer) {
  return guarded([&](Simulator& simulator) {
    if (pointer == nullptr) return cudaSuccess;
    if (runtime().allocations.erase(pointer) == 0) return cudaErrorInvalidValue;
    simulator.memory.remove(reinterpret_cast<uint64_t>(pointer), Origin::kAllocation);
    std::free(pointer);
    return cudaSuccess;
  });
}

cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) {
  return cudaMalloc(pointer, bytes);
}

// A pool is nothing here but a handle: what is freed is gone, so that stale pointers are seen.
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  static int handle;
  *pool = reinterpret_cast<cudaMemPool_t>(&handle);
  return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }

cudaError_t cudaMallocFromPoolAsync(void** pointer, size_t bytes, cudaMemPool_t,
                                    cudaStream_t stream) {
  return cudaMallocAsync(pointer, bytes, stream);
}

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes != 0) std::memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t) {
  if (width > to_pitch || width > from_pitch) return cudaErrorInvalidPitchValue;
  for (size_t row = 0; row < height; ++row) {
    std::memcpy(static_cast<char*>(to) + row * to_pitch,
                static_cast<const char*>(from) + row * from_pitch, width);
  }
  return cudaSuccess;
}

cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  if (bytes != 0) std::memset(pointer, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(pointer, value, bytes);
}

cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  return guarded([&](Simulator&) {
    uint8_t* memory = nullptr;
    size_t bytes = 0;
    const cudaError_t error = symbol_memory(symbol, &memory, &bytes);
    *pointer = memory;
    return error;
  });
}

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t count, size_t offset,
                               cudaMemcpyKind) {
  return guarded([&](Simulator&) {
    uint8_t* memory = nullptr;
    size_t bytes = 0;
    if (const cudaError_t error = symbol_memory(symbol, &memory, &bytes)) return error;
    if (offset + count > bytes) return cudaErrorInvalidValue;
    std::memcpy(memory + offset, from, count);
    return cudaSuccess;
  });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  return guarded([&](Simulator& simulator) {
    *attributes = {};
    const auto address = reinterpret_cast<uint64_t>(pointer);
    const bool known = simulator.memory.contains(address, Origin::kAllocation) ||
                       simulator.memory.contains(address, Origin::kUser) ||
                       simulator.memory.contains(address, Origin::kModule);
    attributes->type = known ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    if (known) attributes->devicePointer = const_cast<void*>(pointer);
    return cudaSuccess;
  });
}

// ---- Streams and events

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = nullptr;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

}  // extern "C"
