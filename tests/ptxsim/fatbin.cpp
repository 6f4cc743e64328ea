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

// Whether a text says `.target sm_90a` or the like.
bool is_specific(std::string_view ptx) {
  const size_t target = ptx.find(".target");
  if (target == ptx.npos) return false;
  const size_t digits = ptx.find("sm_", target);
  if (digits == ptx.npos) return false;
  const size_t end = ptx.find_first_not_of("0123456789", digits + 3);
  return end != ptx.npos && (ptx[end] == 'a' || ptx[end] == 'f');
}

}  // namespace

PtxImage ptx_of_fatbin(const void* wrapper_address, int compute_capability) {
  const auto wrapper = read<Wrapper>(static_cast<const uint8_t*>(wrapper_address));
  if (wrapper.magic != kWrapperMagic || wrapper.version != 1) {
    fail("a fat binary of an unknown kind (separate compilation is not supported)");
  }
  const auto header = read<Header>(wrapper.data);
  if (header.magic != kHeaderMagic) fail("a fat binary of an unknown kind");
  const uint8_t* at = wrapper.data + header.header_bytes;
  const uint8_t* const end = at + header.bytes;
  PtxImage best = {};
  bool compressed = false;
  while (at < end) {
    const auto entry = read<Entry>(at);
    const uint8_t* text = at + entry.header_bytes;
    at = text + entry.bytes;
    const auto wanted = static_cast<uint32_t>(compute_capability);
    const bool fits = entry.kind == kPtx && entry.architecture >= best.architecture &&
                      entry.architecture <= wanted;
    if (!fits) continue;
    if (entry.compressed_bytes != 0) {
      compressed = true;
      continue;
    }
    const std::string_view ptx(reinterpret_cast<const char*>(text), entry.bytes);
    if (is_specific(ptx) ? entry.architecture == wanted : entry.architecture > best.architecture) {
      best = {entry.architecture, ptx};
    }
  }
  if (best.text.empty()) {
    fail(
        "no %sPTX for sm_%d in the fat binary; compile with -gencode "
        "arch=compute_%d,code=compute_%d --compress-mode=none",
        compressed ? "uncompressed " : "", compute_capability, compute_capability,
        compute_capability);
  }
  return best;
}

}  // namespace ptxsim
