#include "capi.h"

#include <exception>
#include <mutex>
#include <string>

#include "simulator.h"

using ptxsim::Launch;
using ptxsim::Origin;
using ptxsim::Simulator;

namespace {

std::string answer;  // what the last call that returned a string points to

uint64_t address_of(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

// Runs `body` with the simulator locked; 1 and the message if it throws.
template <class Body>
int guarded(Body body) {
  Simulator& simulator = Simulator::get();
  const std::lock_guard<std::recursive_mutex> lock(simulator.mutex);
  try {
    body(simulator);
    return 0;
  } catch (const std::exception& error) {
    simulator.error = error.what();
    return 1;
  }
}

}  // namespace

extern "C" {

int ptxsim_load(const char* ptx) {
  return guarded([&](Simulator& simulator) { simulator.load(ptx); });
}

const char* ptxsim_error(void) { return Simulator::get().error.c_str(); }

const char* ptxsim_kernels(void) {
  guarded([](Simulator& simulator) {
    answer.clear();
    for (const std::string& name : simulator.kernel_names()) answer += name + "\n";
  });
  return answer.c_str();
}

const char* ptxsim_parameters(const char* kernel) {
  const int failed = guarded([&](Simulator& simulator) {
    answer.clear();
    for (const ptxsim::Parameter& parameter : simulator.kernel(kernel).parameters) {
      answer += std::to_string(parameter.offset) + " " + std::to_string(parameter.bytes) + "\n";
    }
  });
  return failed ? nullptr : answer.c_str();
}

void ptxsim_add_region(const void* pointer, uint64_t bytes) {
  guarded([&](Simulator& simulator) {
    simulator.memory.add(address_of(pointer), bytes, Origin::kUser);
  });
}

void ptxsim_remove_region(const void* pointer) {
  guarded(
      [&](Simulator& simulator) { simulator.memory.remove(address_of(pointer), Origin::kUser); });
}

void ptxsim_clear_regions(void) {
  guarded([](Simulator& simulator) { simulator.memory.clear_user(); });
}

uint64_t ptxsim_allocated_bytes(void) {
  uint64_t bytes = 0;
  guarded([&](Simulator& simulator) { bytes = simulator.memory.bytes(Origin::kAllocation); });
  return bytes;
}

int ptxsim_set_option(const char* name, int64_t value) {
  return guarded([&](Simulator& simulator) { simulator.set_option(name, value); });
}

int64_t ptxsim_get_option(const char* name) {
  int64_t value = -1;
  guarded([&](Simulator& simulator) { value = simulator.get_option(name); });
  return value;
}

int ptxsim_launch(const char* kernel, const uint32_t grid[3], const uint32_t block[3],
                  uint32_t dynamic_shared, const void* parameters, uint32_t bytes) {
  return guarded([&](Simulator& simulator) {
    const Launch launch = {{grid[0], grid[1], grid[2]},
                           {block[0], block[1], block[2]},
                           dynamic_shared,
                           static_cast<const uint8_t*>(parameters)};
    simulator.launch(simulator.kernel(kernel), launch, bytes);
  });
}

const char* ptxsim_log_json(void) {
  guarded([](Simulator& simulator) { answer = simulator.log_json(); });
  return answer.c_str();
}

void ptxsim_clear_log(void) {
  guarded([](Simulator& simulator) { simulator.clear_log(); });
}

}  // extern "C"
