// Dense linear algebra in double precision: by tiles, in which Eigen solves and a level multiplies.
#pragma once

#include "backend.h"

namespace lowbitcore {

struct Damping {
  double dead;   // in place of what a dead column has on the diagonal
  double added;  // to the whole diagonal
};

// u [K,K] := the upper triangular U with (H + damping)^-1 = U^T U, where H is `hessian` with rows
// and columns taken in `order`, those of dead columns zero. Returns false where the damped matrix
// is not positive definite; u is then unspecified. The result depends neither on the number of
// threads nor on the backend's level.
bool inverse_factor(View<const float> hessian, const std::int32_t* order, const std::uint8_t* dead,
                    const Damping& damping, View<float> u, const Backend& backend, int threads);

}  // namespace lowbitcore
