// Activations in another order of columns, for weights that were packed in another order of inputs:
// where the groups of a g_idx all have their whole size, packing them one after another leaves a
// plain weight, and permuting activations costs less than looking up a group for each integer.
#pragma once

#include <lowbitcore/format.h>
#include <lowbitcore/types.h>

namespace lowbitcore {

// y [M,K]: y[m, k] = x[m, order[k]], for order [K] with entries in [0, K). x and y share their type
// and no memory. On the CPU.
void permute_columns(ConstMatrix x, const std::int32_t* order, Matrix y,
                     const Execution& exec = {});

// qgemm_nt of x in another order, on the CPU; of a null one, of x as it is, anywhere. A workspace
// is for qgemm_nt; the columns in their order are in memory that the call allocates.
void qgemm_nt_in_order(ConstMatrix x, const std::int32_t* order, const QuantWeight& weight,
                       const float* bias, Matrix y, const Execution& exec = {});

}  // namespace lowbitcore
