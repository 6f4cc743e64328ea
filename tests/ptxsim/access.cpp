#include "access.h"

namespace ptxsim {

Space space_of(const Decoding& x) {
  if (x.has("global")) return Space::kGlobal;
  if (x.has("shared") || x.has("shared::cta")) return Space::kShared;
  if (x.has("shared::cluster")) x.unsupported();
  if (x.has("local")) return Space::kLocal;
  if (x.has("const")) return Space::kConst;
  if (x.has("param") || x.has("param::entry")) return Space::kParam;
  return Space::kGeneric;
}

Access::Access(Context& context, const Instruction& instruction, const Operand& operand,
               uint32_t mask)
    : space(instruction.space), context_(context), mask_(mask) {
  const uint32_t* place = context.source(operand);
  const auto displacement = static_cast<uint64_t>(operand.displacement);
  if (operand.wide) {
    for (int lane = 0; lane < kLanes; ++lane) {
      addresses[lane] = get<uint64_t>(place, lane) + displacement;
    }
  } else {  // addresses of 32 bits wrap around
    for (int lane = 0; lane < kLanes; ++lane) {
      addresses[lane] = static_cast<uint32_t>(place[lane] + displacement);
    }
  }
  if (space != Space::kGeneric) return;
  const uint64_t window = addresses[__builtin_ctz(mask)] & ~kWindowMask;
  for_active(mask, [&](int lane) {
    if ((addresses[lane] & ~kWindowMask) != window) {
      fail("generic addresses of one instruction lie in different spaces: lane %d", lane);
    }
    addresses[lane] &= kWindowMask;
  });
  space = window == kSharedWindow  ? Space::kShared
          : window == kLocalWindow ? Space::kLocal
                                   : Space::kGlobal;
}

void Access::check(uint32_t bytes, const char* what) {
  if (space == Space::kShared) {
    for_active(mask_,
               [&](int lane) { context_.block->shared.check(addresses[lane], bytes, lane, what); });
  } else if (space == Space::kLocal) {
    const uint64_t size = context_.kernel->local_bytes;
    for_active(mask_, [&](int lane) {
      if (addresses[lane] + bytes > size) {
        fail(
            "out of bounds: %s of %u bytes at local address 0x%llx, lane %d; a thread has %llu "
            "bytes",
            what, bytes, static_cast<unsigned long long>(addresses[lane]), lane,
            static_cast<unsigned long long>(size));
      }
      if (addresses[lane] & (bytes - 1)) {
        fail("misaligned: %s of %u bytes at local address 0x%llx, lane %d", what, bytes,
             static_cast<unsigned long long>(addresses[lane]), lane);
      }
    });
  } else {
    context_.global->check(addresses, mask_, bytes, what);
  }
}

void Access::count_wavefronts(uint32_t bytes) const {
  uint32_t offsets[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) offsets[lane] = static_cast<uint32_t>(addresses[lane]);
  const Wavefronts wavefronts = ptxsim::count_wavefronts(offsets, mask_, bytes);
  context_.counters->shared_wavefronts += wavefronts.actual;
  context_.counters->shared_wavefronts_ideal += wavefronts.ideal;
}

uint32_t Access::count_sectors(GlobalMemory::Direction direction) const {
  return context_.global->count_sectors(addresses, mask_, direction,
                                        context_.options->trace_sectors != 0);
}

uint8_t* Access::host(int lane) const {
  if (space == Space::kShared) return context_.block->shared.data() + addresses[lane];
  if (space == Space::kLocal) {
    const size_t thread = static_cast<size_t>(context_.warp->index) * kLanes + lane;
    return context_.block->local.data() + thread * context_.kernel->local_bytes + addresses[lane];
  }
  return reinterpret_cast<uint8_t*>(addresses[lane]);
}

}  // namespace ptxsim
