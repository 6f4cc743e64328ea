#include "fatbin.h"

#include <cstdint>
#include <cstring>

#include "ptx.h"

namespace ptxsim {
namespace {

struct Wrapper {
  uint32_t magic;
  uint32_t version;
  const uint8_t* data;
  const void* more;
};
constexpr uint32_t kWrapperMagic = 0x466243b1;

struct Header {
  uint32_t magic;
  uint16_t version;
  uint16_t header_bytes;
  uint64_t bytes;  // of the entries that follow
};
constexpr uint32_t kHeaderMagic = 0xba55ed50;

struct Entry {
  uint16_t kind;
  uint16_t version;
  uint32_t header_bytes;
  uint64_t bytes;
  uint32_t compressed_bytes;  // 0: not compressed
  uint32_t options;
  uint16_t minor, major;
  uint32_t architecture;
};
constexpr uint16_t kPtx = 1;

template <class T>
T read(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

}  // namespace

std::string ptx_of_fatbin(const void* wrapper_address, int compute_capability) {
  const auto wrapper = read<Wrapper>(static_cast<const uint8_t*>(wrapper_address));
  if (wrapper.magic != kWrapperMagic || wrapper.version != 1) {
    fail("a fat binary of an unknown kind (separate compilation is not supported)");
  }
  const auto header = read<Header>(wrapper.data);
  if (header.magic != kHeaderMagic) fail("a fat binary of an unknown kind");
  const uint8_t* at = wrapper.data + header.header_bytes;
  const uint8_t* const end = at + header.bytes;
  std::string ptx;
  uint32_t best = 0;
  bool compressed = false;
  while (at < end) {
    const auto entry = read<Entry>(at);
    const uint8_t* text = at + entry.header_bytes;
    at = text + entry.bytes;
    const bool fits = entry.kind == kPtx && entry.architecture > best &&
                      entry.architecture <= static_cast<uint32_t>(compute_capability);
    if (!fits) continue;
    if (entry.compressed_bytes != 0) {
      compressed = true;
      continue;
    }
    best = entry.architecture;
    ptx.assign(reinterpret_cast<const char*>(text), entry.bytes);
  }
  if (ptx.empty()) {
    fail(
        "no %sPTX for sm_%d in the fat binary; compile with -gencode "
        "arch=compute_%d,code=compute_%d --compress-mode=none",
        compressed ? "uncompressed " : "", compute_capability, compute_capability,
        compute_capability);
  }
  return ptx;
}

}  // namespace ptxsim
