// Loads and stores.
#include <algorithm>

#include "access.h"
#include "decode.h"
#include "lanes.h"
#include "semantics.h"

namespace ptxsim {
namespace {

void put_loaded(Context& context, const Instruction& i, int lane, const uint8_t* from) {
  for (int k = 0; k < i.elements; ++k) {
    uint64_t value = 0;
    std::memcpy(&value, from + k * i.bytes, i.bytes);
    if (i.sign_extend) {
      const int unused = 64 - 8 * i.bytes;
      value = static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused);
    }
    put_bits(context, context.part(i.d, k), lane, value);
  }
}

void load(Context& context, const Instruction& i, uint32_t mask) {
  Access access(context, i, i.a, mask);
  const uint32_t bytes = static_cast<uint32_t>(i.bytes) * i.elements;
  access.check(bytes, "a load");
  if (access.space == Space::kShared) {
    ++context.counters->shared_loads;
    access.count_wavefronts(bytes);
    for_active(mask, [&](int lane) {
      const auto address = static_cast<uint32_t>(access.addresses[lane]);
      context.block->shared.read(address, bytes, context.warp->index, lane);
      put_loaded(context, i, lane, context.block->shared.data() + address);
    });
    return;
  }
  if (access.space == Space::kGlobal) {
    ++context.counters->global_loads;
    context.counters->global_load_bytes += bytes * static_cast<uint32_t>(__builtin_popcount(mask));
    context.counters->global_load_sectors += access.count_sectors(GlobalMemory::Direction::kRead);
  }
  if (bytes == 4 && i.elements == 1 && !i.d.wide && mask == kAllLanes) {
    uint32_t* d = context.destination(i.d);
    for (int lane = 0; lane < kLanes; ++lane) std::memcpy(d + lane, access.host(lane), 4);
    return;
  }
  for_active(mask, [&](int lane) { put_loaded(context, i, lane, access.host(lane)); });
}

void store(Context& context, const Instruction& i, uint32_t mask) {
  Access access(context, i, i.d, mask);
  const uint32_t bytes = static_cast<uint32_t>(i.bytes) * i.elements;
  access.check(bytes, "a store");
  const bool shared = access.space == Space::kShared;
  if (shared) {
    ++context.counters->shared_stores;
    access.count_wavefronts(bytes);
  } else if (access.space == Space::kGlobal) {
    ++context.counters->global_stores;
    context.counters->global_store_bytes += bytes * static_cast<uint32_t>(__builtin_popcount(mask));
    context.counters->global_store_sectors += access.count_sectors(GlobalMemory::Direction::kWrite);
  }
  const uint32_t serial = context.serial();
  for_active(mask, [&](int lane) {
    uint8_t value[32];
    for (int k = 0; k < i.elements; ++k) {
      const uint64_t bits = get_bits(context, context.part(i.a, k), lane);
      std::memcpy(value + k * i.bytes, &bits, i.bytes);
    }
    if (shared) {
      context.block->shared.write(static_cast<uint32_t>(access.addresses[lane]), value, bytes,
                                  context.warp->index, lane, serial);
    } else {
      std::memcpy(access.host(lane), value, bytes);
    }
  });
}

void load_parameter(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t bytes = static_cast<uint32_t>(i.bytes) * i.elements;
  for_active(mask, [&](int lane) {
    const uint64_t offset = get_bits(context, i.a, lane) + static_cast<uint64_t>(i.a.displacement);
    if (offset + bytes > context.kernel->parameter_bytes) {
      fail("out of bounds: a load of %u bytes at %llu of %u bytes of parameters, lane %d", bytes,
           static_cast<unsigned long long>(offset), context.kernel->parameter_bytes, lane);
    }
    put_loaded(context, i, lane, context.parameters + offset);
  });
}

void take_shape(Decoding& x) {
  const Type type = x.type();
  x.out.bytes = static_cast<uint8_t>(width_of(type));
  x.out.sign_extend = is_signed_integer(type);
  x.out.elements = x.has("v8") ? 8 : x.has("v4") ? 4 : x.has("v2") ? 2 : 1;
  x.out.space = space_of(x);
  x.out.definedness = Definedness::kStrict;
  x.out.instruction_class = InstructionClass::k_memory;
}

void require_vector(const Decoding& x, const Operand& operand) {
  const int parts = operand.kind == Operand::kVector ? operand.parts : 1;
  if (parts != x.out.elements) fail("%d registers for %d elements", parts, x.out.elements);
}

void decode_load(Decoding& x) {
  take_shape(x);
  x.out.d = x.destination(0);
  require_vector(x, x.out.d);
  x.out.a = x.address(1, x.out.space);
  x.out.execute = x.out.space == Space::kParam ? load_parameter : load;
}

void decode_store(Decoding& x) {
  take_shape(x);
  if (x.out.space == Space::kParam || x.out.space == Space::kConst) x.unsupported();
  x.out.d = x.address(0, x.out.space);
  x.out.a = x.source(1, x.type());
  require_vector(x, x.out.a);
  x.out.execute = store;
}

}  // namespace

void register_memory(OpcodeTable& table) {
  table["ld"] = decode_load;
  table["ldu"] = decode_load;
  table["st"] = decode_store;
}

}  // namespace ptxsim
