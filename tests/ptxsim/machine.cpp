#include "machine.h"

#include <algorithm>
#include <cstdio>

namespace ptxsim {

bool Warp::runnable() const {
  return std::any_of(groups.begin(), groups.end(),
                     [](const Group& group) { return group.state != Group::kWaiting; });
}

Machine::Machine(const Kernel& kernel, const Launch& launch, const Options& options,
                 GlobalMemory& global, Counters& counters)
    : kernel_(kernel), launch_(launch), options_(options), counters_(counters) {
  context_.kernel = &kernel;
  context_.options = &options;
  context_.global = &global;
  context_.counters = &counters;
  context_.parameters = launch.parameters;
  context_.bank[Operand::kConstant] = kernel.constants.data();
  random_ = static_cast<uint64_t>(options.seed) * 0x9e3779b97f4a7c15ull;
  blocks_.resize(static_cast<size_t>(std::max<int64_t>(1, options.resident)));
}

std::string Machine::place(const Block& block, const Warp& warp, uint32_t pc) const {
  const SourceLine& source = kernel_.source[std::min<size_t>(pc, kernel_.source.size() - 1)];
  char text[128];
  std::snprintf(text, sizeof text, "; block (%u, %u, %u), warp %d; PTX line %d of ", block.index[0],
                block.index[1], block.index[2], warp.index, source.line);
  return text + kernel_.name + ": " + source.text;
}

void Machine::fill_specials(Warp& warp, const Block& block) {
  const auto& size = launch_.block;
  const uint32_t threads = size[0] * size[1] * size[2];
  for (const SpecialRegister& special : kernel_.specials) {
    uint32_t* place = warp.registers.data() + special.offset;
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      const uint32_t thread = static_cast<uint32_t>(warp.index) * kLanes + lane;
      uint32_t value = 0;
      switch (special.what) {
        case Special::kTidX:
          value = thread % size[0];
          break;
        case Special::kTidY:
          value = thread / size[0] % size[1];
          break;
        case Special::kTidZ:
          value = thread / size[0] / size[1];
          break;
        case Special::kNtidX:
          value = size[0];
          break;
        case Special::kNtidY:
          value = size[1];
          break;
        case Special::kNtidZ:
          value = size[2];
          break;
        case Special::kCtaidX:
          value = block.index[0];
          break;
        case Special::kCtaidY:
          value = block.index[1];
          break;
        case Special::kCtaidZ:
          value = block.index[2];
          break;
        case Special::kNctaidX:
          value = launch_.grid[0];
          break;
        case Special::kNctaidY:
          value = launch_.grid[1];
          break;
        case Special::kNctaidZ:
          value = launch_.grid[2];
          break;
        case Special::kLaneId:
          value = lane;
          break;
        case Special::kWarpId:
          value = static_cast<uint32_t>(warp.index);
          break;
        case Special::kNwarpId:
          value = (threads + kLanes - 1) / kLanes;
          break;
        case Special::kLanemaskEq:
          value = 1u << lane;
          break;
        case Special::kLanemaskLt:
          value = (1u << lane) - 1;
          break;
        case Special::kLanemaskLe:
          value = (2u << lane) - 1;
          break;
        case Special::kLanemaskGt:
          value = ~((2u << lane) - 1);
          break;
        case Special::kLanemaskGe:
          value = ~((1u << lane) - 1);
          break;
        case Special::kSmId:
          value = static_cast<uint32_t>(block.number % options_.sms);
          break;
        case Special::kNsmId:
          value = static_cast<uint32_t>(options_.sms);
          break;
        case Special::kDynamicSharedBytes:
          value = launch_.dynamic_shared;
          break;
        case Special::kTotalSharedBytes:
          value = kernel_.dynamic_shared_offset + launch_.dynamic_shared;
          break;
        case Special::kClock:
          break;  // time stands still
      }
      if (special.wide) {
        place[2 * lane] = value;
        place[2 * lane + 1] = 0;
      } else {
        place[lane] = value;
      }
    }
  }
}

