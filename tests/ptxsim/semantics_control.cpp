// Branches, exits, barriers and fences. The machine executes the control flow itself.
#include "decode.h"
#include "lanes.h"
#include "semantics.h"

namespace ptxsim {
namespace {

// Fences, prefetches and hints: memory here is always coherent, and nothing is cached.
void nothing(Context&, const Instruction&, uint32_t) {}

void trap(Context&, const Instruction&, uint32_t mask) {
  fail("trap: lane %d", __builtin_ctz(mask));
}

void decode_nothing(Decoding& x) { x.out.execute = nothing; }

// Of the asynchronous proxy only wgmma's reads of shared memory are modelled.
void proxy_fence(Context& context, const Instruction&, uint32_t mask) {
  context.block->shared.proxy_fence(context.warp->index, mask, context.serial());
}

void decode_fence(Decoding& x) {
  const bool shared = x.has("proxy") && x.has("async") && !x.has("global");
  x.out.execute = shared ? proxy_fence : nothing;
}

void decode_branch(Decoding& x) {
  x.out.control = Control::kBranch;
  x.out.instruction_class = InstructionClass::k_control;
}

void decode_indexed_branch(Decoding& x) {
  x.out.control = Control::kIndexedBranch;
  x.out.a = x.source(0, Type::kU32);
  x.out.definedness = Definedness::kStrict;
  x.out.instruction_class = InstructionClass::k_control;
}

void decode_exit(Decoding& x) {
  x.out.control = Control::kExit;
  x.out.instruction_class = InstructionClass::k_control;
}

void decode_barrier(Decoding& x) {
  x.out.definedness = Definedness::kStrict;
  x.out.instruction_class = InstructionClass::k_control;
  if (x.has("warp")) {  // bar.warp.sync mask
    x.out.execute = nothing;
    x.out.members = x.source(0, Type::kB32);
    x.out.convergence = Convergence::kMemberMask;
    return;
  }
  if (x.has("red") || x.has("cluster")) x.unsupported();
  x.out.control = Control::kBarrier;
  x.out.a = x.source(0, Type::kU32);
  if (x.operands() > 1) x.out.b = x.source(1, Type::kU32);
  x.out.immediate = x.has("arrive");
  if (x.out.immediate && x.operands() < 2) x.unsupported();
  const bool aligned = x.statement.opcode == "bar" || x.has("aligned");
  x.out.convergence = aligned ? Convergence::kLiveLanes : Convergence::kAny;
}

void decode_create_policy(Decoding& x) {
  x.out.d = x.destination(0);
  x.out.execute = [](Context& context, const Instruction& i, uint32_t mask) {
    for_lanes(mask, [&](int lane) { put_bits(context, i.d, lane, 0); });
  };
}

}  // namespace

void register_control(OpcodeTable& table) {
  table["bra"] = decode_branch;
  table["brx"] = decode_indexed_branch;
  table["ret"] = decode_exit;
  table["exit"] = decode_exit;
  table["bar"] = decode_barrier;
  table["barrier"] = decode_barrier;
  table["createpolicy"] = decode_create_policy;
  table["trap"] = [](Decoding& x) { x.out.execute = trap; };
  table["fence"] = decode_fence;
  for (const std::string_view name :
       {"membar", "prefetch", "prefetchu", "nanosleep", "griddepcontrol", "applypriority"}) {
    table[name] = decode_nothing;
  }
}

}  // namespace ptxsim
