// Integer arithmetic and logic.
#include <type_traits>

#include "decode.h"
#include "lanes.h"
#include "semantics.h"

namespace ptxsim {
namespace {

struct Add {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(Wide<T>(a) + Wide<T>(b));
  }
};
struct Subtract {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(Wide<T>(a) - Wide<T>(b));
  }
};
struct MultiplyLow {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(Wide<T>(a) * Wide<T>(b));
  }
};
struct MultiplyAddLow {
  template <class T>
  static T apply(T a, T b, T c) {
    return static_cast<T>(Wide<T>(a) * Wide<T>(b) + Wide<T>(c));
  }
};
struct MultiplyHigh {
  template <class T>
  static T apply(T a, T b) {
    if constexpr (sizeof(T) == 8) {
      using Double = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
      return static_cast<T>((static_cast<Double>(a) * b) >> 64);
    } else {
      using Double = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
      return static_cast<T>((static_cast<Double>(a) * b) >> (8 * sizeof(T)));
    }
  }
};
struct MultiplyAddHigh {
  template <class T>
  static T apply(T a, T b, T c) {
    using Unsigned = Wide<std::make_unsigned_t<T>>;
    return static_cast<T>(static_cast<Unsigned>(MultiplyHigh::apply(a, b)) +
                          static_cast<Unsigned>(c));
  }
};
// Division by zero gives all ones, and its remainder the dividend, as the hardware has it.
struct Divide {
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return static_cast<T>(~T{0});
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(T{0} - Wide<T>(a));
    return static_cast<T>(a / b);
  }
};
struct Remainder {
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
struct Minimum {
  template <class T>
  static T apply(T a, T b) {
    return b < a ? b : a;
  }
};
struct Maximum {
  template <class T>
  static T apply(T a, T b) {
    return a < b ? b : a;
  }
};
struct And {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};
struct Not {
  template <class T>
  static T apply(T a) {
    return static_cast<T>(~a);
  }
};
struct Negate {
  template <class T>
  static T apply(T a) {
    return static_cast<T>(Wide<T>(0) - Wide<T>(a));
  }
};
struct Absolute {
  template <class T>
  static T apply(T a) {
    using Unsigned = Wide<std::make_unsigned_t<T>>;
    return a < 0 ? static_cast<T>(Unsigned{0} - static_cast<Unsigned>(a)) : a;
  }
};
struct AbsoluteDifference {
  template <class T>
  static T apply(T a, T b, T c) {
    using Unsigned = std::make_unsigned_t<T>;
    const auto difference =
        static_cast<Unsigned>(a < b ? static_cast<Unsigned>(b) - static_cast<Unsigned>(a)
                                    : static_cast<Unsigned>(a) - static_cast<Unsigned>(b));
    return static_cast<T>(difference + static_cast<Unsigned>(c));
  }
};

// ---- Which instance a type asks for

template <class Operation>
Handler binary_by_width(unsigned bytes) {
  if (bytes == 2) return binary<uint16_t, Operation>;
  return bytes == 8 ? binary<uint64_t, Operation> : binary<uint32_t, Operation>;
}

template <class Operation>
Handler binary_by_sign(Type type) {
  if (!is_signed_integer(type)) return binary_by_width<Operation>(width_of(type));
  if (type == Type::kS16) return binary<int16_t, Operation>;
  return type == Type::kS64 ? binary<int64_t, Operation> : binary<int32_t, Operation>;
}

template <class Operation>
Handler unary_by_width(unsigned bytes) {
  if (bytes == 2) return unary<uint16_t, Operation>;
  return bytes == 8 ? unary<uint64_t, Operation> : unary<uint32_t, Operation>;
}

template <class Operation>
Handler unary_signed(unsigned bytes) {
  if (bytes == 2) return unary<int16_t, Operation>;
  return bytes == 8 ? unary<int64_t, Operation> : unary<int32_t, Operation>;
}

template <class Operation>
Handler ternary_by_sign(Type type) {
  switch (type) {
    case Type::kS16:
      return ternary<int16_t, Operation>;
    case Type::kU16:
      return ternary<uint16_t, Operation>;
    case Type::kS32:
      return ternary<int32_t, Operation>;
    case Type::kS64:
      return ternary<int64_t, Operation>;
    case Type::kU64:
      return ternary<uint64_t, Operation>;
    default:
      return ternary<uint32_t, Operation>;
  }
}

// T sources to a result of twice the width.
template <class T, class Result, bool kAdd>
void multiply_wide(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  const uint32_t* b = context.source(i.b);
  const uint32_t* c = kAdd ? context.source(i.c) : nullptr;
  uint32_t* d = context.destination(i.d);
  using Sum = std::make_unsigned_t<Result>;
  for_lanes(mask, [&](int lane) {
    Sum value = static_cast<Sum>(static_cast<Result>(get<T>(a, lane)) *
                                 static_cast<Result>(get<T>(b, lane)));
    if (kAdd) value += get<Sum>(c, lane);
    put<Sum>(d, lane, value);
  });
}

template <bool kAdd>
Handler wide_by_type(Type type) {
  switch (type) {
    case Type::kU16:
      return multiply_wide<uint16_t, uint32_t, kAdd>;
    case Type::kS16:
      return multiply_wide<int16_t, int32_t, kAdd>;
    case Type::kU32:
      return multiply_wide<uint32_t, uint64_t, kAdd>;
    case Type::kS32:
      return multiply_wide<int32_t, int64_t, kAdd>;
    default:
      return nullptr;
  }
}

template <class A, class B>
void dot_product_of_bytes(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  const uint32_t* b = context.source(i.b);
  const uint32_t* c = context.source(i.c);
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) {
    uint32_t sum = c[lane];
    for (int k = 0; k < 32; k += 8) {
      sum += static_cast<uint32_t>(static_cast<A>(a[lane] >> k) * static_cast<B>(b[lane] >> k));
    }
    d[lane] = sum;
  });
}

