#include "linalg.h"

// Threads share tiles out; each product of Eigen is one thread's.
#define EIGEN_DONT_PARALLELIZE
#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <algorithm>

#include "parallel.h"

namespace lowbitcore {

namespace {

// By rows, as the Hessian and U are stored.
using Matrix64 = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// Every sum has one order, whatever the number of threads: the matrix is cut the same way for all
// of them, and tiles are so small that Eigen does not cut their sums at a size of its own, which it
// takes from the caches (its solvers do from 120 with 32 KB of L1). Nor do they need scratch from
// the heap, so that the bodies of loops over tiles cannot throw.
constexpr int kTile = 96;

using Tile = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor, kTile, kTile>;

// A lower triangular matrix as square tiles; those of the last row may be smaller.
class Tiles {
 public:
  explicit Tiles(Matrix64& matrix) : matrix_(matrix) {}

  std::int64_t count() const { return (matrix_.rows() + kTile - 1) / kTile; }

  Eigen::Block<Matrix64> operator()(std::int64_t i, std::int64_t j) const {
    return matrix_.block(i * kTile, j * kTile, size(i), size(j));
  }

 private:
  std::int64_t size(std::int64_t i) const {
    return std::min<std::int64_t>(kTile, matrix_.rows() - i * kTile);
  }

  Matrix64& matrix_;
};

// Overwrites the lower triangle of a matrix A with L, A = L L^T. False if A is not positive
// definite.
bool factor(const Tiles& tiles, int threads) {
  for (std::int64_t p = 0; p < tiles.count(); ++p) {
    Eigen::Block<Matrix64> pivot = tiles(p, p);
    if (Eigen::LLT<Eigen::Ref<Matrix64>>(pivot).info() != Eigen::Success) return false;
    const std::int64_t below = tiles.count() - p - 1;
    parallel_for(below, threads, [&](std::int64_t t, int) {
      auto tile = tiles(p + 1 + t, p);
      pivot.triangularView<Eigen::Lower>().transpose().solveInPlace<Eigen::OnTheRight>(tile);
    });
    parallel_for(below * below, threads, [&](std::int64_t t, int) {
      const std::int64_t i = p + 1 + t / below, j = p + 1 + t % below;
      if (j < i) {
        tiles(i, j).noalias() -= tiles(i, p) * tiles(j, p).transpose();
      } else if (j == i) {
        tiles(i, i).triangularView<Eigen::Lower>() -= tiles(i, p) * tiles(i, p).transpose();
      }
    });
  }
  return true;
}

// Overwrites a lower triangular matrix L with X = L^-1, from top to bottom. Row p of L X = I is
// L_pp X_pj = -sum over j <= i < p of L_pi X_ij: sums that gather in place of the tiles of L that
// no row still needs.
void invert(const Tiles& tiles, int threads) {
  for (std::int64_t p = 0; p < tiles.count(); ++p) {
    const auto pivot = tiles(p, p).triangularView<Eigen::Lower>();
    parallel_for(p, threads, [&](std::int64_t j, int) {
      auto tile = tiles(p, j);
      pivot.solveInPlace(tile);
    });
    const std::int64_t below = tiles.count() - p - 1;
    parallel_for(below * p, threads, [&](std::int64_t t, int) {
      const std::int64_t i = p + 1 + t / p, j = t % p;
      tiles(i, j).noalias() -= tiles(i, p) * tiles(p, j);
    });
    parallel_for(below, threads, [&](std::int64_t t, int) {
      auto tile = tiles(p + 1 + t, p);
      pivot.solveInPlace<Eigen::OnTheRight>(tile);
      tile = -tile;
    });
  }
  parallel_for(tiles.count(), threads, [&](std::int64_t p, int) {
    auto pivot = tiles(p, p);
    Tile inverse = Tile::Identity(pivot.rows(), pivot.rows());
    pivot.triangularView<Eigen::Lower>().solveInPlace(inverse);
    pivot.triangularView<Eigen::Lower>() = inverse;
  });
}

}  // namespace

bool inverse_factor(View<const float> hessian, const std::int32_t* order, const std::uint8_t* dead,
                    double mean, double damping, View<float> u, int threads) {
  const std::int64_t k = hessian.rows;
  // H = R R^T with R upper triangular is an ordinary Cholesky factorisation read backwards: reverse
  // rows and columns, factor L L^T, reverse again.
  Matrix64 l(k, k);
  parallel_for(k, threads, [&](std::int64_t i, int) {
    const std::int64_t row = order[k - 1 - i];
    for (std::int64_t j = 0; j <= i; ++j) {
      const std::int64_t column = order[k - 1 - j];
      l(i, j) = dead[row] || dead[column]
                    ? 0.0
                    : static_cast<double>(hessian.data[row * hessian.stride + column]);
    }
    l(i, i) = (dead[row] ? mean : l(i, i)) + damping;
  });
  const Tiles tiles(l);
  if (!factor(tiles, threads)) return false;
  invert(tiles, threads);
  parallel_for(k, threads, [&](std::int64_t i, int) {
    for (std::int64_t j = 0; j < k; ++j) {
      u.data[i * u.stride + j] = j < i ? 0.0f : static_cast<float>(l(k - 1 - i, k - 1 - j));
    }
  });
  return true;
}

}  // namespace lowbitcore
