// What a launch did, counted exactly.
#pragma once

#include <cstdint>

namespace ptxsim {

// The class of an instruction; one counter each, warp instructions that had an active lane.
#define PTXSIM_INSTRUCTION_CLASSES(X) \
  X(other)                            \
  X(lop3)                             \
  X(prmt)                             \
  X(integer)                          \
  X(fp32)                             \
  X(fp64)                             \
  X(half)                             \
  X(convert)                          \
  X(move)                             \
  X(memory)                           \
  X(control)                          \
  X(tensor)

enum class InstructionClass : uint8_t {
#define PTXSIM_ENUM(name) k_##name,
  PTXSIM_INSTRUCTION_CLASSES(PTXSIM_ENUM)
#undef PTXSIM_ENUM
      kCount,
};

#define PTXSIM_COUNTERS(X)                                              \
  X(warp_instructions) /* issued, those with no active lane included */ \
  X(mma)                                                                \
  X(mma_flops)                                                          \
  X(wgmma) /* of one warp: a quarter of the product */                  \
  X(ldmatrix)                                                           \
  X(ldmatrix_wavefronts)                                                \
  X(ldmatrix_wavefronts_ideal)                                          \
  X(shared_loads)                                                       \
  X(shared_stores)                                                      \
  X(shared_wavefronts) /* of loads and stores */                        \
  X(shared_wavefronts_ideal)                                            \
  X(global_loads)                                                       \
  X(global_load_sectors)                                                \
  X(global_load_bytes)                                                  \
  X(global_stores) /* atomics and reductions included */                \
  X(global_store_sectors)                                               \
  X(global_store_bytes)                                                 \
  X(cp_async)                                                           \
  X(cp_async_sectors)                                                   \
  X(cp_async_wavefronts) /* of the writes to shared memory */           \
  X(cp_async_wavefronts_ideal)                                          \
  X(dram_read_sectors) /* distinct over the launch */                   \
  X(dram_write_sectors)                                                 \
  X(atomics)  /* lanes */                                               \
  X(barriers) /* completed */                                           \
  X(shuffles)                                                           \
  X(races) /* words; only with the option races=2 */

struct Counters {
#define PTXSIM_FIELD(name) uint64_t name = 0;
  PTXSIM_COUNTERS(PTXSIM_FIELD)
#undef PTXSIM_FIELD
  uint64_t by_class[static_cast<int>(InstructionClass::kCount)] = {};
};

}  // namespace ptxsim
