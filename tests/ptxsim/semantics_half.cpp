// Arithmetic in f16 and bf16, one or two to a register: computed wider and rounded once.
#include <cmath>
#include <type_traits>

#include "decode.h"
#include "lanes.h"
#include "number.h"
#include "semantics.h"

namespace ptxsim {
namespace {

// Single precision has more than twice the bits of either format plus two, so that rounding a sum
// or product to it first makes no difference.
struct Add {
  template <class Format>
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t) {
    return Format::from_float(Format::to_float(a) + Format::to_float(b));
  }
};
struct Subtract {
  template <class Format>
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t) {
    return Format::from_float(Format::to_float(a) - Format::to_float(b));
  }
};
struct Multiply {
  template <class Format>
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t) {
    return Format::from_float(Format::to_float(a) * Format::to_float(b));
  }
};
// A fused product and sum has no such bound: the sum is rounded to odd. In single precision where
// it holds the product exactly, which is always in f16.
struct FusedMultiplyAdd {
  template <class Format>
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    const float product = Format::to_float(a) * Format::to_float(b);
    return Format::from_float(add_to_odd(product, Format::to_float(c)));
  }
};
struct WideFusedMultiplyAdd {
  template <class Format>
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    const double product = static_cast<double>(Format::to_float(a)) * Format::to_float(b);
    return Format::from_float(to_odd_float(add_to_odd<double>(product, Format::to_float(c))));
  }
};
template <class Operation>
struct Relu {
  template <class Format>
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    const uint32_t value = Operation::template apply<Format>(a, b, c);
    const bool is_nan = std::isnan(Format::to_float(value));
    return !is_nan && (value & 0x8000u) ? 0 : value;
  }
};
struct Negate {
  template <class Format>
  static uint32_t apply(uint32_t a, uint32_t, uint32_t) {
    return a ^ 0x8000u;
  }
};
struct Absolute {
  template <class Format>
  static uint32_t apply(uint32_t a, uint32_t, uint32_t) {
    return a & 0x7fffu;
  }
};
template <bool kLess, bool kPropagate>
struct Extreme {
  template <class Format>
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t) {
    const float x = Format::to_float(a), y = Format::to_float(b);
    if (std::isnan(x) || std::isnan(y)) {
      return kPropagate || (std::isnan(x) && std::isnan(y)) ? 0x7fffu : std::isnan(x) ? b : a;
    }
    const bool x_less = x < y || (x == y && std::signbit(x));
    return x_less == kLess ? a : b;
  }
};

template <class Format, class Operation, bool kPair>
void half_operation(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  // Operands that an operation does not have are not looked at.
  const uint32_t* b = i.b.kind == Operand::kNone ? a : context.source(i.b);
  const uint32_t* c = i.c.kind == Operand::kNone ? a : context.source(i.c);
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) {
    const uint32_t x = a[lane], y = b[lane], z = c[lane];
    uint32_t result = Operation::template apply<Format>(x & 0xffffu, y & 0xffffu, z & 0xffffu);
    if (kPair) result |= Operation::template apply<Format>(x >> 16, y >> 16, z >> 16) << 16;
    d[lane] = result;
  });
}

// Whether fp32 holds the products of a and b in bf16 exactly: it does unless they under- or
// overflow.
bool products_fit(const Context& context, const Instruction& i) {
  const uint32_t* a = context.source(i.a);
  const uint32_t* b = context.source(i.b);
  uint32_t fits = 1;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t x = (half == 0 ? a[lane] << 16 : a[lane]) & 0x7fff0000u;
      const uint32_t y = (half == 0 ? b[lane] << 16 : b[lane]) & 0x7fff0000u;
      const uint32_t exponent = (x >> 23) + (y >> 23);  // biased twice
      const uint32_t normal = (x >> 23) != 0 && (y >> 23) != 0 && exponent > 130 && exponent < 380;
      fits &= normal | (x == 0) | (y == 0);
    }
  }
  return fits != 0;
}

template <bool kPair, bool kRelu>
void bfloat_fma(Context& context, const Instruction& i, uint32_t mask) {
  using Fast = std::conditional_t<kRelu, Relu<FusedMultiplyAdd>, FusedMultiplyAdd>;
  using Wide = std::conditional_t<kRelu, Relu<WideFusedMultiplyAdd>, WideFusedMultiplyAdd>;
  (products_fit(context, i) ? half_operation<Bfloat, Fast, kPair>
                            : half_operation<Bfloat, Wide, kPair>)(context, i, mask);
}

template <bool kRelu>
Handler fma_by_type(Type type) {
  using Operation = std::conditional_t<kRelu, Relu<FusedMultiplyAdd>, FusedMultiplyAdd>;
  switch (type) {
    case Type::kF16:
      return half_operation<Half, Operation, false>;
    case Type::kF16x2:
      return half_operation<Half, Operation, true>;
    case Type::kBf16:
      return bfloat_fma<false, kRelu>;
    default:
      return bfloat_fma<true, kRelu>;
  }
}

template <class Operation>
void finish(Decoding& x) {
  switch (x.type()) {
    case Type::kF16:
      x.out.execute = half_operation<Half, Operation, false>;
      break;
    case Type::kF16x2:
      x.out.execute = half_operation<Half, Operation, true>;
      break;
    case Type::kBf16:
      x.out.execute = half_operation<Bfloat, Operation, false>;
      break;
    default:
      x.out.execute = half_operation<Bfloat, Operation, true>;
      break;
  }
  x.out.instruction_class = InstructionClass::k_half;
}

}  // namespace

void decode_half_arithmetic(Decoding& x) {
  const std::string_view name = x.statement.opcode;
  for (const std::string_view modifier : {"sat", "ftz", "xorsign", "oob"}) {
    if (x.has(modifier)) x.unsupported();
  }
  if (name == "neg" || name == "abs") {
    take_operands(x, x.type(), 1);
    name == "neg" ? finish<Negate>(x) : finish<Absolute>(x);
  } else if (name == "fma") {
    take_operands(x, x.type(), 3);
    x.out.execute = x.has("relu") ? fma_by_type<true>(x.type()) : fma_by_type<false>(x.type());
    x.out.instruction_class = InstructionClass::k_half;
  } else {
    take_operands(x, x.type(), 2);
    if (name == "add") {
      finish<Add>(x);
    } else if (name == "sub") {
      finish<Subtract>(x);
    } else if (name == "mul") {
      finish<Multiply>(x);
    } else if (name == "min") {
      x.has("NaN") ? finish<Extreme<true, true>>(x) : finish<Extreme<true, false>>(x);
    } else if (name == "max") {
      x.has("NaN") ? finish<Extreme<false, true>>(x) : finish<Extreme<false, false>>(x);
    } else {
      x.unsupported();
    }
  }
}

void register_halves(OpcodeTable& table) {
  // Opcodes that integers, floats and halves share.
  const DecodeFunction arithmetic = [](Decoding& x) {
    if (is_half_type(x.type())) {
      decode_half_arithmetic(x);
    } else if (x.type() == Type::kF32 || x.type() == Type::kF64) {
      decode_float_arithmetic(x);
    } else {
      decode_integer_arithmetic(x);
    }
  };
  for (const std::string_view name :
       {"add", "sub", "mul", "div", "min", "max", "neg", "abs", "fma"}) {
    table[name] = arithmetic;
  }
  const DecodeFunction logic = [](Decoding& x) {
    x.type() == Type::kPred ? decode_predicate_logic(x) : decode_integer_logic(x);
  };
  for (const std::string_view name : {"and", "or", "xor", "not"}) table[name] = logic;
}

}  // namespace ptxsim
