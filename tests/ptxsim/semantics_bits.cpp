// Shifts, lop3, prmt, bit fields and counts of bits.
#include <algorithm>
#include <type_traits>

#include "decode.h"
#include "lanes.h"
#include "semantics.h"

namespace ptxsim {
namespace {

struct PopulationCount {
  template <class T>
  static uint32_t apply(T a) {
    return static_cast<uint32_t>(__builtin_popcountll(a));
  }
};
struct CountLeadingZeros {
  template <class T>
  static uint32_t apply(T a) {
    constexpr int kUnused = 64 - 8 * static_cast<int>(sizeof(T));
    return static_cast<uint32_t>(a == 0 ? 8 * sizeof(T) : __builtin_clzll(a) - kUnused);
  }
};
struct FindMostSignificant {  // bfind: for signed numbers the highest bit that differs from the
                              // sign
  template <class T>
  static uint32_t apply(T a) {
    if (std::is_signed_v<T> && a < 0) a = static_cast<T>(~a);
    const auto bits = static_cast<std::make_unsigned_t<T>>(a);
    return bits == 0 ? ~0u : static_cast<uint32_t>(63 - __builtin_clzll(bits));
  }
};
struct Reverse {
  template <class T>
  static T apply(T a) {
    T reversed = 0;
    for (unsigned bit = 0; bit < 8 * sizeof(T); ++bit) {
      reversed = static_cast<T>(reversed << 1 | (a >> bit & 1));
    }
    return reversed;
  }
};
// T sources to a uint32_t result.
template <class T, class Operation>
void count_bits(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) { d[lane] = Operation::apply(get<T>(a, lane)); });
}

template <class T, bool kLeft>
void shift(Context& context, const Instruction& i, uint32_t mask) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  const uint32_t* a = context.source(i.a);
  const uint32_t* b = context.source(i.b);
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) {
    const T value = get<T>(a, lane);
    const uint32_t amount = b[lane];
    const uint32_t clamped = std::min(amount, kBits - 1);
    T shifted;
    if (kLeft) {
      shifted = static_cast<T>(Wide<std::make_unsigned_t<T>>(value) << clamped);
    } else {
      shifted = static_cast<T>(value >> clamped);
    }
    const bool vanishes = amount >= kBits && (kLeft || !std::is_signed_v<T>);
    put<T>(d, lane, vanishes ? T{0} : shifted);
  });
}

template <bool kLeft>
void funnel_shift(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  const uint32_t* b = context.source(i.b);
  const uint32_t* c = context.source(i.c);
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) {
    const uint64_t both = a[lane] | static_cast<uint64_t>(b[lane]) << 32;
    const uint32_t amount = i.immediate ? c[lane] & 31 : std::min(c[lane], 32u);
    d[lane] = static_cast<uint32_t>(kLeft ? (both << amount) >> 32 : both >> amount);
  });
}

void lop3(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  const uint32_t* b = context.source(i.b);
  const uint32_t* c = context.source(i.c);
  uint32_t* d = context.destination(i.d);
  uint32_t table[8];
  for (int k = 0; k < 8; ++k) table[k] = i.immediate >> k & 1 ? ~0u : 0;
  for_lanes(mask, [&](int lane) {
    const uint32_t x = a[lane], y = b[lane], z = c[lane];
    const uint32_t low =
        (~y & ((~z & table[0]) | (z & table[1]))) | (y & ((~z & table[2]) | (z & table[3])));
    const uint32_t high =
        (~y & ((~z & table[4]) | (z & table[5]))) | (y & ((~z & table[6]) | (z & table[7])));
    d[lane] = (~x & low) | (x & high);
  });
}

uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t choice = selector >> (4 * k);
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (choice & 7))) & 0xff;
    if (choice & 8) byte = byte & 0x80 ? 0xff : 0;  // replicates the sign
    result |= byte << (8 * k);
  }
  return result;
}

