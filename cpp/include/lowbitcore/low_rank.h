// Low-rank adapters of a linear (LoRA, Hu et al., arXiv 2106.09685), whatever that is made of:
//
//   sum = y + scaling (x A^T) B^T
//
// and the gradients of it. Products and sums are fp32, results are rounded once, and do not depend
// on the number of threads. On the CPU; elsewhere Error.
#pragma once

#include <lowbitcore/types.h>

namespace lowbitcore {

struct LowRank {
  View<const float> a;  // [rank, K], K a multiple of 32
  View<const float> b;  // [N, rank], N a multiple of 32
  float scaling = 1.0f;
};

// x [M,K], y and sum [M,N], all of one type; sum may be y. low [M, rank] becomes scaling x A^T,
// which the backward takes.
void add_low_rank(ConstMatrix y, ConstMatrix x, const LowRank& adapter, View<float> low, Matrix sum,
                  const Execution& exec = {});
std::size_t add_low_rank_workspace_size(std::int64_t rows, std::int64_t in_features,
                                        std::int64_t out_features, std::int64_t rank,
                                        const Execution& exec = {});

// Those without data are not computed.
struct LowRankGrads {
  Matrix dx;       // [M,K], of the type of dy; in memory of its own
  View<float> da;  // [rank, K]; for this alone x is read
  View<float> db;  // [N, rank]; for this alone low is read
};

// From dy [M,N], the gradient of sum.
void add_low_rank_backward(ConstMatrix dy, ConstMatrix x, View<const float> low,
                           const LowRank& adapter, const LowRankGrads& grads,
                           const Execution& exec = {});
std::size_t add_low_rank_backward_workspace_size(std::int64_t rows, std::int64_t in_features,
                                                 std::int64_t out_features, std::int64_t rank,
                                                 const Execution& exec = {});

}  // namespace lowbitcore
