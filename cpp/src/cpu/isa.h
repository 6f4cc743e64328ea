// The registry of instruction-set levels, slowest first.
#pragma once

#include "../backend.h"

namespace lowbitcore {

// One per translation unit kernels_*.cpp: the only symbol it exports.
const Backend& scalar_backend();
const Backend& avx2_backend();
const Backend& avx512_backend();
const Backend& avx512_bf16_backend();
const Backend& amx_backend();
const Backend& amx_emulated_backend();  // test builds only

}  // namespace lowbitcore
