// The most that each instruction set can multiply: loops on registers alone, on every thread.
//
//   c++ -std=c++17 -O3 -pthread peak.cpp && ./a.out avx512_bf16 2     # GFLOP/s
//
// Which loop a product is held against depends on its type too: levels with bf16 products multiply
// fp32 activations by ordinary FMA.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kAccumulators = 12;  // enough to hide the latency of two units, few enough for AVX2
volatile float sink;

// Each loop runs `rounds` times over its accumulators and returns the operations that took.

double sse(long rounds) {
  __m128 acc[kAccumulators], a = _mm_set1_ps(sink), b = _mm_set1_ps(sink);
  for (auto& c : acc) c = a;
  for (long i = 0; i < rounds; ++i)
#pragma GCC unroll 16
    for (auto& c : acc) c = _mm_add_ps(_mm_mul_ps(c, a), b);
  for (auto& c : acc) sink = _mm_cvtss_f32(c);
  return 2.0 * 4 * kAccumulators * rounds;
}

__attribute__((target("avx2,fma"))) double avx2(long rounds) {
  __m256 acc[kAccumulators], a = _mm256_set1_ps(sink), b = _mm256_set1_ps(sink);
  for (auto& c : acc) c = a;
  for (long i = 0; i < rounds; ++i)
#pragma GCC unroll 16
    for (auto& c : acc) c = _mm256_fmadd_ps(a, b, c);
  for (auto& c : acc) sink = _mm256_cvtss_f32(c);
  return 2.0 * 8 * kAccumulators * rounds;
}

__attribute__((target("avx512f"))) double avx512(long rounds) {
  __m512 acc[kAccumulators], a = _mm512_set1_ps(sink), b = _mm512_set1_ps(sink);
  for (auto& c : acc) c = a;
  for (long i = 0; i < rounds; ++i)
#pragma GCC unroll 16
    for (auto& c : acc) c = _mm512_fmadd_ps(a, b, c);
  for (auto& c : acc) sink = _mm512_cvtss_f32(c);
  return 2.0 * 16 * kAccumulators * rounds;
}

__attribute__((target("avx512f,avx512bf16"))) double avx512_bf16(long rounds) {
  __m512 acc[kAccumulators];
  const __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_ps(sink)), b = a;
  for (auto& c : acc) c = _mm512_set1_ps(sink);
  for (long i = 0; i < rounds; ++i)
#pragma GCC unroll 16
    for (auto& c : acc) c = _mm512_dpbf16_ps(c, a, b);
  for (auto& c : acc) sink = _mm512_cvtss_f32(c);
  return 2.0 * 32 * kAccumulators * rounds;
}

struct alignas(64) TileConfig {
  unsigned char palette = 1, start_row = 0, reserved[14] = {};
  unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

__attribute__((target("amx-tile,amx-bf16"))) double amx(long rounds) {
  // GCC's intrinsic reads 8 bytes as far as its optimizer knows: it drops stores to a local one.
  static constexpr TileConfig config;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (long i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * 4 * 16 * 16 * 32 * rounds;
}

double (*find(const std::string& name))(long) {
  if (name == "scalar") return sse;
  if (name == "avx2") return avx2;
  if (name == "avx512") return avx512;
  if (name == "avx512_bf16") return avx512_bf16;
  if (name == "amx") return amx;
  return nullptr;
}

}  // namespace

int main(int argc, char** argv) {
  const auto loop = argc == 3 ? find(argv[1]) : nullptr;
  const int threads = argc == 3 ? std::atoi(argv[2]) : 0;
  if (loop == nullptr || threads < 1) {
    std::fprintf(stderr, "usage: %s scalar|avx2|avx512|avx512_bf16|amx THREADS\n", argv[0]);
    return 2;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  if (loop == amx && syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 1;
  std::atomic<double> total{0.0};
  const auto work = [&] {
    using Clock = std::chrono::steady_clock;
    loop(1 << 16);  // up to speed
    double operations = 0;
    const auto start = Clock::now();
    double seconds = 0;
    while (seconds < 0.3) {
      operations += loop(1 << 16);
      seconds = std::chrono::duration<double>(Clock::now() - start).count();
    }
    double seen = total.load();
    while (!total.compare_exchange_weak(seen, seen + operations / seconds)) {
    }
  };
  std::vector<std::thread> team;
  for (int i = 0; i < threads; ++i) team.emplace_back(work);
  for (auto& thread : team) thread.join();
  std::printf("%.1f\n", total.load() / 1e9);
}
