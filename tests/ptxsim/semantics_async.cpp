// cp.async: bytes are gone at the issue and land at the wait that covers them.
#include <algorithm>

#include "access.h"
#include "decode.h"
#include "lanes.h"
#include "memory.h"
#include "semantics.h"

namespace ptxsim {
namespace {

void issue(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t bytes = i.bytes;
  Access destination(context, i, i.d, mask);
  destination.check(bytes, "a cp.async");

  // Lanes that copy nothing, or ignore their source, fill with zeros and read no memory.
  const uint32_t ignored = i.e.kind == Operand::kNone ? 0 : context.predicate(i.e);
  uint32_t from_source[kLanes];
  uint32_t reading = 0;
  for_active(mask, [&](int lane) {
    from_source[lane] = i.b.kind == Operand::kNone ? bytes : context.source(i.b)[lane];
    if (ignored >> lane & 1) from_source[lane] = 0;
    if (from_source[lane] > bytes) {
      fail("cp.async: a source of %u bytes for a copy of %u, lane %d", from_source[lane], bytes,
           lane);
    }
    if (from_source[lane] != 0) reading |= 1u << lane;
  });
  Instruction source_side = i;
  source_side.space = Space::kGlobal;
  Access source(context, source_side, i.a, mask);
  if (reading != 0) {
    context.global->check(source.addresses, reading, bytes, "a cp.async");
    context.counters->cp_async_sectors +=
        context.global->count_sectors(source.addresses, reading, GlobalMemory::Direction::kRead,
                                      context.options->trace_sectors != 0);
  }
  ++context.counters->cp_async;
  uint32_t offsets[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    offsets[lane] = static_cast<uint32_t>(destination.addresses[lane]);
  }
  const Wavefronts wavefronts = count_wavefronts(offsets, mask, bytes);
  context.counters->cp_async_wavefronts += wavefronts.actual;
  context.counters->cp_async_wavefronts_ideal += wavefronts.ideal;

  for_active(mask, [&](int lane) {
    context.block->shared.issue_copy(offsets[lane], bytes, context.warp->index, lane);
    context.warp->copies.push_back({source.addresses[lane], offsets[lane],
                                    context.warp->committed[lane], static_cast<uint8_t>(lane),
                                    static_cast<uint8_t>(from_source[lane]),
                                    static_cast<uint8_t>(bytes)});
  });
}

void commit(Context& context, const Instruction&, uint32_t mask) {
  for_lanes(mask, [&](int lane) { ++context.warp->committed[lane]; });
}

// Lands the copies of the lanes' groups before the last `pending`; all of them, committed or not,
// with kEverything.
constexpr uint32_t kEverything = ~0u;

void wait(Context& context, const Instruction& i, uint32_t mask) {
  std::vector<PendingCopy>& copies = context.warp->copies;
  const auto stays = [&](const PendingCopy& copy) {
    if (!(mask >> copy.lane & 1)) return true;
    if (i.immediate == kEverything) return false;
    const uint32_t committed = context.warp->committed[copy.lane];
    return committed < i.immediate || copy.group >= committed - i.immediate;
  };
  const auto landing = std::stable_partition(copies.begin(), copies.end(), stays);
  for (auto copy = landing; copy != copies.end(); ++copy) {
    context.block->shared.land_copy(
        copy->destination, reinterpret_cast<const uint8_t*>(copy->source), copy->from_source,
        copy->bytes, context.warp->index, copy->lane, context.serial());
  }
  copies.erase(landing, copies.end());
}

void decode_cp(Decoding& x) {
  if (!x.has("async") || x.has("bulk") || x.has("mbarrier")) x.unsupported();
  x.out.definedness = Definedness::kStrict;
  x.out.instruction_class = InstructionClass::k_memory;
  if (x.has("commit_group")) {
    x.out.execute = commit;
  } else if (x.has("wait_group")) {
    x.out.immediate = x.immediate(0);
    x.out.execute = wait;
  } else if (x.has("wait_all")) {
    x.out.immediate = kEverything;
    x.out.execute = wait;
  } else {
    if (!x.has("ca") && !x.has("cg")) x.unsupported();
    x.out.space = Space::kShared;
    x.out.d = x.address(0, Space::kShared);
    x.out.a = x.address(1, Space::kGlobal);
    const uint32_t bytes = x.immediate(2);
    if (bytes != 16 && (x.has("cg") || (bytes != 4 && bytes != 8))) x.unsupported();
    x.out.bytes = static_cast<uint8_t>(bytes);
    // The fourth operand is a size, or the predicate that says to ignore the source; a cache policy
    // comes last.
    const size_t last = x.operands() - (x.has("L2::cache_hint") ? 1 : 0);
    if (last > 4) x.unsupported();
    if (last == 4) {
      const Operand operand = x.source(3, Type::kU32);
      (operand.kind == Operand::kPredicate ? x.out.e : x.out.b) = operand;
    }
    x.out.execute = issue;
  }
}

}  // namespace

void register_async_copies(OpcodeTable& table) { table["cp"] = decode_cp; }

}  // namespace ptxsim
