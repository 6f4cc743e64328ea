// Products with dense weights, such as a head's, for processors that have instructions for fp32
// alone: where weights and activations are of 16 bits, they become fp32 a piece at a time, and no
// copy of a weight is made.
//
// Products and sums are fp32, results are rounded once, and do not depend on the number of threads.
// On the CPU; elsewhere Error.
#pragma once

#include <lowbitcore/types.h>

namespace lowbitcore {

// Activations and weight [N,K] are of one type, K a multiple of 32, N any number above 0; bias may
// be null.
//
// y [M,N] = x [M,K] W^T + bias [N]
void gemm_nt(ConstMatrix x, ConstMatrix weight, const float* bias, Matrix y,
             const Execution& exec = {});

// y [M,K] = x [M,N] W + bias [K]
void gemm_nn(ConstMatrix x, ConstMatrix weight, const float* bias, Matrix y,
             const Execution& exec = {});

// Of calls with so many rows, and K columns of the weight.
std::size_t gemm_nt_workspace_size(std::int64_t rows, std::int64_t cols,
                                   const Execution& exec = {});
std::size_t gemm_nn_workspace_size(std::int64_t rows, std::int64_t cols,
                                   const Execution& exec = {});

}  // namespace lowbitcore
