// The CUDA backend of a build without CUDA.
#include <lowbitcore/runtime.h>

#include "../cpp/src/backend.h"

namespace lowbitcore {

namespace {

[[noreturn]] void fail() {
  throw Error("this build of lowbitcore has no CUDA backend (configure with LOWBITCORE_CUDA=ON)");
}

}  // namespace

const Backend& cuda_backend() { fail(); }
const Memory& cuda_memory() { fail(); }

std::string cuda_status() { return "not built (configure with LOWBITCORE_CUDA=ON and nvcc)"; }

std::string cuda_why_not(int) { return cuda_status(); }

bool cuda_has_wgmma() { return false; }

}  // namespace lowbitcore