void Machine::start(Block& block, uint64_t number) {
  block.number = number;
  block.index = {static_cast<uint32_t>(number % launch_.grid[0]),
                 static_cast<uint32_t>(number / launch_.grid[0] % launch_.grid[1]),
                 static_cast<uint32_t>(number / launch_.grid[0] / launch_.grid[1])};
  block.running = true;
  const uint32_t threads = launch_.block[0] * launch_.block[1] * launch_.block[2];
  const uint32_t warps = (threads + kLanes - 1) / kLanes;
  block.shared.reset(kernel_.dynamic_shared_offset + launch_.dynamic_shared,
                     static_cast<int>(warps), static_cast<int>(options_.races), &counters_);
  constexpr uint8_t kPoison = 0xff;  // NaN in every floating type
  block.local.assign(static_cast<size_t>(threads) * kernel_.local_bytes, kPoison);
  block.barriers.fill({});
  block.warpgroups.fill({});
  block.warps.resize(warps);
  for (uint32_t k = 0; k < warps; ++k) {
    Warp& warp = block.warps[k];
    warp.index = static_cast<int>(k);
    const uint32_t lanes = std::min<uint32_t>(kLanes, threads - k * kLanes);
    warp.live = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
    warp.groups.assign(1, {0, warp.live});
    warp.registers.assign(kernel_.register_words, 0xffffffffu);
    warp.predicates.assign(kernel_.predicates, 0);
    warp.defined.assign(kernel_.register_names.size(), 0);
    warp.defined[0] = kAllLanes;
    warp.copies.clear();
    warp.committed.fill(0);
    warp.executed = 0;
    warp.wgmmas.clear();
    warp.wgmma_groups = 0;
    warp.wgmma_fence = 0;
    if (kernel_.uses_wgmma) {
      warp.in_flight.assign(kernel_.register_names.size(), kIdle);
      warp.written.assign(kernel_.register_names.size(), 0);
    }
    fill_specials(warp, block);
  }
}

void Machine::run() {
  const uint64_t total = static_cast<uint64_t>(launch_.grid[0]) * launch_.grid[1] * launch_.grid[2];
  uint64_t next = 0;
  std::vector<std::pair<Block*, Warp*>> runnable;
  while (true) {
    bool any_running = false;
    runnable.clear();
    for (Block& block : blocks_) {
      const auto lives = [](const Warp& warp) { return warp.live != 0; };
      if (block.running && std::none_of(block.warps.begin(), block.warps.end(), lives)) {
        block.running = false;
      }
      if (!block.running && next < total) start(block, next++);
      if (!block.running) continue;
      any_running = true;
      for (Warp& warp : block.warps) {
        if (warp.live != 0 && warp.runnable()) runnable.push_back({&block, &warp});
      }
    }
    if (!any_running) return;
    if (runnable.empty()) report_deadlock();
    if (options_.seed == 0) {
      for (const auto& [block, warp] : runnable) {
        // An earlier one may have completed the barrier and gone on; its turn is over all the same.
        run_warp(*block, *warp);
      }
    } else {
      random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
      const auto& [block, warp] = runnable[(random_ >> 33) % runnable.size()];
      run_warp(*block, *warp);
    }
  }
}

void Machine::run_warp(Block& block, Warp& warp) {
  context_.warp = &warp;
  context_.block = &block;
  context_.bank[Operand::kRegister] = warp.registers.data();
  int64_t quantum = options_.quantum;
  try {
    while (quantum > 0 && warp.live != 0) {
      // The lanes that are furthest behind go first, so that the others are caught up with.
      size_t chosen = warp.groups.size();
      for (size_t k = 0; k < warp.groups.size(); ++k) {
        if (warp.groups[k].state != Group::kReady) continue;
        if (chosen == warp.groups.size() || warp.groups[k].pc < warp.groups[chosen].pc) chosen = k;
      }
      if (chosen == warp.groups.size()) {
        const auto parked =
            std::find_if(warp.groups.begin(), warp.groups.end(),
                         [](const Group& group) { return group.state == Group::kParked; });
        if (parked == warp.groups.end()) return;  // all wait at barriers
        pc_ = parked->pc;
        fail(
            "inactive lanes: lanes 0x%08x wait here for others of their warp, which do not come "
            "(live: 0x%08x)",
            parked->mask, warp.live);
      }
      step_group(block, warp, chosen, quantum);
    }
  } catch (const Error& error) {
    throw Error(error.what() + place(block, warp, pc_));
  }
}

