// mov, with its packing and unpacking of vectors, and cvta.
#include "decode.h"
#include "lanes.h"
#include "memory.h"
#include "semantics.h"

namespace ptxsim {
namespace {

struct Copy {
  template <class T>
  static T apply(T a) {
    return a;
  }
};

void move_predicate(Context& context, const Instruction& i, uint32_t mask) {
  context.set_predicate(i.d, context.predicate(i.a), mask);
}

// i.bytes: of a part.
void pack(Context& context, const Instruction& i, uint32_t mask) {
  const int bits = 8 * i.bytes;
  for_lanes(mask, [&](int lane) {
    uint64_t value = 0;
    for (int k = 0; k < i.a.parts; ++k) {
      const uint64_t part = get_bits(context, context.part(i.a, k), lane);
      value |= (part & ((1ull << bits) - 1)) << (k * bits);
    }
    put_bits(context, i.d, lane, value);
  });
}

void unpack(Context& context, const Instruction& i, uint32_t mask) {
  const int bits = 8 * i.bytes;
  for_lanes(mask, [&](int lane) {
    const uint64_t value = get_bits(context, i.a, lane);
    for (int k = 0; k < i.d.parts; ++k) {
      put_bits(context, context.part(i.d, k), lane, value >> (k * bits) & ((1ull << bits) - 1));
    }
  });
}

void decode_move(Decoding& x) {
  const Type type = x.type();
  x.out.instruction_class = InstructionClass::k_move;
  x.out.d = x.destination(0);
  x.out.a = x.source(1, type);
  const unsigned bytes = width_of(type);
  if (type == Type::kPred) {
    x.out.execute = move_predicate;
  } else if (x.out.a.kind == Operand::kVector) {
    x.out.bytes = static_cast<uint8_t>(bytes / x.out.a.parts);
    x.out.execute = pack;
  } else if (x.out.d.kind == Operand::kVector) {
    x.out.bytes = static_cast<uint8_t>(bytes / x.out.d.parts);
    x.out.execute = unpack;
  } else {
    x.out.execute = bytes == 8 ? unary<uint64_t, Copy> : unary<uint32_t, Copy>;
  }
}

// Between generic addresses and those of a state space.
void to_window(Context& context, const Instruction& i, uint32_t mask) {
  const uint64_t window = i.space == Space::kShared ? kSharedWindow : kLocalWindow;
  for_lanes(mask,
            [&](int lane) { put_bits(context, i.d, lane, get_bits(context, i.a, lane) | window); });
}

void from_window(Context& context, const Instruction& i, uint32_t mask) {
  for_lanes(mask, [&](int lane) {
    put_bits(context, i.d, lane, get_bits(context, i.a, lane) & kWindowMask);
  });
}

void decode_cvta(Decoding& x) {
  take_operands(x, x.type(), 1);
  x.out.instruction_class = InstructionClass::k_integer;
  if (x.has("shared") || x.has("shared::cta") || x.has("local")) {
    x.out.space = x.has("local") ? Space::kLocal : Space::kShared;
    x.out.execute = x.has("to") ? from_window : to_window;
  } else {
    x.out.execute = unary<uint64_t, Copy>;  // global, const: host pointers as well
  }
}

}  // namespace

void register_moves(OpcodeTable& table) {
  table["mov"] = decode_move;
  table["cvta"] = decode_cvta;
}

}  // namespace ptxsim
