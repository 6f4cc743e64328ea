// Comparisons, selections and predicates.
#include <cmath>

#include "decode.h"
#include "lanes.h"
#include "number.h"
#include "semantics.h"

namespace ptxsim {
namespace {

enum Combination : uint32_t { kNone, kAnd, kOr, kXor };

struct Equal {
  template <class T>
  static bool apply(T a, T b) {
    return a == b;
  }
};
struct Less {
  template <class T>
  static bool apply(T a, T b) {
    return a < b;
  }
};
struct LessEqual {
  template <class T>
  static bool apply(T a, T b) {
    return a <= b;
  }
};
struct Unequal {  // of floats: ordered and unequal
  template <class T>
  static bool apply(T a, T b) {
    return a < b || a > b;
  }
};
struct Ordered {
  template <class T>
  static bool apply(T a, T b) {
    return a == a && b == b;
  }
};

// A register's bits as the number that is compared.
template <class T>
struct Plain {
  using Value = T;
  static T read(const uint32_t* place, int lane) { return get<T>(place, lane); }
};
template <class Format>
struct FromHalf {
  using Value = float;
  static float read(const uint32_t* place, int lane) { return Format::to_float(place[lane]); }
};

constexpr uint32_t kInvert = 4;  // in Instruction::immediate, beside the combination

template <class Reader, class Comparison>
uint32_t compare(Context& context, const Instruction& i) {
  const uint32_t* a = context.source(i.a);
  const uint32_t* b = context.source(i.b);
  uint32_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool holds = Comparison::apply(Reader::read(a, lane), Reader::read(b, lane));
    result |= static_cast<uint32_t>(holds) << lane;
  }
  return i.immediate & kInvert ? ~result : result;
}

uint32_t combine(Context& context, const Instruction& i, uint32_t result) {
  switch (i.immediate & 3) {
    case kAnd:
      return result & context.predicate(i.c);
    case kOr:
      return result | context.predicate(i.c);
    case kXor:
      return result ^ context.predicate(i.c);
    default:
      return result;
  }
}

template <class Reader, class Comparison>
void set_predicates(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t result = compare<Reader, Comparison>(context, i);
  context.set_predicate(i.d, combine(context, i, result), mask);
  if (i.e.kind != Operand::kNone) context.set_predicate(i.e, combine(context, i, ~result), mask);
}

// set: all ones or zero, or 1.0 or 0.0.
template <class Reader, class Comparison>
void set_register(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t result = combine(context, i, compare<Reader, Comparison>(context, i));
  const uint32_t yes = i.sign_extend ? ~0u : 0x3f800000u;
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) { d[lane] = result >> lane & 1 ? yes : 0; });
}

template <class Reader>
Handler by_comparison(Decoding& x, bool to_register) {
  const auto choose = [&](auto comparison) -> Handler {
    using Comparison = decltype(comparison);
    return to_register ? set_register<Reader, Comparison> : set_predicates<Reader, Comparison>;
  };
  const std::string_view name = x.statement.modifiers[0];
  const auto is = [&](std::string_view a, std::string_view b = "") {
    return name == a || name == b;
  };
  const auto inverted = [&](Handler handler) {
    x.out.immediate |= kInvert;
    return handler;
  };
  const auto swapped = [&](Handler handler) {
    std::swap(x.out.a, x.out.b);
    return handler;
  };
  if (is("eq")) return choose(Equal{});
  if (is("lt", "lo")) return choose(Less{});
  if (is("le", "ls")) return choose(LessEqual{});
  if (is("gt", "hi")) return swapped(choose(Less{}));
  if (is("ge", "hs")) return swapped(choose(LessEqual{}));
  if (is("ne")) return choose(Unequal{});
  if constexpr (std::is_floating_point_v<typename Reader::Value>) {
    // A comparison that holds for NaN is what its opposite is not.
    if (is("equ")) return inverted(choose(Unequal{}));
    if (is("neu")) return inverted(choose(Equal{}));
    if (is("geu")) return inverted(choose(Less{}));
    if (is("gtu")) return inverted(choose(LessEqual{}));
    if (is("leu")) return inverted(swapped(choose(Less{})));
    if (is("ltu")) return inverted(swapped(choose(LessEqual{})));
    if (is("num")) return choose(Ordered{});
    if (is("nan")) return inverted(choose(Ordered{}));
  }
  x.unsupported();
}

Handler by_type(Decoding& x, Type type, bool to_register) {
  switch (type) {
    case Type::kB16:
    case Type::kU16:
      return by_comparison<Plain<uint16_t>>(x, to_register);
    case Type::kS16:
      return by_comparison<Plain<int16_t>>(x, to_register);
    case Type::kB32:
    case Type::kU32:
      return by_comparison<Plain<uint32_t>>(x, to_register);
    case Type::kS32:
      return by_comparison<Plain<int32_t>>(x, to_register);
    case Type::kB64:
    case Type::kU64:
      return by_comparison<Plain<uint64_t>>(x, to_register);
    case Type::kS64:
      return by_comparison<Plain<int64_t>>(x, to_register);
    case Type::kF16:
      return by_comparison<FromHalf<Half>>(x, to_register);
    case Type::kBf16:
      return by_comparison<FromHalf<Bfloat>>(x, to_register);
    case Type::kF32:
      return by_comparison<Plain<float>>(x, to_register);
    case Type::kF64:
      return by_comparison<Plain<double>>(x, to_register);
    default:
      x.unsupported();
  }
}