void Machine::check_defined(const Instruction& instruction, uint32_t active) {
  const Warp& warp = *context_.warp;
  const auto check = [&](uint32_t id, uint32_t lanes) {
    const uint32_t missing = lanes & ~warp.defined[id];
    if (missing == 0) return;
    fail(
        "uninitialised register: %s has no value in lane %d: never written, or computed from one "
        "that was not",
        kernel_.register_names[id].c_str(), __builtin_ctz(missing));
  };
  const uint32_t* reads = kernel_.register_ids.data() + instruction.first_read;
  for (int k = 0; k < instruction.reads; ++k) check(reads[k], active);
}

void Machine::check_wgmma_registers(Warp& warp, const Instruction& instruction) const {
  if (!warp.wgmmas.empty()) {
    const uint32_t* reads = kernel_.register_ids.data() + instruction.first_read;
    for (int k = 0; k < instruction.reads; ++k) {
      if (warp.in_flight[reads[k]] != kAccumulates) continue;
      fail("in flight: a read of %s, which a wgmma is still accumulating",
           kernel_.register_names[reads[k]].c_str());
    }
  }
  const uint32_t* writes = kernel_.register_ids.data() + instruction.first_write;
  for (int k = 0; k < instruction.writes; ++k) {
    if (warp.in_flight[writes[k]] != kIdle) {
      fail("in flight: a write to %s, which a wgmma is still %s",
           kernel_.register_names[writes[k]].c_str(),
           warp.in_flight[writes[k]] == kAccumulates ? "accumulating" : "reading");
    }
    warp.written[writes[k]] = warp.executed;
  }
}

void Machine::check_wgmmas_at_exit(const Block& block, const Warp& warp) const {
  if (!warp.wgmmas.empty()) fail("in flight: the warp exits with a wgmma that no wait has covered");
  const size_t first = static_cast<size_t>(warp.index) / 4 * 4;
  const Warpgroup& group = block.warpgroups[first / 4];
  for (size_t k = 0; k < 4 && first + k < block.warps.size(); ++k) {
    const size_t mine = group.count[static_cast<size_t>(warp.index) % 4];
    if (block.warps[first + k].live == 0 && group.count[k] != mine) {
      fail("warpgroup: warp %d exits after %zu wgmmas, warp %zu after %zu", warp.index, mine,
           first + k, group.count[k]);
    }
  }
}

bool Machine::converge(Warp& warp, Group& group, uint32_t active, const Instruction& instruction) {
  uint32_t required = kAllLanes;
  if (instruction.convergence == Convergence::kLiveLanes) required = warp.live;
  if (instruction.convergence == Convergence::kMemberMask) {
    required = context_.source(instruction.members)[__builtin_ctz(active)];
    if (active & ~required) {
      fail("inactive lanes: lanes 0x%08x execute this, but its member mask is 0x%08x", active,
           required);
    }
  }
  const uint32_t missing = required & ~active;
  if (missing == 0) return true;
  const bool others = std::any_of(warp.groups.begin(), warp.groups.end(), [&](const Group& other) {
    return &other != &group && other.state == Group::kReady;
  });
  if ((missing & ~warp.live) || (missing & group.mask) || !others) {
    fail("inactive lanes: lanes 0x%08x must execute this together, only 0x%08x do", required,
         active);
  }
  group.state = Group::kParked;
  return false;
}

