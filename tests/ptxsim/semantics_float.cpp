// Arithmetic in f32 and f64. Approximate instructions give the correctly rounded or the host's
// result.
#include <cmath>
#include <limits>

#include "decode.h"
#include "lanes.h"
#include "number.h"
#include "semantics.h"

namespace ptxsim {
namespace {

enum Modifier : uint32_t { kFtz = 1, kSat = 2 };

struct Add {
  template <class T>
  static T apply(T a, T b) {
    return a + b;
  }
};
struct Subtract {
  template <class T>
  static T apply(T a, T b) {
    return a - b;
  }
};
struct Multiply {
  template <class T>
  static T apply(T a, T b) {
    return a * b;
  }
};
struct Divide {
  template <class T>
  static T apply(T a, T b) {
    return a / b;
  }
};
// Of a number and NaN the number; -0 is less than +0.
struct Minimum {
  template <class T>
  static T apply(T a, T b) {
    const T less = a < b || (a == b && std::signbit(a)) ? a : b;
    return std::isnan(a) ? b : std::isnan(b) ? a : less;
  }
};
struct Maximum {
  template <class T>
  static T apply(T a, T b) {
    const T more = a > b || (a == b && !std::signbit(a)) ? a : b;
    return std::isnan(a) ? b : std::isnan(b) ? a : more;
  }
};
template <class Operation>
struct NanPropagating {
  template <class T>
  static T apply(T a, T b) {
    return std::isnan(a) || std::isnan(b) ? std::numeric_limits<T>::quiet_NaN()
                                          : Operation::apply(a, b);
  }
};
struct CopySign {  // the sign of a on b
  template <class T>
  static T apply(T a, T b) {
    return std::copysign(b, a);
  }
};
struct FusedMultiplyAdd {
  template <class T>
  static T apply(T a, T b, T c) {
    return std::fma(a, b, c);
  }
};
struct Negate {
  template <class T>
  static T apply(T a) {
    return -a;
  }
};
struct Absolute {
  template <class T>
  static T apply(T a) {
    return std::fabs(a);
  }
};
struct Reciprocal {
  template <class T>
  static T apply(T a) {
    return 1 / a;
  }
};
struct SquareRoot {
  template <class T>
  static T apply(T a) {
    return std::sqrt(a);
  }
};
struct ReciprocalSquareRoot {
  template <class T>
  static T apply(T a) {
    return static_cast<T>(1 / std::sqrt(static_cast<double>(a)));
  }
};
struct Exponential2 {
  template <class T>
  static T apply(T a) {
    return std::exp2(a);
  }
};
struct Logarithm2 {
  template <class T>
  static T apply(T a) {
    return std::log2(a);
  }
};
struct Sine {
  template <class T>
  static T apply(T a) {
    return std::sin(a);
  }
};
struct Cosine {
  template <class T>
  static T apply(T a) {
    return std::cos(a);
  }
};
struct HyperbolicTangent {
  template <class T>
  static T apply(T a) {
    return std::tanh(a);
  }
};

// With .ftz subnormal operands and results are zero; with .sat results lie in [0, 1], NaN being 0.
template <class Operation>
struct Flushed {
  static float flush(float a) {
    return std::fabs(a) < std::numeric_limits<float>::min() ? std::copysign(0.0f, a) : a;
  }
  template <class... T>
  static float apply(T... a) {
    return flush(Operation::apply(flush(a)...));
  }
};
template <class Operation>
struct Saturated {
  template <class... T>
  static float apply(T... a) {
    const float value = Operation::apply(a...);
    return value > 0 ? std::fmin(value, 1.0f) : 0.0f;
  }
};

// Directed rounding: the exact result to odd in double, from there to float.
enum Rounding { kNearest, kZero, kDown, kUp };

float round_to_float(double odd, Rounding rounding) {
  const float nearest = static_cast<float>(odd);
  const double back = nearest;
  if (back == odd || std::isnan(odd)) return nearest;
  const bool above = back > odd;
  const bool want_below = rounding == kDown || (rounding == kZero && odd > 0);
  if (want_below == above) {
    return std::nextafter(nearest, above ? -std::numeric_limits<float>::infinity()
                                         : std::numeric_limits<float>::infinity());
  }
  return nearest;
}

template <Rounding kRounding, int kOperation>  // 0 add, 1 sub, 2 mul, 3 fma
void directed(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  const uint32_t* b = context.source(i.b);
  const uint32_t* c = kOperation == 3 ? context.source(i.c) : nullptr;
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) {
    const double x = get<float>(a, lane), y = get<float>(b, lane);
    double exact;
    if (kOperation == 2) {
      exact = x * y;
    } else if (kOperation == 3) {
      exact = add_to_odd<double>(x * y, get<float>(c, lane));
    } else {
      exact = add_to_odd<double>(x, kOperation == 0 ? y : -y);
    }
    put<float>(d, lane, round_to_float(exact, kRounding));
  });
}

template <int kOperation>
Handler directed_by_mode(const Decoding& x) {
  if (x.has("rz")) return directed<kZero, kOperation>;
  if (x.has("rm")) return directed<kDown, kOperation>;
  return x.has("rp") ? directed<kUp, kOperation> : nullptr;
}

uint32_t modifiers_of(const Decoding& x) {
  return (x.has("ftz") ? kFtz : 0u) | (x.has("sat") ? kSat : 0u);
}

