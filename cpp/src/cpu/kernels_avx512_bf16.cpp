// AVX-512 with BF16.

#include "digits_avx512.h"
#include "isa.h"
#include "pairs_avx512.h"

namespace lowbitcore {
namespace {

constexpr int kDirectRows = 24;
constexpr int kDigitRows = 1;
constexpr bool kDirectPairs = true;

}  // namespace
}  // namespace lowbitcore

#include "kernels_impl.h"

namespace lowbitcore {

const Backend& avx512_bf16_backend() {
  static constexpr Backend backend = make_backend("avx512_bf16");
  return backend;
}

}  // namespace lowbitcore
