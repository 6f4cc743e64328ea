// The CUDA backend: device memory, and which kernel computes what.
#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>

#include "../cpp/src/call.h"
#include "cuda_check.h"
#include "dispatch.h"

namespace lowbitcore {

namespace cuda {

namespace {

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

// ---- memory ----

constexpr int kDevices = 64;  // of a process; caches have an entry for each

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device >= kDevices) throw Error("CUDA device " + std::to_string(device) + ": too many");
  return device;
}

// What a pool keeps of what was freed when somebody waits for the device: more than products take
// (a tile of 128 KiB for each multiprocessor; for gradients of scales, an eighth of a byte for each
// weight), and far less than GPTQ does (its copy of a weight).
constexpr std::uint64_t kKeptScratch = std::uint64_t{64} << 20;

// The library's own pool of a device: the default one keeps nothing.
cudaMemPool_t scratch_pool() {
  static std::array<cudaMemPool_t, kDevices> pools{};
  static std::mutex mutex;
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  cudaMemPool_t& pool = pools[static_cast<std::size_t>(device)];
  if (pool == nullptr) {
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location = {cudaMemLocationTypeDevice, device};
    check(cudaMemPoolCreate(&pool, &properties), "workspace");
    std::uint64_t kept = kKeptScratch;
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept), "workspace");
  }
  return pool;
}

void* allocate(std::size_t bytes, void* stream) {
  void* scratch = nullptr;
  check(cudaMallocFromPoolAsync(&scratch, bytes, scratch_pool(), stream_of(stream)), "workspace");
  return scratch;
}

// Also called while an exception is on its way, whose message matters more.
void release(void* scratch, void* stream) {
  if (cudaFreeAsync(scratch, stream_of(stream)) != cudaSuccess) cudaGetLastError();
}

void to_host(void* host, const void* device, std::size_t pitch, std::size_t width, std::size_t rows,
             void* stream) {
  check(cudaMemcpy2DAsync(host, width, device, pitch, width, rows, cudaMemcpyDeviceToHost,
                          stream_of(stream)),
        "to_host");
  check(cudaStreamSynchronize(stream_of(stream)), "to_host");
}

void from_host(void* device, const void* host, std::size_t bytes, void* stream) {
  check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_of(stream)),
        "from_host");
  check(cudaStreamSynchronize(stream_of(stream)), "from_host");
}

void check_finite(const char* op, const char* argument, const char* expected, ConstMatrix matrix,
                  void* stream) {
  Execution exec;
  exec.device = Device::cuda;
  exec.stream = stream;
  const Call call(op, exec, 1, kAllFiniteWorkspace);
  if (!all_finite(matrix, call.workspace(), stream_of(stream))) {
    lowbitcore::check::fail(op, argument, expected, "NaN or Inf");
  }
}

void prepack(const QuantFormat& format, View<const std::int32_t> qweight,
             View<const std::int32_t> qzeros, void* packed, void* stream) {
  launch_prepack(format, qweight, qzeros, static_cast<std::uint8_t*>(packed), stream_of(stream));
}

void unpack(const QuantFormat& format, const void* packed, View<std::int32_t> qweight,
            View<std::int32_t> qzeros, void* stream) {
  launch_unpack(format, static_cast<const std::uint8_t*>(packed), qweight, qzeros,
                stream_of(stream));
}

// ---- products ----

int multiprocessors() {
  static std::array<std::atomic<int>, kDevices> known{};
  const int device = current_device();
  std::atomic<int>& cached = known[static_cast<std::size_t>(device)];
  int count = cached.load();
  if (count > 0) return count;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  cached.store(count);
  return count;
}

bool aligned(const void* data, std::int64_t stride, std::int64_t element_bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride * element_bytes % 16 == 0;
}

// Whether the tensor-core kernels take these operands; qgemm_simt.cu takes what is left.
bool on_tensor_cores(const ConstMatrix& a, const ConstMatrix& b, const QuantWeight& w) {
  return a.dtype != DType::f32 && w.g_idx == nullptr && aligned(a.data, a.stride, 2) &&
         aligned(b.data, b.stride, 2);
}

