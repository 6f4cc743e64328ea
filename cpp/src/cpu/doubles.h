// Products in double precision, for the factorization of Hessians.
#pragma once

#include "common.h"

namespace lowbitcore {
namespace {

constexpr int kDoubleVecs = 3;  // of each row: kDoubleRows x 3 accumulators, 3 of b and 1 of a
constexpr int kDoubleCols = kDoubleVecs * kDoubleWidth;
static_assert(kFactorTile % kDoubleRows == 0 && kFactorTile % kDoubleCols == 0, "register tile");

// c -= a b of whole tiles. Each sum is one fused chain in rising order, so that all levels agree to
// the last bit.
void subtract_product(const double* a, const double* b, double* c, int64_t stride) {
  for (int64_t col = 0; col < kFactorTile; col += kDoubleCols) {
    for (int64_t row = 0; row < kFactorTile; row += kDoubleRows) {
      const double* rows = a + row * kFactorTile;
      double* out = c + row * stride + col;
      VecD sums[kDoubleRows][kDoubleVecs];
      for (int r = 0; r < kDoubleRows; ++r) {
        for (int v = 0; v < kDoubleVecs; ++v) {
          sums[r][v] = VecD::load(out + r * stride + v * kDoubleWidth);
        }
      }
      for (int64_t k = 0; k < kFactorTile; ++k) {
        VecD terms[kDoubleVecs];
        for (int v = 0; v < kDoubleVecs; ++v) {
          terms[v] = VecD::load(b + k * kFactorTile + col + v * kDoubleWidth);
        }
        for (int r = 0; r < kDoubleRows; ++r) {
          const VecD factor = VecD::broadcast(rows[r * kFactorTile + k]);
          for (int v = 0; v < kDoubleVecs; ++v) {
            sums[r][v] = fnmadd(factor, terms[v], sums[r][v]);
          }
        }
      }
      for (int r = 0; r < kDoubleRows; ++r) {
        for (int v = 0; v < kDoubleVecs; ++v) {
          sums[r][v].store(out + r * stride + v * kDoubleWidth);
        }
      }
    }
  }
}

}  // namespace
}  // namespace lowbitcore
