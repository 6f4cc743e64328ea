// The addresses of one memory instruction: which space they mean, their checks, what they cost.
#pragma once

#include "decode.h"
#include "lanes.h"
#include "memory.h"

namespace ptxsim {

template <class Body>
inline void for_active(uint32_t mask, Body body) {
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) body(__builtin_ctz(rest));
}

Space space_of(const Decoding& x);

class Access {
 public:
  // `operand` holds the addresses. Generic ones are resolved to a space.
  Access(Context& context, const Instruction& instruction, const Operand& operand, uint32_t mask);

  void check(uint32_t bytes, const char* what);
  void count_wavefronts(uint32_t bytes) const;
  uint32_t count_sectors(GlobalMemory::Direction direction) const;
  uint8_t* host(int lane) const;  // where a lane's bytes lie

  Space space;  // kGlobal, kConst, kShared or kLocal
  uint64_t addresses[kLanes];

 private:
  Context& context_;
  uint32_t mask_;
};

}  // namespace ptxsim
