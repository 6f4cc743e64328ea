// AVX-512 F, BW, VL, DQ.

#include "isa.h"
#include "vec_avx512.h"

namespace lowbitcore {
namespace {

constexpr int kDirectRows = 16;

}  // namespace
}  // namespace lowbitcore

#include "kernels_impl.h"

namespace lowbitcore {

const Backend& avx512_backend() {
  static constexpr Backend backend = make_backend("avx512");
  return backend;
}

}  // namespace lowbitcore