// Whether the kernels of gemm_wgmma.cuh are there and run on the current device. Asked for every
// time: the runtime answers from memory.
bool supports_wgmma() {
#ifdef LOWBITCORE_WITH_WGMMA
  const int device = current_device();
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "cudaDeviceGetAttribute");
  return major == 9 && minor == 0;
#else
  return false;
#endif
}

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t columns_of(Op op, const QuantFormat& f) {
  return op == Op::nt ? f.out_features : f.in_features;
}

// How a product is computed. Depends on nothing but shapes and the device, so that workspaces fit.
struct Plan {
  bool wgmma;
  RowClass kind;  // without wgmma
  int splits;
};

Plan plan_of(Op op, const QuantFormat& f, std::int64_t m) {
  constexpr std::int64_t kStep = 64;
  const RowClass kind = row_class(m);
  const bool wgmma = kind == RowClass::many && supports_wgmma();
  const std::int64_t rows = wgmma ? 128 : block_rows(kind);
  const std::int64_t columns = wgmma || kind == RowClass::few ? 256 : 128;
  const std::int64_t depth = op == Op::nt ? f.in_features : f.out_features;
  // Few rows leave room for a second block, and small partial results; more rows would move more
  // of these than the second block is worth.
  const int blocks_each = !wgmma && kind == RowClass::few ? 2 : 1;
  const int splits = choose_splits(divide_up(m, rows) * divide_up(columns_of(op, f), columns),
                                   divide_up(depth, kStep), multiprocessors(), blocks_each);
  return {wgmma, kind, splits};
}

int grad_scales_splits(const QuantFormat& f, std::int64_t m) {
  constexpr std::int64_t kTokens = 32, kTileSize = 128;
  return choose_splits(divide_up(f.out_features, kTileSize) * divide_up(f.in_features, kTileSize),
                       divide_up(m, kTokens), multiprocessors(), 2);
}

// Calls body with the width as a constant.
template <typename Body>
void with_bits(int bits, const Body& body) {
  switch (bits) {
    case 2:
      return body(std::integral_constant<int, 2>());
    case 3:
      return body(std::integral_constant<int, 3>());
    case 4:
      return body(std::integral_constant<int, 4>());
    case 8:
      return body(std::integral_constant<int, 8>());
    default:
      unsupported_bits(bits);
  }
}

int group_tiles(const QuantFormat& f) {
  return static_cast<int>((f.group_size == -1 ? f.in_features : f.group_size) / 32);
}

void product(Op op, ConstMatrix in, const QuantWeight& w, const float* bias, Matrix out,
             const Resources& use) {
  const cudaStream_t stream = stream_of(use.stream);
  if (!on_tensor_cores(in, out, w) || !aligned(w.scales.data, w.scales.stride, 4)) {
    return op == Op::nt ? launch_simt_nt(in, w, bias, out, stream)
                        : launch_simt_nn(in, w, out, stream);
  }
  const Plan plan = plan_of(op, w.format, in.rows);
  const GemmArgs args = {in.data,
                         in.stride,
                         static_cast<const std::uint8_t*>(w.packed),
                         w.scales.data,
                         w.scales.stride,
                         bias,
                         out.data,
                         out.stride,
                         static_cast<float*>(use.workspace),
                         static_cast<int>(in.rows),
                         static_cast<int>(w.format.out_features),
                         static_cast<int>(w.format.in_features),
                         group_tiles(w.format)};
  with_bits(w.format.bits, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
#ifdef LOWBITCORE_WITH_WGMMA
    if (plan.wgmma) {
      const auto launch =
          op == Op::nt ? launch_qgemm_nt_wgmma<kBits> : launch_qgemm_nn_wgmma<kBits>;
      return launch(in.dtype, args, plan.splits, stream);
    }
#endif
    const auto launch = op == Op::nt ? launch_qgemm_nt<kBits> : launch_qgemm_nn<kBits>;
    launch(in.dtype, plan.kind, args, plan.splits, stream);
  });
  if (plan.splits > 1) launch_reduce_splits(args.partial, plan.splits, bias, out, stream);
}

template <Op kOp>
std::size_t product_workspace(const QuantFormat& f, std::int64_t m, int) {
  const std::int64_t splits = plan_of(kOp, f, m).splits;
  return splits == 1 ? 0
                     : static_cast<std::size_t>(splits * m * columns_of(kOp, f)) * sizeof(float);
}

