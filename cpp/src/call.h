// A call on its way to a backend: what it may use, and the end of that.
#pragma once

#include <string>

#include "backend.h"
#include "check.h"
#include "parallel.h"

namespace lowbitcore {

// The backend of a call; Error where it lacks the kernel.
template <typename Kernel>
const Backend& backend_with(const char* op, const Execution& exec, Kernel* Backend::* kernel) {
  const Backend& backend = backend_of(exec);
  if (backend.*kernel == nullptr) {
    throw Error(std::string(op) + ": " + backend.name + " has no kernel for it");
  }
  return backend;
}

// Threads, stream and `bytes` of scratch of a call: what the host brought, if it is large enough,
// else memory that is the call's until this goes.
class Call {
 public:
  // Scratch for as many threads as the call then uses: to ask for their number again could give
  // another one, which somebody has set in between.
  Call(const char* op, const Execution& exec, int threads, std::size_t bytes)
      : memory_(memory_of(exec)), use_{threads, exec.workspace, exec.stream} {
    constexpr std::size_t kAlignment = 64;
    if (exec.workspace == nullptr) {
      if (bytes > 0) use_.workspace = owned_ = memory_.allocate(bytes, exec.stream);
      return;
    }
    if (exec.workspace_bytes < bytes) {
      check::fail(op, "workspace_bytes", "at least " + std::to_string(bytes),
                  std::to_string(exec.workspace_bytes));
    }
    if (reinterpret_cast<std::uintptr_t>(exec.workspace) % kAlignment != 0) {
      check::fail(op, "workspace", "an address aligned to 64 bytes", "one that is not");
    }
  }
  Call(const char* op, const Execution& exec) : Call(op, exec, resolve_threads(exec), 0) {}
  ~Call() {
    if (owned_ != nullptr) memory_.release(owned_, use_.stream);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  operator const Resources&() const { return use_; }
  void* workspace() const { return use_.workspace; }

 private:
  const Memory& memory_;
  Resources use_;
  void* owned_ = nullptr;
};

}  // namespace lowbitcore
