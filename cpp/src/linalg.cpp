#include "linalg.h"

// Threads share tiles out; each call of Eigen is one thread's.
#define EIGEN_DONT_PARALLELIZE
#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <algorithm>
#include <vector>

#include "parallel.h"

namespace lowbitcore {

namespace {

// By rows, as the Hessian and U are stored.
using Matrix64 = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// Every sum has one order, whatever the number of threads: the matrix is cut the same way for all
// of them, and tiles are so small that Eigen does not cut their sums at a size of its own, which it
// takes from the caches (its solvers do from 120 with 32 KB of L1). Nor do they need scratch from
// the heap, so that the bodies of loops over tiles cannot throw.
constexpr int kTile = kFactorTile;

using Tile = Eigen::Matrix<double, kTile, kTile, Eigen::RowMajor>;

// Tiles of a factorization's front: so many rows or columns are done before what is behind them
// sees any. Then each tile there takes all their products while it is in the cache.
constexpr std::int64_t kFront = 4;

// What one thread does behind the front, kRowTiles by kColTiles: its left operands stay in L2.
constexpr std::int64_t kRowTiles = 4, kColTiles = 8;

// A lower triangular matrix as square tiles, and what multiplies them.
class Tiles {
 public:
  Tiles(Matrix64& matrix, const Backend& backend)
      : matrix_(matrix),
        backend_(backend),
        left_(static_cast<std::size_t>(kFront * count())),
        right_(left_.size()) {}

  std::int64_t count() const { return matrix_.rows() / kTile; }

  Eigen::Block<Matrix64, kTile, kTile> operator()(std::int64_t i, std::int64_t j) const {
    return matrix_.block<kTile, kTile>(i * kTile, j * kTile);
  }

  // Operands of products: copies, whose rows are close together.
  Tile& left(std::int64_t p, std::int64_t i) { return left_[index(p, i)].tile; }
  Tile& right(std::int64_t p, std::int64_t j) { return right_[index(p, j)].tile; }

  // (i, j) -= left(p, i) right(p, j)
  void subtract_product(std::int64_t i, std::int64_t j, std::int64_t p) {
    double* c = matrix_.data() + i * kTile * matrix_.cols() + j * kTile;
    backend_.subtract_product(left(p, i).data(), right(p, j).data(), c, matrix_.cols());
  }

  // The same for all p of [begin(j), end) of every wanted(i, j), i >= end.
  template <typename Wanted, typename Begin>
  void subtract_products(std::int64_t end, int threads, const Wanted& wanted, const Begin& begin) {
    const std::int64_t cols = divide_up(count(), kColTiles);
    parallel_for(divide_up(count() - end, kRowTiles) * cols, threads, [&](std::int64_t t, int) {
      const std::int64_t first_row = end + t / cols * kRowTiles, first_col = t % cols * kColTiles;
      for (std::int64_t j = first_col; j < std::min(first_col + kColTiles, count()); ++j) {
        for (std::int64_t i = first_row; i < std::min(first_row + kRowTiles, count()); ++i) {
          if (!wanted(i, j)) continue;
          for (std::int64_t p = begin(j); p < end; ++p) subtract_product(i, j, p);
        }
      }
    });
  }

 private:
  struct alignas(64) Copy {
    Tile tile;
  };

  static std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
  static std::size_t index(std::int64_t p, std::int64_t i) {
    return static_cast<std::size_t>(i * kFront + p % kFront);
  }