void Machine::step_group(Block& block, Warp& warp, size_t chosen, int64_t& quantum) {
  // Groups at the same place become one.
  for (size_t k = 0; k < warp.groups.size();) {
    Group& group = warp.groups[chosen];
    const Group& other = warp.groups[k];
    if (k == chosen || other.pc != group.pc || other.state == Group::kWaiting) {
      ++k;
      continue;
    }
    group.mask |= other.mask;
    warp.groups.erase(warp.groups.begin() + static_cast<std::ptrdiff_t>(k));
    if (k < chosen) --chosen;
  }
  // Runs on until it meets another group, or something changes the groups.
  uint32_t limit = static_cast<uint32_t>(kernel_.instructions.size());
  for (size_t k = 0; k < warp.groups.size(); ++k) {
    const Group& other = warp.groups[k];
    if (k != chosen && other.state != Group::kWaiting && other.pc > warp.groups[chosen].pc) {
      limit = std::min(limit, other.pc);
    }
  }
  const bool check = options_.undefined != 0;
  const bool alone = warp.groups.size() == 1;
  const uint32_t mask = warp.groups[chosen].mask;
  const uint32_t* const ids = kernel_.register_ids.data();
  uint32_t* const defined = warp.defined.data();
  uint32_t pc = warp.groups[chosen].pc;
  const auto leave = [&] { warp.groups[chosen].pc = pc; };
  do {
    pc_ = pc;
    if (pc >= kernel_.instructions.size()) {
      pc_ = static_cast<uint32_t>(kernel_.instructions.size() - 1);
      fail("the kernel runs past its last instruction");
    }
    const Instruction& instruction = kernel_.instructions[pc];
    if (++warp.executed > static_cast<uint64_t>(options_.budget)) {
      fail("endless loop: a warp ran more than %lld instructions (option budget)",
           static_cast<long long>(options_.budget));
    }
    --quantum;
    ++counters_.warp_instructions;
    uint32_t active = mask;
    if (instruction.guard != kNoGuard) {
      if (check && (defined[instruction.guard_id] & mask) != mask) {
        fail("uninitialised register: the guard %s has no value in lane %d",
             kernel_.register_names[instruction.guard_id].c_str(),
             __builtin_ctz(mask & ~defined[instruction.guard_id]));
      }
      const uint32_t guard = warp.predicates[instruction.guard];
      active &= instruction.guard_negated ? ~guard : guard;
      if (active == 0) {
        ++pc;
        continue;
      }
    }
    if (instruction.convergence != Convergence::kAny && active != kAllLanes) {
      leave();
      if (!converge(warp, warp.groups[chosen], active, instruction)) {
        --counters_.warp_instructions;
        return;
      }
    }
    ++counters_.by_class[static_cast<int>(instruction.instruction_class)];
    if (kernel_.uses_wgmma && !instruction.is_wgmma) check_wgmma_registers(warp, instruction);
    if (check) {
      uint32_t valid = kAllLanes;
      const uint32_t* reads = ids + instruction.first_read;
      for (int k = 0; k < instruction.reads; ++k) valid &= defined[reads[k]];
      if (instruction.definedness == Definedness::kStrict) {
        if (active & ~valid) check_defined(instruction, active);
        valid = kAllLanes;
      }
      if (instruction.definedness != Definedness::kHandler) {
        const uint32_t* writes = ids + instruction.first_write;
        for (int k = 0; k < instruction.writes; ++k) {
          uint32_t& place = defined[writes[k]];
          place = (place & ~active) | (valid & active);
        }
      }
    }
    if (instruction.control == Control::kNone) {
      instruction.execute(context_, instruction, active);
      ++pc;
      continue;
    }
    if (instruction.control == Control::kBranch && active == mask) {
      pc = instruction.target;
      if (alone) continue;
      leave();
      return;
    }
    leave();
    switch (instruction.control) {
      case Control::kExit:
        warp.live &= ~active;
        if (warp.live == 0 && kernel_.uses_wgmma) check_wgmmas_at_exit(block, warp);
        warp.groups[chosen].mask &= ~active;
        warp.groups[chosen].pc = pc + 1;
        if (warp.groups[chosen].mask == 0) {
          warp.groups.erase(warp.groups.begin() + static_cast<std::ptrdiff_t>(chosen));
        }
        complete_barriers(block);
        return;
      case Control::kBarrier:
        arrive(block, warp, warp.groups[chosen], instruction, active);
        return;
      default:
        branch(warp, chosen, active, instruction);
        return;
    }
  } while (pc < limit && quantum > 0);
  leave();
}

