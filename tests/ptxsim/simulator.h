// The one simulator of a loaded shared object: modules, memory, options, launches and their log.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernel.h"
#include "machine.h"
#include "memory.h"
#include "ptx.h"

namespace ptxsim {

class Simulator {
 public:
  static Simulator& get();

  std::recursive_mutex mutex;  // held by every call from outside
  GlobalMemory memory;
  Options options;
  std::string error;

  const Module& load(std::string ptx);
  void unload(const Module& module);
  std::vector<std::string> kernel_names() const;

  // The kernel of this name in `module`, or in the module loaded last that has one.
  const Kernel& kernel(const std::string& name, const Module* module = nullptr);
  void launch(const Kernel& kernel, const Launch& launch, uint32_t parameter_bytes);

  void set_option(const std::string& name, int64_t value);
  int64_t get_option(const std::string& name);

  std::string log_json() const;
  void clear_log() { log_.clear(); }

 private:
  struct LogEntry {
    std::string kernel;
    Launch launch;
    uint32_t static_shared;
    Counters counters;
  };
  int64_t& option(const std::string& name);

  std::list<Module> modules_;
  std::map<std::pair<const Module*, std::string>, Kernel> decoded_;
  std::vector<LogEntry> log_;
};

}  // namespace ptxsim
