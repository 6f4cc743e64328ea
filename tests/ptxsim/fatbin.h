// The PTX within what nvcc embeds in an object file.
#pragma once

#include <string>

namespace ptxsim {

// The PTX for the highest architecture up to `compute_capability` (80 for sm_80).
std::string ptx_of_fatbin(const void* wrapper, int compute_capability);

}  // namespace ptxsim
