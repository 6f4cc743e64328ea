// Dense linear algebra in double precision, over Eigen.
#pragma once

#include <lowbitcore/types.h>

namespace lowbitcore {

// u [K,K] := the upper triangular U with (H + damping I)^-1 = U^T U, where H is `hessian` with rows
// and columns taken in `order`, and dead columns replaced by `mean` on the diagonal. Returns false
// where the damped matrix is not positive definite; u is then unspecified. The result does not
// depend on the number of threads.
bool inverse_factor(View<const float> hessian, const std::int32_t* order, const std::uint8_t* dead,
                    double mean, double damping, View<float> u, int threads);

}  // namespace lowbitcore
