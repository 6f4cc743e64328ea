// The CUDA backend of a build without CUDA.
#include <lowbitcore/runtime.h>

namespace lowbitcore {

std::string cuda_status() { return "not built (configure with LOWBITCORE_CUDA=ON and nvcc)"; }

}  // namespace lowbitcore