template <class Operation>
Handler unary_float(const Decoding& x) {
  if (x.type() == Type::kF64) return unary<double, Operation>;
  switch (modifiers_of(x)) {
    case 0:
      return unary<float, Operation>;
    case kFtz:
      return unary<float, Flushed<Operation>>;
    case kSat:
      return unary<float, Saturated<Operation>>;
    default:
      return unary<float, Saturated<Flushed<Operation>>>;
  }
}

template <class Operation>
Handler binary_float(const Decoding& x) {
  if (x.type() == Type::kF64) return binary<double, Operation>;
  switch (modifiers_of(x)) {
    case 0:
      return binary<float, Operation>;
    case kFtz:
      return binary<float, Flushed<Operation>>;
    case kSat:
      return binary<float, Saturated<Operation>>;
    default:
      return binary<float, Saturated<Flushed<Operation>>>;
  }
}

template <class Operation>
Handler ternary_float(const Decoding& x) {
  if (x.type() == Type::kF64) return ternary<double, Operation>;
  switch (modifiers_of(x)) {
    case 0:
      return ternary<float, Operation>;
    case kFtz:
      return ternary<float, Flushed<Operation>>;
    case kSat:
      return ternary<float, Saturated<Operation>>;
    default:
      return ternary<float, Saturated<Flushed<Operation>>>;
  }
}

void finish(Decoding& x, Handler handler) {
  if (handler == nullptr) x.unsupported();
  x.out.execute = handler;
  x.out.instruction_class =
      x.type() == Type::kF64 ? InstructionClass::k_fp64 : InstructionClass::k_fp32;
}

void require_float(const Decoding& x) {
  if (x.type() != Type::kF32 && x.type() != Type::kF64) x.unsupported();
  if (x.has("xorsign")) x.unsupported();
}

template <class Operation>
void decode_unary(Decoding& x) {
  require_float(x);
  if (x.has("rz") || x.has("rm") || x.has("rp")) x.unsupported();
  take_operands(x, x.type(), 1);
  finish(x, unary_float<Operation>(x));
}

// testp: what kind of number a is.
void test_property(Context& context, const Instruction& i, uint32_t mask) {
  uint32_t result = 0;
  const bool is_double = i.bytes == 8;
  for_lanes(mask, [&](int lane) {
    const uint32_t* a = context.source(i.a);
    const int kind =
        is_double ? std::fpclassify(get<double>(a, lane)) : std::fpclassify(get<float>(a, lane));
    if (i.immediate >> kind & 1) result |= 1u << lane;
  });
  context.set_predicate(i.d, result, mask);
}

void decode_test_property(Decoding& x) {
  require_float(x);
  take_operands(x, x.type(), 1);
  x.out.bytes = static_cast<uint8_t>(width_of(x.type()));
  const uint32_t finite = 1u << FP_NORMAL | 1u << FP_SUBNORMAL | 1u << FP_ZERO;
  x.out.immediate = x.has("finite")       ? finite
                    : x.has("infinite")   ? 1u << FP_INFINITE
                    : x.has("number")     ? finite | 1u << FP_INFINITE
                    : x.has("notanumber") ? 1u << FP_NAN
                    : x.has("normal")     ? 1u << FP_NORMAL
                                          : 1u << FP_SUBNORMAL;
  finish(x, test_property);
}

}  // namespace

void decode_float_arithmetic(Decoding& x) {
  require_float(x);
  const std::string_view name = x.statement.opcode;
  const bool directed_mode = x.has("rz") || x.has("rm") || x.has("rp");
  if (name == "neg") return decode_unary<Negate>(x);
  if (name == "abs") return decode_unary<Absolute>(x);
  take_operands(x, x.type(), name == "fma" || name == "mad" ? 3 : 2);
  if (directed_mode) {
    if (x.type() != Type::kF32 || modifiers_of(x) != 0) x.unsupported();
    finish(x, name == "add"   ? directed_by_mode<0>(x)
              : name == "sub" ? directed_by_mode<1>(x)
              : name == "mul" ? directed_by_mode<2>(x)
              : name == "fma" ? directed_by_mode<3>(x)
                              : nullptr);
  } else if (name == "min") {
    finish(x, x.has("NaN") ? binary_float<NanPropagating<Minimum>>(x) : binary_float<Minimum>(x));
  } else if (name == "max") {
    finish(x, x.has("NaN") ? binary_float<NanPropagating<Maximum>>(x) : binary_float<Maximum>(x));
  } else {
    finish(x, name == "add"   ? binary_float<Add>(x)
              : name == "sub" ? binary_float<Subtract>(x)
              : name == "mul" ? binary_float<Multiply>(x)
              : name == "div" ? binary_float<Divide>(x)
              : name == "fma" ? ternary_float<FusedMultiplyAdd>(x)
                              : nullptr);
  }
}

void register_floats(OpcodeTable& table) {
  table["rcp"] = decode_unary<Reciprocal>;
  table["sqrt"] = decode_unary<SquareRoot>;
  table["rsqrt"] = decode_unary<ReciprocalSquareRoot>;
  table["ex2"] = decode_unary<Exponential2>;
  table["lg2"] = decode_unary<Logarithm2>;
  table["sin"] = decode_unary<Sine>;
  table["cos"] = decode_unary<Cosine>;
  table["tanh"] = decode_unary<HyperbolicTangent>;
  table["copysign"] = [](Decoding& x) {
    require_float(x);
    take_operands(x, x.type(), 2);
    finish(x, binary_float<CopySign>(x));
  };
  table["testp"] = decode_test_property;
}

}  // namespace ptxsim
