// Dense linear algebra, over Eigen; double precision, one thread, so that the factor is the same
// everywhere.
#pragma once

#include <lowbitcore/types.h>

namespace lowbitcore {

// u [K,K] := the upper triangular U with (H + damping I)^-1 = U^T U, where H is `hessian` with rows
// and columns taken in `order`, and dead columns replaced by `mean` on the diagonal. Returns false
// where the damped matrix is not positive definite; u is then unspecified.
bool inverse_factor(View<const float> hessian, const std::int32_t* order, const std::uint8_t* dead,
                    double mean, double damping, View<float> u);

}  // namespace lowbitcore
