// Memory of the CPU: scratch that each thread keeps, and the execution layout (layout.h).
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "../backend.h"
#include "../check.h"
#include "../fields.h"
#include "layout.h"

namespace lowbitcore {

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kAlignment = kHugePage;

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};

// For memory about to be written first, as far as it fills huge pages. Kernels read it out of order
// and far ahead, where every small page costs a look into tables.
void want_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto start = reinterpret_cast<std::uintptr_t>(memory), end = start + bytes;
  const std::uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage;
  if (first + kHugePage > end) return;
  madvise(reinterpret_cast<void*>(first), (end - first) / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
}

void* allocate(std::size_t bytes, void*) {
  thread_local std::unique_ptr<void, AlignedDelete> kept;
  thread_local std::size_t kept_bytes = 0;
  if (kept_bytes < bytes) {
    kept.reset();
    kept_bytes = 0;
    kept.reset(::operator new(bytes, std::align_val_t{kAlignment}));
    want_huge_pages(kept.get(), bytes);
    kept_bytes = bytes;
  }
  return kept.get();
}

void release(void*, void*) {}

void to_host(void* host, const void* device, std::size_t pitch, std::size_t width, std::size_t rows,
             void*) {
  for (std::size_t row = 0; row < rows; ++row) {
    std::memcpy(static_cast<char*>(host) + row * width,
                static_cast<const char*>(device) + row * pitch, width);
  }
}

void from_host(void* device, const void* host, std::size_t bytes, void*) {
  std::memcpy(device, host, bytes);
}

void check_finite(const char* op, const char* argument, const char* expected, ConstMatrix matrix,
                  void*) {
  check::finite(op, argument, expected, matrix);
}

void prepack(const QuantFormat& format, View<const std::int32_t> qweight,
             View<const std::int32_t> qzeros, void* packed, void*) {
  const std::int64_t n = format.out_features, groups = format.groups();
  want_huge_pages(packed, packed_size(format));
  auto* words = static_cast<char*>(packed);
  for (std::int64_t row = 0; row < qweight.rows; ++row) {
    for (std::int64_t block = 0; block < n / kBlockN; ++block) {
      std::memcpy(words + (block * qweight.rows + row) * kBlockN * 4,
                  qweight.data + row * qweight.stride + block * kBlockN, kBlockN * 4);
    }
  }
  auto* zeros = static_cast<std::uint8_t*>(packed) + packed_zeros_offset(format);
  for (std::int64_t g = 0; g < groups; ++g) {
    for (std::int64_t i = 0; i < n; ++i) {
      zeros[((i / kBlockN) * groups + g) * kBlockN + i % kBlockN] =
          static_cast<std::uint8_t>(get_field(qzeros.data + g * qzeros.stride, 1, i, format.bits));
    }
  }
}

void unpack(const QuantFormat& format, const void* packed, View<std::int32_t> qweight,
            View<std::int32_t> qzeros, void*) {
  const std::int64_t n = format.out_features, groups = format.groups();
  const auto* words = static_cast<const char*>(packed);
  for (std::int64_t row = 0; row < qweight.rows; ++row) {
    for (std::int64_t block = 0; block < n / kBlockN; ++block) {
      std::memcpy(qweight.data + row * qweight.stride + block * kBlockN,
                  words + (block * qweight.rows + row) * kBlockN * 4, kBlockN * 4);
    }
  }
  const auto* zeros = static_cast<const std::uint8_t*>(packed) + packed_zeros_offset(format);
  zero(qzeros);
  for (std::int64_t g = 0; g < groups; ++g) {
    for (std::int64_t i = 0; i < n; ++i) {
      put_field(qzeros.data + g * qzeros.stride, 1, i, format.bits,
                zeros[((i / kBlockN) * groups + g) * kBlockN + i % kBlockN]);
    }
  }
}

}  // namespace

const Memory& cpu_memory() {
  static constexpr Memory memory = {allocate,     release, to_host, from_host,
                                    check_finite, prepack, unpack};
  return memory;
}

}  // namespace lowbitcore
