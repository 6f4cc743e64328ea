// What any processor runs.

#include "isa.h"
#include "vec_scalar.h"

namespace lowbitcore {
namespace {

constexpr int kDirectRows = 4;

}  // namespace
}  // namespace lowbitcore

#include "kernels_impl.h"

namespace lowbitcore {

const Backend& scalar_backend() {
  static constexpr Backend backend = make_backend("scalar");
  return backend;
}

}  // namespace lowbitcore
