// AMX tiles of bf16, with AVX-512 and its BF16 for everything else.

#include "digits_avx512.h"
#include "isa.h"
#include "tiles_amx.h"

namespace lowbitcore {
namespace {

constexpr int kDirectRows = 16;
constexpr int kDirectTileRows = 4;
constexpr int kDigitRows = 4;
constexpr bool kDirectPairs = false;  // one takes as long as four fp32 products of as many lanes

}  // namespace
}  // namespace lowbitcore

#include "kernels_impl.h"

namespace lowbitcore {

#ifdef LOWBITCORE_EMULATED_TILES
const Backend& amx_emulated_backend() {
  static constexpr Backend backend = make_backend("amx_emulated");
  return backend;
}
#else
const Backend& amx_backend() {
  static constexpr Backend backend = make_backend("amx");
  return backend;
}
#endif

}  // namespace lowbitcore