// ---- Decoding

void decode_multiply(Decoding& x) {
  const Type type = x.type();
  take_operands(x, type, 2);
  finish_integer(x, x.has("wide") ? wide_by_type<false>(type)
                    : x.has("hi") ? binary_by_sign<MultiplyHigh>(type)
                    : x.has("lo") ? binary_by_width<MultiplyLow>(width_of(type))
                                  : nullptr);
}

void decode_multiply_add(Decoding& x) {
  const Type type = x.type();
  if (x.has("cc") || x.has("sat")) x.unsupported();
  take_operands(x, type, 2);
  Type sum = type;
  if (x.has("wide")) sum = width_of(type) == 2 ? Type::kU32 : Type::kU64;
  x.out.c = x.source(3, sum);
  Handler low = width_of(type) == 8   ? ternary<uint64_t, MultiplyAddLow>
                : width_of(type) == 2 ? ternary<uint16_t, MultiplyAddLow>
                                      : ternary<uint32_t, MultiplyAddLow>;
  finish_integer(x, x.has("wide") ? wide_by_type<true>(type)
                    : x.has("hi") ? ternary_by_sign<MultiplyAddHigh>(type)
                    : x.has("lo") ? low
                                  : nullptr);
}

void decode_absolute_difference(Decoding& x) {
  take_operands(x, x.type(), 3);
  finish_integer(x, ternary_by_sign<AbsoluteDifference>(x.type()));
}

void decode_dot_product(Decoding& x) {
  take_operands(x, Type::kB32, 3);
  const bool a_signed = x.type(0) == Type::kS32, b_signed = x.type(1) == Type::kS32;
  finish_integer(x, a_signed ? (b_signed ? dot_product_of_bytes<int8_t, int8_t>
                                         : dot_product_of_bytes<int8_t, uint8_t>)
                             : (b_signed ? dot_product_of_bytes<uint8_t, int8_t>
                                         : dot_product_of_bytes<uint8_t, uint8_t>));
}

}  // namespace

void decode_integer_arithmetic(Decoding& x) {
  const std::string_view name = x.statement.opcode;
  const Type type = x.type();
  const unsigned bytes = width_of(type);
  if (x.has("cc") || x.has("sat")) x.unsupported();
  if (name == "mul") return decode_multiply(x);
  if (name == "neg" || name == "abs") {
    take_operands(x, type, 1);
    finish_integer(x,
                   name == "neg" ? unary_by_width<Negate>(bytes) : unary_signed<Absolute>(bytes));
    return;
  }
  take_operands(x, type, 2);
  finish_integer(x, name == "add"   ? binary_by_width<Add>(bytes)
                    : name == "sub" ? binary_by_width<Subtract>(bytes)
                    : name == "div" ? binary_by_sign<Divide>(type)
                    : name == "min" ? binary_by_sign<Minimum>(type)
                    : name == "max" ? binary_by_sign<Maximum>(type)
                                    : nullptr);
}

void decode_integer_logic(Decoding& x) {
  const std::string_view name = x.statement.opcode;
  const unsigned bytes = width_of(x.type());
  take_operands(x, x.type(), name == "not" ? 1 : 2);
  finish_integer(x, name == "and"   ? binary_by_width<And>(bytes)
                    : name == "or"  ? binary_by_width<Or>(bytes)
                    : name == "xor" ? binary_by_width<Xor>(bytes)
                                    : unary_by_width<Not>(bytes));
}

void register_integers(OpcodeTable& table) {
  table["rem"] = [](Decoding& x) {
    take_operands(x, x.type(), 2);
    finish_integer(x, binary_by_sign<Remainder>(x.type()));
  };
  table["mad"] = decode_multiply_add;
  table["sad"] = decode_absolute_difference;
  table["dp4a"] = decode_dot_product;
}

}  // namespace ptxsim