enum PermuteMode : uint32_t { kDefault, kF4e, kB4e, kRc8, kEcl, kEcr, kRc16 };

// The modes other than the default one as selectors of it, by the control's low two bits.
uint32_t selector_of_mode(uint32_t mode, uint32_t control) {
  static constexpr uint16_t kSelectors[][4] = {
      {0x3210, 0x4321, 0x5432, 0x6543},  // f4e
      {0x5670, 0x6701, 0x7012, 0x0123},  // b4e
      {0x0000, 0x1111, 0x2222, 0x3333},  // rc8
      {0x3210, 0x3211, 0x3222, 0x3333},  // ecl
      {0x0000, 0x1110, 0x2210, 0x3210},  // ecr
      {0x1010, 0x3232, 0x1010, 0x3232},  // rc16
  };
  return kSelectors[mode - 1][control & 3];
}

void prmt(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  const uint32_t* b = context.source(i.b);
  const uint32_t* c = context.source(i.c);
  uint32_t* d = context.destination(i.d);
  if (i.immediate == kDefault) {
    for_lanes(mask, [&](int lane) { d[lane] = permute(a[lane], b[lane], c[lane]); });
  } else {
    for_lanes(mask, [&](int lane) {
      d[lane] = permute(a[lane], b[lane], selector_of_mode(i.immediate, c[lane]));
    });
  }
}

template <class T>
void extract_field(Context& context, const Instruction& i, uint32_t mask) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  using Unsigned = std::make_unsigned_t<T>;
  const uint32_t* a = context.source(i.a);
  const uint32_t* b = context.source(i.b);
  const uint32_t* c = context.source(i.c);
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) {
    const Unsigned value = get<Unsigned>(a, lane);
    const uint32_t position = b[lane] & 0xff, length = c[lane] & 0xff;
    Unsigned field = position < kBits && length != 0 ? static_cast<Unsigned>(value >> position) : 0;
    if (length < kBits) field &= static_cast<Unsigned>((Unsigned{1} << length) - 1);
    if (std::is_signed_v<T> && length != 0) {
      const uint32_t last = std::min(position + length - 1, kBits - 1);
      const bool negative = value >> last & 1;
      if (negative && length < kBits) field |= static_cast<Unsigned>(~Unsigned{0} << length);
      if (negative && position != 0) {  // bits beyond the value repeat its sign
        const uint32_t present = position < kBits ? kBits - position : 0;
        if (present < kBits) field |= static_cast<Unsigned>(~Unsigned{0} << present);
      }
    }
    put<Unsigned>(d, lane, field);
  });
}

template <class T>
void insert_field(Context& context, const Instruction& i, uint32_t mask) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  const uint32_t* a = context.source(i.a);
  const uint32_t* b = context.source(i.b);
  const uint32_t* c = context.source(i.c);
  const uint32_t* e = context.source(i.e);
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) {
    const uint32_t position = c[lane] & 0xff, length = e[lane] & 0xff;
    const T ones = length >= kBits ? ~T{0} : static_cast<T>((T{1} << length) - 1);
    const T field = position >= kBits ? T{0} : static_cast<T>(ones << position);
    const T value = position >= kBits ? T{0} : static_cast<T>(get<T>(a, lane) << position);
    put<T>(d, lane, static_cast<T>((value & field) | (get<T>(b, lane) & ~field)));
  });
}

// ---- Decoding

void decode_shift(Decoding& x) {
  const Type type = x.type();
  x.out.d = x.destination(0);
  x.out.a = x.source(1, type);
  x.out.b = x.source(2, Type::kU32);
  const unsigned bytes = width_of(type);
  if (x.statement.opcode == "shl") {
    finish_integer(x, bytes == 2   ? shift<uint16_t, true>
                      : bytes == 8 ? shift<uint64_t, true>
                                   : shift<uint32_t, true>);
  } else if (is_signed_integer(type)) {
    finish_integer(x, bytes == 2   ? shift<int16_t, false>
                      : bytes == 8 ? shift<int64_t, false>
                                   : shift<int32_t, false>);
  } else {
    finish_integer(x, bytes == 2   ? shift<uint16_t, false>
                      : bytes == 8 ? shift<uint64_t, false>
                                   : shift<uint32_t, false>);
  }
}

