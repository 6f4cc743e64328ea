// The PTX within what nvcc embeds in an object file.
#pragma once

#include <cstdint>
#include <string_view>

namespace ptxsim {

struct PtxImage {
  uint32_t architecture;  // 80 for sm_80
  std::string_view text;
};

// The PTX for the highest architecture up to `compute_capability`. That of sm_90a and its like is
// for this architecture alone.
PtxImage ptx_of_fatbin(const void* wrapper, int compute_capability);

}  // namespace ptxsim
