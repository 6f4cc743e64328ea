// Multiplication by a packed weight, in every direction that training needs.
//
// Activations are fp32, bf16 or fp16; inputs and outputs of one call share their type. Sums are
// fp32 and rounded once; of few rows a group is summed before its scale comes to it, so that
// activations beyond some 1e34 may overflow there alone. Results do not depend on the number of
// threads.
//
// Where 16-bit activations are multiplied in 16 bits, the dequantized weight is rounded to their
// type, as a dense layer's is: of bf16 on AVX-512 BF16 and on AMX, in more than 16 to 24 rows and
// in qgemm_nn; of both types on CUDA's tensor cores. In all other products weights are not rounded,
// so that a row may come out differently among many. bf16's subnormals may count as zero on these
// two levels, in any number of rows and for the gradient of scales, too.
//
// Scratch: ask for its size and bring it in Execution, or leave it to the library. It does not grow
// with N*K, but for qgemm_grad_scales on CUDA: a sum in fp32 for each 32 inputs of an output, N*K/8
// bytes, as often as the rows are split to keep the device busy.
//
// On CUDA a g_idx is trusted, since its values cannot be seen without waiting for the device: an
// entry that is no group stops the kernel, and with it the process's CUDA context.
#pragma once

#include <lowbitcore/format.h>
#include <lowbitcore/types.h>

namespace lowbitcore {

// y [M,N] = x [M,K] W^T (+ bias [N], fp32, may be null)
void qgemm_nt(ConstMatrix x, const QuantWeight& weight, const float* bias, Matrix y,
              const Execution& exec = {});
std::size_t qgemm_nt_workspace_size(const QuantFormat& format, std::int64_t m,
                                    const Execution& exec = {});

// dx [M,K] = dy [M,N] W
void qgemm_nn(ConstMatrix dy, const QuantWeight& weight, Matrix dx, const Execution& exec = {});
std::size_t qgemm_nn_workspace_size(const QuantFormat& format, std::int64_t m,
                                    const Execution& exec = {});

// ds [G,N] = sum over k in g of (q[n,k] - z[g,n]) * sum over m of dy[m,n] x[m,k]
// (the gradient of PEQA, arXiv 2305.14152, without a dense dW). weight.scales is not read.
void qgemm_grad_scales(ConstMatrix dy, ConstMatrix x, const QuantWeight& weight, View<float> ds,
                       const Execution& exec = {});
std::size_t qgemm_grad_scales_workspace_size(const QuantFormat& format, std::int64_t m,
                                             const Execution& exec = {});

}  // namespace lowbitcore