void decode_comparison(Decoding& x) {
  const bool to_register = x.statement.opcode == "set";
  const Type type = x.type();
  if (x.has("ftz")) x.unsupported();
  x.out.d = x.destination(0);
  x.out.e = x.second_destination(0);
  x.out.a = x.source(1, type);
  x.out.b = x.source(2, type);
  if (x.operands() > 3) {
    x.out.c = x.source(3, Type::kPred);
    x.out.immediate = x.has("and") ? kAnd : x.has("or") ? kOr : kXor;
  }
  if (to_register) x.out.sign_extend = x.type(0) != Type::kF32;
  x.out.execute = by_type(x, type, to_register);
  x.out.instruction_class = type == Type::kF32   ? InstructionClass::k_fp32
                            : type == Type::kF64 ? InstructionClass::k_fp64
                            : is_half_type(type) ? InstructionClass::k_half
                                                 : InstructionClass::k_integer;
}

// ---- Selections: a result has a value where the chosen source has one.

template <class T>
void select(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t chosen = context.predicate(i.c);
  const uint32_t* a = context.source(i.a);
  const uint32_t* b = context.source(i.b);
  uint32_t* d = context.destination(i.d);
  if (mask & ~context.defined(i.c)) fail("uninitialised register: the predicate has no value");
  context.set_defined(i.d, (context.defined(i.a) & chosen) | (context.defined(i.b) & ~chosen),
                      mask);
  for_lanes(mask, [&](int lane) {
    put<T>(d, lane, chosen >> lane & 1 ? get<T>(a, lane) : get<T>(b, lane));
  });
}

void decode_select(Decoding& x) {
  const Type type = x.type();
  take_operands(x, type, 2);
  x.out.c = x.source(3, Type::kPred);
  x.out.definedness = Definedness::kHandler;
  x.out.execute = width_of(type) == 8 ? select<uint64_t> : select<uint32_t>;
  x.out.instruction_class = InstructionClass::k_integer;
}

template <class T, class Condition>
void select_by_sign(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  const uint32_t* b = context.source(i.b);
  const uint32_t* c = context.source(i.c);
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) {
    put<T>(d, lane, get<Condition>(c, lane) >= 0 ? get<T>(a, lane) : get<T>(b, lane));
  });
}

void decode_select_by_sign(Decoding& x) {
  const Type type = x.type(0), condition = x.type(1);
  take_operands(x, type, 2);
  x.out.c = x.source(3, condition);
  const bool wide = width_of(type) == 8, real = condition == Type::kF32;
  x.out.execute =
      wide ? (real ? select_by_sign<uint64_t, float> : select_by_sign<uint64_t, int32_t>)
           : (real ? select_by_sign<uint32_t, float> : select_by_sign<uint32_t, int32_t>);
  x.out.instruction_class = InstructionClass::k_integer;
}

// ---- Logic of predicates. A false operand of `and` decides whatever the other one is, as a true
// one of `or` does; compilers rely on it.

template <uint32_t kOperation>
void predicate_logic(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t a = context.predicate(i.a), b = context.predicate(i.b);
  const uint32_t a_known = context.defined(i.a), b_known = context.defined(i.b);
  uint32_t known = a_known & b_known;
  uint32_t result = a ^ b;
  if (kOperation == kAnd) {
    result = a & b;
    known |= (a_known & ~a) | (b_known & ~b);
  }
  if (kOperation == kOr) {
    result = a | b;
    known |= (a_known & a) | (b_known & b);
  }
  context.set_defined(i.d, known, mask);
  context.set_predicate(i.d, result, mask);
}

void predicate_not(Context& context, const Instruction& i, uint32_t mask) {
  context.set_predicate(i.d, ~context.predicate(i.a), mask);
}

}  // namespace

void decode_predicate_logic(Decoding& x) {
  const std::string_view name = x.statement.opcode;
  take_operands(x, Type::kPred, name == "not" ? 1 : 2);
  if (name != "not") x.out.definedness = Definedness::kHandler;
  x.out.execute = name == "and"   ? predicate_logic<kAnd>
                  : name == "or"  ? predicate_logic<kOr>
                  : name == "xor" ? predicate_logic<kXor>
                                  : predicate_not;
  x.out.instruction_class = InstructionClass::k_integer;
}

void register_comparisons(OpcodeTable& table) {
  table["setp"] = decode_comparison;
  table["set"] = decode_comparison;
  table["selp"] = decode_select;
  table["slct"] = decode_select_by_sign;
}

}  // namespace ptxsim
