// Causal attention of bf16 heads, forward and backward, for training: as many queries as keys.
//
//   O = softmax(scale Q K^T) V    for each head of q; a query sees the keys up to its own
//
// Query head h attends to head h / (q.heads / k.heads) of k and v. Scores, their softmax and all
// sums are fp32; probabilities and the gradients of scores are rounded to bf16 where they are
// multiplied by values, queries and keys, results once at the end. A thread takes a head of k
// and v with all that attend to it, so results do not depend on the number of threads. Scratch
// grows with rows, not with their square.
#pragma once

#include <lowbitcore/types.h>

namespace lowbitcore {

// [batch, heads, rows, cols] of bf16, given as its bits. Strides are in elements; columns are
// contiguous.
template <typename T>
struct Heads {
  T* data = nullptr;
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t batch_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t row_stride = 0;

  T* head(std::int64_t b, std::int64_t h) const {
    return data + b * batch_stride + h * head_stride;
  }
  template <typename U>
  operator Heads<const U>() const {
    return {data, batch, heads, rows, cols, batch_stride, head_stride, row_stride};
  }
};

using ConstBf16Heads = Heads<const std::uint16_t>;
using Bf16Heads = Heads<std::uint16_t>;

// What attention is computed of. Columns: a multiple of 32, at most 256. k and v are of one shape.
struct AttentionInputs {
  ConstBf16Heads q;
  ConstBf16Heads k;
  ConstBf16Heads v;
  float scale = 1.0f;  // above 0
};

// Whether the level in use has these operations (those with tiles do); without, they throw Error.
bool has_attention(const Execution& exec = {});

// out, shaped as q, and the logarithm of each row's sum of exponentials, lse [batch * heads, rows],
// which the backward takes.
void attention(const AttentionInputs& inputs, Bf16Heads out, View<float> lse,
               const Execution& exec = {});
std::size_t attention_workspace_size(std::int64_t rows, std::int64_t cols,
                                     const Execution& exec = {});

// dq, dk, dv, shaped as q, k, v. The heads of q that share one of k and v are summed in order.
void attention_backward(ConstBf16Heads d_out, const AttentionInputs& inputs, ConstBf16Heads out,
                        View<const float> lse, Bf16Heads dq, Bf16Heads dk, Bf16Heads dv,
                        const Execution& exec = {});
std::size_t attention_backward_workspace_size(std::int64_t rows, std::int64_t cols,
                                              const Execution& exec = {});

}  // namespace lowbitcore
