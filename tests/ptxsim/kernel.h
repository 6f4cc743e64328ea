// A decoded kernel: instructions whose operands are places in a warp's register file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "counters.h"
#include "ptx.h"

namespace ptxsim {

struct Context;
struct Instruction;

constexpr uint32_t kAllLanes = ~0u;
constexpr int kLanes = 32;

// Executes an instruction for the lanes in `mask`, which is not empty.
using Handler = void (*)(Context&, const Instruction&, uint32_t mask);

// Registers lie as [register][lane]; those up to 32 bits take a uint32_t a lane, those of 64 bits a
// uint64_t. Constants are laid out the same way in a bank of their own; predicates are lane masks.
struct Operand {
  enum Kind : uint8_t { kNone, kRegister, kConstant, kPredicate, kVector };
  Kind kind = kNone;
  uint8_t parts = 0;         // kVector: how many, from Kernel::parts[offset]
  bool wide = false;         // 64 bits a lane
  bool negated = false;      // !p
  uint32_t offset = 0;       // in uint32_t from the bank's start; index of a predicate
  uint32_t id = 0;           // whose definedness it has; 0 is always defined
  int64_t displacement = 0;  // of an address
};

enum class Control : uint8_t { kNone, kBranch, kIndexedBranch, kExit, kBarrier };

// Which lanes must execute an instruction together.
enum class Convergence : uint8_t {
  kAny,
  kWholeWarp,   // all 32 lanes, e.g. mma, ldmatrix
  kLiveLanes,   // all that have not exited: bar.sync
  kMemberMask,  // those named by Instruction::members
};

// What an instruction does with the knowledge of which registers have been written.
enum class Definedness : uint8_t {
  kStrict,     // reading a register without a value is an error
  kPropagate,  // the result has a value in the lanes where all sources have one
  kHandler,    // the handler sees to it: selp keeps that of the chosen source
};

constexpr uint32_t kNoGuard = ~0u;

struct Instruction {
  Handler execute = nullptr;
  Operand d, a, b, c, e;
  Operand members;
  uint32_t guard = kNoGuard;  // index of the predicate
  uint32_t guard_id = 0;
  uint32_t target = 0;      // of a branch; first of Kernel::branch_targets for brx.idx
  uint32_t immediate = 0;   // what the handler needs to know beyond operands
  uint32_t first_read = 0;  // in Kernel::register_ids
  uint32_t first_write = 0;
  uint8_t reads = 0;
  uint8_t writes = 0;
  uint8_t bytes = 4;     // of one element in memory
  uint8_t elements = 1;  // .v2, .v4, .x4
  Space space = Space::kGeneric;
  bool guard_negated = false;
  bool sign_extend = false;
  bool is_wgmma = false;  // wgmma.mma_async: uses its registers after it was issued
  Control control = Control::kNone;
  Convergence convergence = Convergence::kAny;
  Definedness definedness = Definedness::kPropagate;
  InstructionClass instruction_class = InstructionClass::k_other;
};

struct SourceLine {
  int line;
  std::string text;
};

enum class Special : uint8_t {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneId,
  kWarpId,
  kNwarpId,
  kLanemaskEq,
  kLanemaskLt,
  kLanemaskLe,
  kLanemaskGt,
  kLanemaskGe,
  kSmId,
  kNsmId,
  kDynamicSharedBytes,
  kTotalSharedBytes,
  kClock,
};

struct SpecialRegister {
  Special what;
  uint32_t offset;
  bool wide;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t max_threads = 1024;
  uint32_t static_shared = 0;
  uint32_t dynamic_shared_offset = 0;
  uint32_t local_bytes = 0;  // a thread

  std::vector<Instruction> instructions;
  std::vector<SourceLine> source;  // one an instruction
  std::vector<Operand> parts;
  std::vector<uint32_t> register_ids;
  std::vector<std::string> register_names;  // by id
  std::vector<uint32_t> branch_targets;
  std::vector<uint32_t> constants;
  std::vector<SpecialRegister> specials;
  uint32_t register_words = 0;  // of a warp's register file
  uint32_t predicates = 0;
  bool uses_wgmma = false;
};

// Decodes the body of a kernel; an instruction that is not known is an error.
Kernel decode_kernel(const Module& module, const KernelText& text);

}  // namespace ptxsim
