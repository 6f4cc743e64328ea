// What round-to-nearest and GPTQ share above the backend.
#pragma once

#include <lowbitcore/types.h>

namespace lowbitcore {

// Scales are stored in fp16: a group whose scale overflowed to infinity is the caller's error.
void check_scales_fit(const char* op, const View<float>& scales, const Execution& exec);

}  // namespace lowbitcore
