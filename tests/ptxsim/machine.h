// Runs the blocks of a launch: warps, divergence and reconvergence, schedules, barriers.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernel.h"
#include "memory.h"

namespace ptxsim {

struct Options {
  int64_t seed = 0;
  int64_t quantum = 100000;
  int64_t resident = 1;
  int64_t races = 1;
  int64_t undefined = 1;
  int64_t budget = 200000000;
  int64_t trace_sectors = 1;
  int64_t sms = 108;
  int64_t max_dynamic_shared = 163 * 1024;
  int64_t compute_capability = 80;
};

// Lanes of a warp that are at the same place. A warp that has not diverged is one group.
struct Group {
  enum State : uint8_t { kReady, kParked, kWaiting };
  uint32_t pc;
  uint32_t mask;
  State state = kReady;  // kParked: at an instruction that other lanes must execute with it
  uint8_t barrier = 0;   // kWaiting: at which
};

struct PendingCopy {
  uint64_t source;
  uint32_t destination;
  uint32_t group;  // the lane's how-manieth commit covers it
  uint8_t lane;
  uint8_t from_source;
  uint8_t bytes;
};

// A wgmma.mma_async that no wait has covered.
struct PendingWgmma {
  const Instruction* instruction;
  uint64_t a, b;       // descriptors; a is none if that operand is in registers
  bool accumulates;    // scale-d
  uint32_t group = 0;  // the warp's how-manieth commit covers it
};

// What a wgmma under way does with a register.
enum : uint8_t { kIdle, kAccumulates, kIsOperand };

struct Warp {
  int index = 0;
  uint32_t live = 0;  // lanes that have not exited
  std::vector<Group> groups;
  std::vector<uint32_t> registers;
  std::vector<uint32_t> predicates;
  std::vector<uint32_t> defined;  // by register id: lanes in which it has a value
  std::vector<PendingCopy> copies;
  std::array<uint32_t, kLanes> committed{};
  uint64_t executed = 0;

  // With a kernel that uses wgmma; the vectors by register id.
  std::vector<PendingWgmma> wgmmas;
  uint32_t wgmma_groups = 0;       // committed
  uint64_t wgmma_fence = 0;        // `executed` at the last one
  std::vector<uint8_t> in_flight;  // kIdle, kAccumulates, kIsOperand
  std::vector<uint64_t> written;   // `executed` at the last write by another instruction

  bool runnable() const;
};

struct Barrier {
  uint32_t arrived = 0;   // threads
  uint32_t expected = 0;  // 0: all of the block
  uint32_t warps = 0;     // that take part
};

// Four warps whose wgmmas are the same, one after the other; each runs at its own pace here.
struct Warpgroup {
  std::vector<PendingWgmma> issued;  // by the warp that is ahead
  std::array<size_t, 4> count{};     // of each warp
};

struct Block {
  std::array<uint32_t, 3> index{};
  uint64_t number = 0;
  bool running = false;
  std::vector<Warp> warps;
  SharedMemory shared;
  std::vector<uint8_t> local;
  std::array<Barrier, 16> barriers;
  std::array<Warpgroup, 8> warpgroups;
};

// What a handler works on.
struct Context {
  const uint32_t* bank[3] = {};  // by Operand::Kind: registers, constants
  Warp* warp = nullptr;
  Block* block = nullptr;
  const Kernel* kernel = nullptr;
  const Options* options = nullptr;
  GlobalMemory* global = nullptr;
  Counters* counters = nullptr;
  const uint8_t* parameters = nullptr;

  const uint32_t* source(const Operand& operand) const {
    return bank[operand.kind] + operand.offset;
  }
  uint32_t* destination(const Operand& operand) const {
    return warp->registers.data() + operand.offset;
  }
  // Part k of a vector operand; of another operand, itself.
  const Operand& part(const Operand& operand, int k) const {
    return operand.kind == Operand::kVector ? kernel->parts[operand.offset + k] : operand;
  }
  uint32_t predicate(const Operand& operand) const {
    const uint32_t value = operand.kind == Operand::kPredicate ? warp->predicates[operand.offset]
                                                               : (source(operand)[0] ? ~0u : 0u);
    return operand.negated ? ~value : value;
  }
  void set_predicate(const Operand& operand, uint32_t value, uint32_t mask) const {
    uint32_t& place = warp->predicates[operand.offset];
    place = (place & ~mask) | (value & mask);
  }
  // Names the instruction that runs; grows from each to the next.
  uint32_t serial() const { return static_cast<uint32_t>(counters->warp_instructions); }
  uint32_t defined(const Operand& operand) const { return warp->defined[operand.id]; }
  void set_defined(const Operand& operand, uint32_t value, uint32_t mask) const {
    uint32_t& place = warp->defined[operand.id];
    place = (place & ~mask) | (value & mask);
  }
};

struct Launch {
  std::array<uint32_t, 3> grid;
  std::array<uint32_t, 3> block;
  uint32_t dynamic_shared;
  const uint8_t* parameters;
};

class Machine {
 public:
  Machine(const Kernel& kernel, const Launch& launch, const Options& options, GlobalMemory& global,
          Counters& counters);
  void run();  // throws Error with what, where and who

 private:
  void start(Block& block, uint64_t number);
  void fill_specials(Warp& warp, const Block& block);
  void run_warp(Block& block, Warp& warp);
  void step_group(Block& block, Warp& warp, size_t group, int64_t& quantum);
  bool converge(Warp& warp, Group& group, uint32_t active, const Instruction& instruction);
  void check_defined(const Instruction& instruction, uint32_t active);
  void check_wgmma_registers(Warp& warp, const Instruction& instruction) const;
  void check_wgmmas_at_exit(const Block& block, const Warp& warp) const;
  void branch(Warp& warp, size_t group, uint32_t taken, const Instruction& instruction);
  void arrive(Block& block, Warp& warp, Group& group, const Instruction& instruction,
              uint32_t active);
  void complete_barriers(Block& block);
  [[noreturn]] void report_deadlock() const;
  std::string place(const Block& block, const Warp& warp, uint32_t pc) const;

  const Kernel& kernel_;
  const Launch& launch_;
  const Options& options_;
  Counters& counters_;
  Context context_;
  std::vector<Block> blocks_;  // those resident
  uint32_t pc_ = 0;            // of the instruction being executed, for messages
  uint64_t random_ = 0;
};

}  // namespace ptxsim
