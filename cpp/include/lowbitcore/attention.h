// Causal attention, forward and backward, of as many queries as keys. On the CPU.
//
//   O = softmax(scale Q K^T) V    for each head of q; a query sees the keys up to its own
//
// Query head h attends to head h / (q.heads / k.heads) of k and v. Scores, their softmax and all
// sums are fp32, results are rounded once, at the end. Of bf16 on levels with tiles, probabilities
// and the gradients of scores are rounded to bf16 where they are multiplied by values, queries and
// keys. Results do not depend on the number of threads. Scratch grows with rows, not with their
// square.
#pragma once

#include <lowbitcore/types.h>

namespace lowbitcore {

// What attention is computed of, all of one type, as results are. Columns: a multiple of 32, at
// most 256. k and v are of one shape.
struct AttentionInputs {
  ConstHeads q;
  ConstHeads k;
  ConstHeads v;
  float scale = 1.0f;  // above 0
};

// out, shaped as q, and the logarithm of each row's sum of exponentials, lse [batch * heads, rows],
// which the backward takes.
void attention(const AttentionInputs& inputs, Heads out, View<float> lse,
               const Execution& exec = {});
std::size_t attention_workspace_size(DType dtype, std::int64_t rows, std::int64_t cols,
                                     const Execution& exec = {});

// dq, dk, dv, shaped as q, k, v. The heads of q that share one of k and v are summed in order.
void attention_backward(ConstHeads d_out, const AttentionInputs& inputs, ConstHeads out,
                        View<const float> lse, Heads dq, Heads dk, Heads dv,
                        const Execution& exec = {});
std::size_t attention_backward_workspace_size(DType dtype, std::int64_t rows, std::int64_t cols,
                                              const Execution& exec = {});

}  // namespace lowbitcore
