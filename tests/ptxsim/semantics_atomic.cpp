// atom and red, lane after lane.
#include <algorithm>

#include "access.h"
#include "decode.h"
#include "lanes.h"
#include "number.h"
#include "semantics.h"

namespace ptxsim {
namespace {

struct Add {
  template <class T>
  static T apply(T old, T b, T) {
    return static_cast<T>(old + b);
  }
};
struct Minimum {
  template <class T>
  static T apply(T old, T b, T) {
    return std::min(old, b);
  }
};
struct Maximum {
  template <class T>
  static T apply(T old, T b, T) {
    return std::max(old, b);
  }
};
struct And {
  template <class T>
  static T apply(T old, T b, T) {
    return old & b;
  }
};
struct Or {
  template <class T>
  static T apply(T old, T b, T) {
    return old | b;
  }
};
struct Xor {
  template <class T>
  static T apply(T old, T b, T) {
    return old ^ b;
  }
};
struct Exchange {
  template <class T>
  static T apply(T, T b, T) {
    return b;
  }
};
struct CompareAndSwap {
  template <class T>
  static T apply(T old, T b, T c) {
    return old == b ? c : old;
  }
};
struct Increment {
  template <class T>
  static T apply(T old, T b, T) {
    return old >= b ? 0 : old + 1;
  }
};
struct Decrement {
  template <class T>
  static T apply(T old, T b, T) {
    return old == 0 || old > b ? b : old - 1;
  }
};
template <class Format>
struct AddPair {
  template <class T>
  static T apply(T old, T b, T) {
    const auto add = [](uint32_t x, uint32_t y) {
      return Format::from_float(Format::to_float(x & 0xffffu) + Format::to_float(y & 0xffffu));
    };
    return add(old, b) | add(old >> 16, b >> 16) << 16;
  }
};

template <class T, class Operation>
void atomic(Context& context, const Instruction& i, uint32_t mask) {
  Access access(context, i, i.a, mask);
  access.check(sizeof(T), "an atomic");
  context.counters->atomics += static_cast<uint32_t>(__builtin_popcount(mask));
  const bool shared = access.space == Space::kShared;
  if (!shared) {
    ++context.counters->global_stores;
    context.counters->global_store_bytes +=
        sizeof(T) * static_cast<uint32_t>(__builtin_popcount(mask));
    context.counters->global_store_sectors += access.count_sectors(GlobalMemory::Direction::kWrite);
  }
  const uint32_t* b = context.source(i.b);
  const uint32_t* c = i.c.kind == Operand::kNone ? b : context.source(i.c);
  for_active(mask, [&](int lane) {
    if (shared) {
      context.block->shared.atomic(static_cast<uint32_t>(access.addresses[lane]), sizeof(T),
                                   context.warp->index, lane, context.serial());
    }
    uint8_t* place = access.host(lane);
    T old;
    std::memcpy(&old, place, sizeof old);
    const T value = Operation::apply(old, get<T>(b, lane), get<T>(c, lane));
    std::memcpy(place, &value, sizeof value);
    if (i.d.kind != Operand::kNone) put<T>(context.destination(i.d), lane, old);
  });
}

template <class Operation>
Handler of_integers(Type type) {
  switch (type) {
    case Type::kS32:
      return atomic<int32_t, Operation>;
    case Type::kU32:
    case Type::kB32:
      return atomic<uint32_t, Operation>;
    case Type::kS64:
      return atomic<int64_t, Operation>;
    case Type::kU64:
    case Type::kB64:
      return atomic<uint64_t, Operation>;
    default:
      return nullptr;
  }
}

Handler additions(Type type) {
  switch (type) {
    case Type::kS32:
      return atomic<uint32_t, Add>;
    case Type::kS64:
      return atomic<uint64_t, Add>;
    case Type::kF32:
      return atomic<float, Add>;
    case Type::kF64:
      return atomic<double, Add>;
    case Type::kF16x2:
      return atomic<uint32_t, AddPair<Half>>;
    case Type::kBf16x2:
      return atomic<uint32_t, AddPair<Bfloat>>;
    default:
      return of_integers<Add>(type);
  }
}

void decode_atomic(Decoding& x) {
  const Type type = x.type();
  const bool returns = x.statement.opcode == "atom";
  for (const std::string_view modifier : {"v2", "v4", "v8"}) {
    if (x.has(modifier)) x.unsupported();
  }
  x.out.space = space_of(x);
  if (returns) x.out.d = x.destination(0);
  x.out.a = x.address(returns ? 1 : 0, x.out.space);
  x.out.b = x.source(returns ? 2 : 1, type);
  if (x.has("cas")) x.out.c = x.source(3, type);
  x.out.definedness = Definedness::kStrict;
  x.out.instruction_class = InstructionClass::k_memory;
  x.out.execute = x.has("add")    ? additions(type)
                  : x.has("min")  ? of_integers<Minimum>(type)
                  : x.has("max")  ? of_integers<Maximum>(type)
                  : x.has("and")  ? of_integers<And>(type)
                  : x.has("or")   ? of_integers<Or>(type)
                  : x.has("xor")  ? of_integers<Xor>(type)
                  : x.has("exch") ? of_integers<Exchange>(type)
                  : x.has("cas")  ? of_integers<CompareAndSwap>(type)
                  : x.has("inc")  ? of_integers<Increment>(type)
                  : x.has("dec")  ? of_integers<Decrement>(type)
                                  : nullptr;
  if (x.out.execute == nullptr) x.unsupported();
}

}  // namespace

void register_atomics(OpcodeTable& table) {
  table["atom"] = decode_atomic;
  table["red"] = decode_atomic;
}

}  // namespace ptxsim