  Matrix64& matrix_;
  const Backend& backend_;
  std::vector<Copy> left_, right_;
};

// Overwrites the lower triangle of a matrix A with L, A = L L^T. False if A is not positive
// definite. What tiles of the diagonal get above it is read by nobody.
bool factor(Tiles& tiles, int threads) {
  const std::int64_t count = tiles.count();
  for (std::int64_t first = 0; first < count; first += kFront) {
    const std::int64_t end = std::min(first + kFront, count);
    for (std::int64_t p = first; p < end; ++p) {
      auto pivot = tiles(p, p);
      if (Eigen::LLT<Eigen::Ref<Matrix64>>(pivot).info() != Eigen::Success) return false;
      parallel_for(count - p - 1, threads, [&](std::int64_t t, int) {
        const std::int64_t i = p + 1 + t;
        auto tile = tiles(i, p);
        pivot.triangularView<Eigen::Lower>().transpose().solveInPlace<Eigen::OnTheRight>(tile);
        tiles.left(p, i) = tile;
        tiles.right(p, i) = tile.transpose();
      });
      parallel_for(count - p - 1, threads, [&](std::int64_t t, int) {
        const std::int64_t i = p + 1 + t;
        for (std::int64_t j = p + 1; j < std::min(i + 1, end); ++j) tiles.subtract_product(i, j, p);
      });
    }
    tiles.subtract_products(
        end, threads, [&](std::int64_t i, std::int64_t j) { return j >= end && j <= i; },
        [&](std::int64_t) { return first; });
  }
  return true;
}

// Overwrites a lower triangular matrix L with X = L^-1, from top to bottom. Row p of L X = I is
// L_pp X_pj = -sum over j <= i < p of L_pi X_ij: sums that gather in place of the tiles of L that
// no row still needs.
void invert(Tiles& tiles, int threads) {
  const std::int64_t count = tiles.count();
  for (std::int64_t first = 0; first < count; first += kFront) {
    const std::int64_t end = std::min(first + kFront, count);
    for (std::int64_t p = first; p < end; ++p) {
      const auto pivot = tiles(p, p).triangularView<Eigen::Lower>();
      parallel_for(p, threads, [&](std::int64_t j, int) {
        auto tile = tiles(p, j);
        pivot.solveInPlace(tile);
        tiles.right(p, j) = tile;
      });
      parallel_for(count - p - 1, threads, [&](std::int64_t t, int) {
        auto tile = tiles(p + 1 + t, p);
        tiles.left(p, p + 1 + t) = tile;
        pivot.solveInPlace<Eigen::OnTheRight>(tile);
        tile = -tile;
      });
      parallel_for((end - p - 1) * p, threads,
                   [&](std::int64_t t, int) { tiles.subtract_product(p + 1 + t / p, t % p, p); });
    }
    tiles.subtract_products(
        end, threads, [&](std::int64_t, std::int64_t j) { return j < end; },
        [&](std::int64_t j) { return std::max(first, j + 1); });
  }
  parallel_for(tiles.count(), threads, [&](std::int64_t p, int) {
    auto pivot = tiles(p, p);
    Tile& inverse = tiles.left(0, p);
    inverse.setIdentity();
    pivot.triangularView<Eigen::Lower>().solveInPlace(inverse);
    pivot.triangularView<Eigen::Lower>() = inverse;
  });
}

}  // namespace

bool inverse_factor(View<const float> hessian, const std::int32_t* order, const std::uint8_t* dead,
                    const Damping& damping, View<float> u, const Backend& backend, int threads) {
  const std::int64_t k = hessian.rows;
  // H = R R^T with R upper triangular is an ordinary Cholesky factorisation read backwards: reverse
  // rows and columns, factor L L^T, reverse again. Whole tiles: what is missing is the identity.
  const std::int64_t padded = (k + kTile - 1) / kTile * kTile;
  Matrix64 l(padded, padded);
  parallel_for(padded, threads, [&](std::int64_t i, int) {
    const std::int64_t tile_end = (i / kTile + 1) * kTile;
    for (std::int64_t j = 0; j < tile_end; ++j) {
      l(i, j) = 0.0;
      if (i >= k || j > i) continue;
      const std::int64_t row = order[k - 1 - i], column = order[k - 1 - j];
      if (dead[row] || dead[column]) continue;
      l(i, j) = static_cast<double>(hessian.data[row * hessian.stride + column]);
    }
    if (i >= k) {
      l(i, i) = 1.0;
    } else {
      l(i, i) = (dead[order[k - 1 - i]] ? damping.dead : l(i, i)) + damping.added;
    }
  });
  Tiles tiles(l, backend);
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
