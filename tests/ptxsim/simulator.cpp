#include "simulator.h"

#include <algorithm>

namespace ptxsim {

Simulator& Simulator::get() {
  static Simulator simulator;
  return simulator;
}

const Module& Simulator::load(std::string ptx) {
  modules_.emplace_back(std::move(ptx));
  const Module& module = modules_.back();
  for (const auto& [name, bytes] : module.storage) {
    memory.add(reinterpret_cast<uint64_t>(bytes.get()), module.variables.find(name)->second.bytes,
               Origin::kModule);
  }
  return module;
}

void Simulator::unload(const Module& module) {
  for (const auto& [name, bytes] : module.storage) {
    memory.remove(reinterpret_cast<uint64_t>(bytes.get()), Origin::kModule);
  }
  for (auto entry = decoded_.begin(); entry != decoded_.end();) {
    entry = entry->first.first == &module ? decoded_.erase(entry) : std::next(entry);
  }
  modules_.remove_if([&](const Module& other) { return &other == &module; });
}

std::vector<std::string> Simulator::kernel_names() const {
  std::vector<std::string> names;
  for (const Module& module : modules_) {
    for (const KernelText& kernel : module.kernels) names.push_back(kernel.name);
  }
  return names;
}

const Kernel& Simulator::kernel(const std::string& name, const Module* module) {
  for (auto candidate = modules_.rbegin(); candidate != modules_.rend(); ++candidate) {
    if (module != nullptr && &*candidate != module) continue;
    for (const KernelText& text : candidate->kernels) {
      if (text.name != name) continue;
      const auto key = std::make_pair(static_cast<const Module*>(&*candidate), name);
      const auto found = decoded_.find(key);
      if (found != decoded_.end()) return found->second;
      return decoded_.emplace(key, decode_kernel(*candidate, text)).first->second;
    }
  }
  fail("no kernel '%s'", name.c_str());
}

namespace {

void check_launch(const Kernel& kernel, const Launch& launch, uint32_t parameter_bytes,
                  const Options& options) {
  const char* name = kernel.name.c_str();
  if (parameter_bytes != kernel.parameter_bytes) {
    fail("%s: wrong size of parameters: expected %u bytes, got %u", name, kernel.parameter_bytes,
         parameter_bytes);
  }
  const auto& grid = launch.grid;
  const auto& block = launch.block;
  if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[0] > 0x7fffffffu || grid[1] > 65535 ||
      grid[2] > 65535) {
    fail("%s: invalid grid (%u, %u, %u)", name, grid[0], grid[1], grid[2]);
  }
  const uint64_t threads = static_cast<uint64_t>(block[0]) * block[1] * block[2];
  if (threads == 0 || block[0] > 1024 || block[1] > 1024 || block[2] > 64 || threads > 1024) {
    fail("%s: invalid block (%u, %u, %u)", name, block[0], block[1], block[2]);
  }
  if (threads > kernel.max_threads) {
    fail("%s: a block of %llu threads, but .maxntid is %u", name,
         static_cast<unsigned long long>(threads), kernel.max_threads);
  }
  const uint64_t shared =
      static_cast<uint64_t>(kernel.dynamic_shared_offset) + launch.dynamic_shared;
  if (shared > static_cast<uint64_t>(options.max_dynamic_shared)) {
    fail(
        "%s: too much shared memory: %llu bytes (%u static, %u dynamic), the device has %lld a "
        "block",
        name, static_cast<unsigned long long>(shared), kernel.static_shared, launch.dynamic_shared,
        static_cast<long long>(options.max_dynamic_shared));
  }
}

}  // namespace

void Simulator::launch(const Kernel& kernel, const Launch& launch, uint32_t parameter_bytes) {
  check_launch(kernel, launch, parameter_bytes, options);
  memory.begin_launch();
  Counters counters;
  Machine(kernel, launch, options, memory, counters).run();
  counters.dram_read_sectors = memory.distinct_sectors(GlobalMemory::Direction::kRead);
  counters.dram_write_sectors = memory.distinct_sectors(GlobalMemory::Direction::kWrite);
  log_.push_back({kernel.name, launch, kernel.static_shared, counters});
}

int64_t& Simulator::option(const std::string& name) {
  const std::map<std::string, int64_t*> known = {
      {"seed", &options.seed},
      {"quantum", &options.quantum},
      {"resident", &options.resident},
      {"races", &options.races},
      {"undefined", &options.undefined},
      {"budget", &options.budget},
      {"trace_sectors", &options.trace_sectors},
      {"sms", &options.sms},
      {"max_dynamic_shared", &options.max_dynamic_shared},
      {"compute_capability", &options.compute_capability},
  };
  const auto found = known.find(name);
  if (found == known.end()) fail("no option '%s'", name.c_str());
  return *found->second;
}

void Simulator::set_option(const std::string& name, int64_t value) {
  int64_t& place = option(name);
  const bool may_be_zero = name == "seed" || name == "undefined" || name == "trace_sectors";
  if (value < (may_be_zero ? 0 : 1) || (name == "races" && value > 2)) {
    fail("option %s: %lld is out of range", name.c_str(), static_cast<long long>(value));
  }
  place = value;
}

int64_t Simulator::get_option(const std::string& name) { return option(name); }

std::string Simulator::log_json() const {
  const auto triple = [](const std::array<uint32_t, 3>& values) {
    return "[" + std::to_string(values[0]) + ", " + std::to_string(values[1]) + ", " +
           std::to_string(values[2]) + "]";
  };
  std::string json = "[";
  for (const LogEntry& entry : log_) {
    if (json.size() > 1) json += ",\n ";
    json += "{\"kernel\": \"" + entry.kernel + "\", \"grid\": " + triple(entry.launch.grid) +
            ", \"block\": " + triple(entry.launch.block) +
            ", \"dynamic_shared\": " + std::to_string(entry.launch.dynamic_shared) +
            ", \"static_shared\": " + std::to_string(entry.static_shared) + ", \"counters\": {";
    const char* separator = "";
    const auto add = [&](const char* name, uint64_t value) {
      json += std::string(separator) + "\"" + name + "\": " + std::to_string(value);
      separator = ", ";
    };
#define PTXSIM_ADD(name) add(#name, entry.counters.name);
    PTXSIM_COUNTERS(PTXSIM_ADD)
#undef PTXSIM_ADD
#define PTXSIM_ADD(name) \
  add("class_" #name, entry.counters.by_class[static_cast<int>(InstructionClass::k_##name)]);
    PTXSIM_INSTRUCTION_CLASSES(PTXSIM_ADD)
#undef PTXSIM_ADD
    json += "}}";
  }
  return json + "]";
}

}  // namespace ptxsim
