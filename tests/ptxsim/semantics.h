// Decoders that opcodes of several types share: add is an integer, a float or a half instruction.
#pragma once

#include "decode.h"

namespace ptxsim {

// d and the first `count` sources of a, b, c, all of one type.
inline void take_operands(Decoding& x, Type type, int count) {
  x.out.d = x.destination(0);
  x.out.a = x.source(1, type);
  if (count > 1) x.out.b = x.source(2, type);
  if (count > 2) x.out.c = x.source(3, type);
}

inline void finish_integer(Decoding& x, Handler handler) {
  if (handler == nullptr) x.unsupported();
  x.out.execute = handler;
  x.out.instruction_class = InstructionClass::k_integer;
}

inline bool is_half_type(Type type) {
  return type == Type::kF16 || type == Type::kF16x2 || type == Type::kBf16 || type == Type::kBf16x2;
}

void decode_integer_arithmetic(Decoding& x);  // add sub mul div min max neg abs
void decode_integer_logic(Decoding& x);       // and or xor not
void decode_float_arithmetic(Decoding& x);    // those of f32 and f64, fma and div included
void decode_half_arithmetic(Decoding& x);
void decode_predicate_logic(Decoding& x);

}  // namespace ptxsim