void decode_funnel_shift(Decoding& x) {
  take_operands(x, Type::kB32, 3);
  x.out.immediate = x.has("wrap");
  finish_integer(x, x.has("l") ? funnel_shift<true> : funnel_shift<false>);
}

void decode_lop3(Decoding& x) {
  if (x.operands() != 5 || x.statement.modifiers.size() != 1) x.unsupported();
  take_operands(x, Type::kB32, 3);
  x.out.immediate = x.immediate(4);
  finish_integer(x, lop3);
  x.out.instruction_class = InstructionClass::k_lop3;
}

void decode_prmt(Decoding& x) {
  take_operands(x, Type::kB32, 3);
  x.out.immediate = x.has("f4e")    ? kF4e
                    : x.has("b4e")  ? kB4e
                    : x.has("rc8")  ? kRc8
                    : x.has("ecl")  ? kEcl
                    : x.has("ecr")  ? kEcr
                    : x.has("rc16") ? kRc16
                                    : kDefault;
  finish_integer(x, prmt);
  x.out.instruction_class = InstructionClass::k_prmt;
}

void decode_extract_field(Decoding& x) {
  const Type type = x.type();
  x.out.d = x.destination(0);
  x.out.a = x.source(1, type);
  x.out.b = x.source(2, Type::kU32);
  x.out.c = x.source(3, Type::kU32);
  finish_integer(x, type == Type::kU32   ? extract_field<uint32_t>
                    : type == Type::kS32 ? extract_field<int32_t>
                    : type == Type::kU64 ? extract_field<uint64_t>
                                         : extract_field<int64_t>);
}

void decode_insert_field(Decoding& x) {
  const Type type = x.type();
  take_operands(x, type, 2);
  x.out.c = x.source(3, Type::kU32);
  x.out.e = x.source(4, Type::kU32);
  finish_integer(x, width_of(type) == 8 ? insert_field<uint64_t> : insert_field<uint32_t>);
}

template <class Operation>
void decode_count(Decoding& x) {
  const Type type = x.type();
  take_operands(x, type, 1);
  finish_integer(
      x, width_of(type) == 8 ? count_bits<uint64_t, Operation> : count_bits<uint32_t, Operation>);
}

void decode_find_most_significant(Decoding& x) {
  if (x.has("shiftamt")) x.unsupported();
  const Type type = x.type();
  take_operands(x, type, 1);
  finish_integer(x, type == Type::kU32   ? count_bits<uint32_t, FindMostSignificant>
                    : type == Type::kS32 ? count_bits<int32_t, FindMostSignificant>
                    : type == Type::kU64 ? count_bits<uint64_t, FindMostSignificant>
                                         : count_bits<int64_t, FindMostSignificant>);
}

void decode_reverse(Decoding& x) {
  take_operands(x, x.type(), 1);
  finish_integer(x, width_of(x.type()) == 8 ? unary<uint64_t, Reverse> : unary<uint32_t, Reverse>);
}

}  // namespace

void register_bits(OpcodeTable& table) {
  table["shl"] = decode_shift;
  table["shr"] = decode_shift;
  table["shf"] = decode_funnel_shift;
  table["lop3"] = decode_lop3;
  table["prmt"] = decode_prmt;
  table["bfe"] = decode_extract_field;
  table["bfi"] = decode_insert_field;
  table["popc"] = decode_count<PopulationCount>;
  table["clz"] = decode_count<CountLeadingZeros>;
  table["brev"] = decode_reverse;
  table["bfind"] = decode_find_most_significant;
}

}  // namespace ptxsim