void Machine::branch(Warp& warp, size_t chosen, uint32_t taken, const Instruction& instruction) {
  const uint32_t next = warp.groups[chosen].pc + 1;
  const uint32_t rest = warp.groups[chosen].mask & ~taken;
  const auto add = [&](uint32_t pc, uint32_t lanes) {
    if (lanes != 0) warp.groups.push_back({pc, lanes});
  };
  warp.groups.erase(warp.groups.begin() + static_cast<std::ptrdiff_t>(chosen));
  add(next, rest);
  if (instruction.control == Control::kBranch) {
    add(instruction.target, taken);
    return;
  }
  const uint32_t* index = context_.source(instruction.a);
  for (uint32_t entry = 0; entry < instruction.immediate; ++entry) {
    uint32_t lanes = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((taken >> lane & 1) && index[lane] == entry) lanes |= 1u << lane;
    }
    add(kernel_.branch_targets[instruction.target + entry], lanes);
    taken &= ~lanes;
  }
  if (taken != 0) {
    fail("brx.idx: index %u of lane %d is beyond the %u targets", index[__builtin_ctz(taken)],
         __builtin_ctz(taken), instruction.immediate);
  }
}

void Machine::arrive(Block& block, Warp& warp, Group& group, const Instruction& instruction,
                     uint32_t active) {
  const int lane = __builtin_ctz(active);
  const uint32_t id = context_.source(instruction.a)[lane];
  if (id >= block.barriers.size()) fail("there are 16 barriers, got barrier %u", id);
  Barrier& barrier = block.barriers[id];
  uint32_t expected = 0;
  if (instruction.b.kind != Operand::kNone) {
    expected = context_.source(instruction.b)[lane];
    if (expected == 0 || expected % kLanes != 0) {
      fail("barrier: the number of threads must be a multiple of 32, got %u", expected);
    }
  }
  if (barrier.warps != 0 && barrier.expected != expected) {
    fail("barrier %u: %u threads expected here, %u by those that wait", id, expected,
         barrier.expected);
  }
  barrier.expected = expected;
  barrier.warps |= 1u << warp.index;
  // With a count, a warp counts as 32 whatever has exited; without, the live threads are counted.
  const bool aligned = instruction.convergence == Convergence::kLiveLanes;
  barrier.arrived += expected != 0 && aligned ? static_cast<uint32_t>(kLanes)
                                              : static_cast<uint32_t>(__builtin_popcount(active));
  const uint32_t next = group.pc + 1;
  const uint32_t rest = group.mask & ~active;
  if (instruction.immediate != 0) {  // bar.arrive does not wait
    group.pc = next;
  } else {
    group = {next, active, Group::kWaiting, static_cast<uint8_t>(id)};
    if (rest != 0) warp.groups.push_back({next, rest});
  }
  complete_barriers(block);
}

void Machine::complete_barriers(Block& block) {
  uint32_t live = 0;
  for (const Warp& warp : block.warps) live += static_cast<uint32_t>(__builtin_popcount(warp.live));
  for (size_t id = 0; id < block.barriers.size(); ++id) {
    Barrier& barrier = block.barriers[id];
    if (barrier.warps == 0 || barrier.arrived < (barrier.expected ? barrier.expected : live)) {
      continue;
    }
    if (barrier.expected != 0 && barrier.arrived > barrier.expected) {
      fail("barrier %zu: %u threads arrived, %u were expected", id, barrier.arrived,
           barrier.expected);
    }
    block.shared.barrier(barrier.warps);
    ++counters_.barriers;
    barrier = {};
    for (Warp& warp : block.warps) {
      for (Group& group : warp.groups) {
        if (group.state == Group::kWaiting && group.barrier == id) group.state = Group::kReady;
      }
    }
  }
}

void Machine::report_deadlock() const {
  for (const Block& block : blocks_) {
    if (!block.running) continue;
    std::string message = "deadlock: every warp waits at a barrier:";
    const Warp* first = nullptr;
    uint32_t pc = 0;
    for (const Warp& warp : block.warps) {
      for (const Group& group : warp.groups) {
        message += " warp " + std::to_string(warp.index) + " at barrier " +
                   std::to_string(group.barrier) + " (PTX line " +
                   std::to_string(kernel_.source[group.pc - 1].line) + ");";
        if (first == nullptr) {
          first = &warp;
          pc = group.pc - 1;
        }
      }
    }
    message.pop_back();
    throw Error(message + place(block, *first, pc));
  }
  fail("deadlock");
}

}  // namespace ptxsim
