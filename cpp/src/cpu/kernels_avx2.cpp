// AVX2 with FMA and F16C.

#include "digits_avx2.h"
#include "isa.h"

namespace lowbitcore {
namespace {

constexpr int kDirectRows = 8;
constexpr int kDigitRows = 4;

}  // namespace
}  // namespace lowbitcore

#include "kernels_impl.h"

namespace lowbitcore {

const Backend& avx2_backend() {
  static constexpr Backend backend = make_backend("avx2");
  return backend;
}

}  // namespace lowbitcore
