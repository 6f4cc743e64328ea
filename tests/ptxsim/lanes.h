// How handlers go over lanes and read and write registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"

namespace ptxsim {

// Calls body(lane) for the active lanes. A destination register may be a source as well, but then
// of the same lane, so the iterations are independent.
template <class Body>
inline void for_lanes(uint32_t mask, Body body) {
  if (mask == kAllLanes) {
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
    for (int lane = 0; lane < kLanes; ++lane) body(lane);
  } else {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (mask >> lane & 1) body(lane);
    }
  }
}

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// A lane's value in a register that is as wide as T, or of 32 bits if T is narrower.
template <class T>
inline T get(const uint32_t* place, int lane) {
  if constexpr (sizeof(T) == 8) {
    T value;
    std::memcpy(&value, place + 2 * lane, 8);
    return value;
  } else if constexpr (sizeof(T) == 4) {
    return bit_cast<T>(place[lane]);
  } else {
    return static_cast<T>(place[lane]);
  }
}

// Values of less than 32 bits are kept zero-extended.
template <class T>
inline void put(uint32_t* place, int lane, T value) {
  if constexpr (sizeof(T) == 8) {
    std::memcpy(place + 2 * lane, &value, 8);
  } else if constexpr (sizeof(T) == 4) {
    place[lane] = bit_cast<uint32_t>(value);
  } else if constexpr (sizeof(T) == 2) {
    place[lane] = static_cast<uint16_t>(value);
  } else {
    place[lane] = static_cast<uint8_t>(value);
  }
}

// Any register as 64 bits, as sources of ld, st and cvt may be wider than their type.
inline uint64_t get_bits(const Context& context, const Operand& operand, int lane) {
  const uint32_t* place = context.source(operand);
  return operand.wide ? get<uint64_t>(place, lane) : place[lane];
}

inline void put_bits(const Context& context, const Operand& operand, int lane, uint64_t value) {
  uint32_t* place = context.destination(operand);
  if (operand.wide) {
    put<uint64_t>(place, lane, value);
  } else {
    place[lane] = static_cast<uint32_t>(value);
  }
}

// uint16_t would be promoted to int, whose overflow is undefined.
template <class T>
using Wide = std::conditional_t<(sizeof(T) < 4), uint32_t, T>;

template <class T, class Operation>
void unary(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) { put<T>(d, lane, Operation::apply(get<T>(a, lane))); });
}

template <class T, class Operation>
void binary(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  const uint32_t* b = context.source(i.b);
  uint32_t* d = context.destination(i.d);
  for_lanes(mask,
            [&](int lane) { put<T>(d, lane, Operation::apply(get<T>(a, lane), get<T>(b, lane))); });
}

template <class T, class Operation>
void ternary(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  const uint32_t* b = context.source(i.b);
  const uint32_t* c = context.source(i.c);
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) {
    put<T>(d, lane, Operation::apply(get<T>(a, lane), get<T>(b, lane), get<T>(c, lane)));
  });
}

}  // namespace ptxsim
