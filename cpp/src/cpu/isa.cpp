#include "isa.h"

#include <lowbitcore/runtime.h>

#include <atomic>
#include <cstdlib>

#ifdef __x86_64__
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lowbitcore {

namespace {

struct Level {
  const Backend& (*backend)();
  bool (*supported)();
};

// __builtin_cpu_supports also asks the operating system whether it saves the wider registers.
#ifdef __x86_64__
[[maybe_unused]] bool has_avx2() {
  constexpr unsigned kF16c = 1u << 29;  // for which compilers got a name late
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & kF16c) != 0;
}

[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// All processors with AVX-512's BF16 but the first have the others, too.
[[maybe_unused]] bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

// Tiles are large enough that Linux hands them out on request only, to a whole process at once.
[[maybe_unused]] bool has_amx() {
#ifdef __linux__
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512_bf16() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// The last that is supported is the default, so emulation never is.
const Level kLevels[] = {
#ifdef LOWBITCORE_WITH_AMX_EMULATED
    {amx_emulated_backend, has_avx512_bf16},
#endif
    {scalar_backend, [] { return true; }},
#ifdef LOWBITCORE_WITH_AVX2
    {avx2_backend, has_avx2},
#endif
#ifdef LOWBITCORE_WITH_AVX512
    {avx512_backend, has_avx512},
#endif
#ifdef LOWBITCORE_WITH_AVX512_BF16
    {avx512_bf16_backend, has_avx512_bf16},
#endif
#ifdef LOWBITCORE_WITH_AMX
    {amx_backend, has_amx},
#endif
};

const Backend& find(const std::string& name, const char* who) {
  std::string known;
  for (const Level& level : kLevels) {
    if (!level.supported()) continue;
    if (name == level.backend().name) return level.backend();
    known += (known.empty() ? "" : ", ") + std::string(level.backend().name);
  }
  throw Error(std::string(who) + ": expected a level this build and CPU have (" + known +
              "), got " + name);
}

const Backend& choose() {
  if (const char* forced = std::getenv("LOWBITCORE_ISA"); forced != nullptr && *forced != '\0') {
    return find(forced, "LOWBITCORE_ISA");
  }
  const Backend* best = nullptr;
  for (const Level& level : kLevels) {
    if (level.supported()) best = &level.backend();
  }
  return *best;
}

std::atomic<const Backend*> current{nullptr};

}  // namespace

const Backend& cpu_backend() {
  const Backend* backend = current.load();
  if (backend == nullptr) {
    const Backend& chosen = choose();
    // Unless somebody has set one in the meantime, which `backend` then is.
    if (current.compare_exchange_strong(backend, &chosen)) backend = &chosen;
  }
  return *backend;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) {
    if (level.supported()) names.emplace_back(level.backend().name);
  }
  return names;
}

std::string isa() { return cpu_backend().name; }

void set_isa(const std::string& name) { current.store(&find(name, "set_isa")); }

}  // namespace lowbitcore