void qgemm_nt(ConstMatrix x, const QuantWeight& w, const float* bias, Matrix y,
              const Resources& use) {
  product(Op::nt, x, w, bias, y, use);
}

void qgemm_nn(ConstMatrix dy, const QuantWeight& w, Matrix dx, const Resources& use) {
  product(Op::nn, dy, w, nullptr, dx, use);
}

void qgemm_grad_scales(ConstMatrix dy, ConstMatrix x, const QuantWeight& w, View<float> ds,
                       const Resources& use) {
  const cudaStream_t stream = stream_of(use.stream);
  if (!on_tensor_cores(dy, x, w) || dy.rows == 0) {
    return launch_simt_grad_scales(dy, x, w, ds, use.workspace, stream);
  }
  const int splits = grad_scales_splits(w.format, dy.rows);
  const GradScalesArgs args = {dy.data,
                               dy.stride,
                               x.data,
                               x.stride,
                               static_cast<const std::uint8_t*>(w.packed),
                               static_cast<float*>(use.workspace),
                               static_cast<int>(dy.rows),
                               static_cast<int>(w.format.out_features),
                               static_cast<int>(w.format.in_features),
                               group_tiles(w.format)};
  with_bits(w.format.bits, [&](auto bits) {
    launch_qgemm_grad_scales<bits.value>(dy.dtype, args, splits, stream);
  });
  launch_reduce_groups(args.partial, splits, args.k / 32, args.group_tiles, ds, stream);
}

std::size_t qgemm_grad_scales_workspace(const QuantFormat& f, std::int64_t m, int) {
  const std::int64_t sums = grad_scales_splits(f, m) * (f.in_features / 32) * f.out_features;
  const std::size_t fast = static_cast<std::size_t>(sums) * sizeof(float);
  const std::size_t slow = simt_grad_scales_workspace(f);
  return fast > slow ? fast : slow;
}

// ---- the weight itself ----

void dequantize(const QuantWeight& w, Matrix out, std::int64_t first_output, const Resources& use) {
  launch_dequantize(w, out, first_output, stream_of(use.stream));
}

void quantize_rtn(ConstMatrix weight, const QuantFormat& format, const GridOptions& grid,
                  View<std::uint8_t> codes, View<float> scales, View<std::uint8_t> zeros,
                  const Resources& use) {
  launch_quantize_rtn(weight, format, grid, codes, scales, zeros, stream_of(use.stream));
}

std::size_t no_workspace(const QuantFormat&, int) { return 0; }

void gptq(const GptqProblem& problem, const Resources& use) {
  launch_gptq(problem, use.workspace, stream_of(use.stream));
}

std::size_t gptq_workspace_any_threads(const QuantFormat& f, int) { return gptq_workspace(f); }

// Products of two dense matrices, and what is done to their elements, are left to what the caller
// has on the device.
constexpr Backend make_backend() {
  Backend backend{};
  backend.name = "cuda";
  backend.qgemm_nt = qgemm_nt;
  backend.qgemm_nn = qgemm_nn;
  backend.qgemm_grad_scales = qgemm_grad_scales;
  backend.qgemm_nt_workspace = product_workspace<Op::nt>;
  backend.qgemm_nn_workspace = product_workspace<Op::nn>;
  backend.qgemm_grad_scales_workspace = qgemm_grad_scales_workspace;
  backend.dequantize = dequantize;
  backend.quantize_rtn = quantize_rtn;
  backend.quantize_rtn_workspace = no_workspace;
  backend.gptq = gptq;
  backend.gptq_workspace = gptq_workspace_any_threads;
  return backend;
}

}  // namespace

}  // namespace cuda

const Backend& cuda_backend() {
  static constexpr Backend backend = cuda::make_backend();
  return backend;
}

const Memory& cuda_memory() {
  static constexpr Memory memory = {cuda::allocate,  cuda::release,      cuda::to_host,
                                    cuda::from_host, cuda::check_finite, cuda::prepack,
                                    cuda::unpack};
  return memory;
}

}  // namespace lowbitcore
