#include "linalg.h"

#include <Eigen/Cholesky>
#include <Eigen/Core>

namespace lowbitcore {

namespace {

using Matrix64 = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic>;

// Inverts a lower triangular matrix in place by halves:
// [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1, C^-1]. A third of the work of solving against the
// identity.
void invert_lower(Eigen::Ref<Matrix64> l) {
  const Eigen::Index n = l.rows();
  constexpr Eigen::Index kLeaf = 48;
  if (n <= kLeaf) {
    Matrix64 inverse = Matrix64::Identity(n, n);
    l.triangularView<Eigen::Lower>().solveInPlace(inverse);
    l.triangularView<Eigen::Lower>() = inverse;
    return;
  }
  const Eigen::Index half = n / 2, rest = n - half;
  auto a = l.topLeftCorner(half, half);
  auto b = l.bottomLeftCorner(rest, half);
  auto c = l.bottomRightCorner(rest, rest);
  c.triangularView<Eigen::Lower>().solveInPlace(b);
  a.triangularView<Eigen::Lower>().solveInPlace<Eigen::OnTheRight>(b);
  b = -b;
  invert_lower(a);
  invert_lower(c);
}

}  // namespace

bool inverse_factor(View<const float> hessian, const std::int32_t* order, const std::uint8_t* dead,
                    double mean, double damping, View<float> u) {
  const std::int64_t k = hessian.rows;
  // H = R R^T with R upper triangular is an ordinary Cholesky factorisation read backwards: reverse
  // rows and columns, factor L L^T, reverse again.
  Matrix64 l(k, k);
  for (std::int64_t j = 0; j < k; ++j) {
    const std::int64_t column = order[k - 1 - j];
    for (std::int64_t i = j; i < k; ++i) {
      const std::int64_t row = order[k - 1 - i];
      l(i, j) = dead[row] || dead[column]
                    ? 0.0
                    : static_cast<double>(hessian.data[row * hessian.stride + column]);
    }
    l(j, j) = (dead[column] ? mean : l(j, j)) + damping;
  }
  Eigen::LLT<Eigen::Ref<Matrix64>, Eigen::Lower> factor(l);
  if (factor.info() != Eigen::Success) return false;
  invert_lower(l);
  for (std::int64_t i = 0; i < k; ++i) {
    for (std::int64_t j = 0; j < k; ++j) {
      u.data[i * u.stride + j] = j < i ? 0.0f : static_cast<float>(l(k - 1 - i, k - 1 - j));
    }
  }
  return true;
}

}  // namespace lowbitcore
