// What the blocks of a LLaMA-like model and its adapters compute between their products, each in
// one pass over memory: the root mean square norm (RMSNorm), rotary positions (RoPE) and the gate
// of an MLP (SwiGLU), forward and backward, and dropout.
//
// Matrices of a call are of one type and one shape, their columns a multiple of 32. Values are
// computed in fp32 and rounded where transformers' modules round them, so that results differ from
// theirs by the order of sums and by the exponential alone; gradients are rounded once. They do
// not depend on the number of threads. A result may be in the place of any input of its shape. On
// the CPU; elsewhere Error.
#pragma once

#include <lowbitcore/types.h>

namespace lowbitcore {

// y = weight * (x / sqrt(mean(x^2) + eps)), a row at a time; the quotient is rounded to the type.
// weight: [1, cols]. eps: 0 or more.
void rms_norm(ConstMatrix x, ConstMatrix weight, float eps, Matrix y, const Execution& exec = {});

// The gradient of x from that of y.
void rms_norm_backward(ConstMatrix dy, ConstMatrix x, ConstMatrix weight, float eps, Matrix dx,
                       const Execution& exec = {});

// Rotary positions: with halves x1, x2 of a head's columns, y = (x1, x2) * cos + (-x2, x1) * sin,
// each product rounded to the type. x, y: [batch * rows, heads * head_cols] of heads side by side;
// cos, sin: [batch * rows, head_cols] or, the same for every batch, [rows, head_cols], of the type
// of x; head_cols a multiple of 64. The gradient of x is that of y, `inverse`.
void rotate(ConstMatrix x, ConstMatrix cos, ConstMatrix sin, bool inverse, Matrix y,
            const Execution& exec = {});

// out = silu(gate) * up with silu(g) = g / (1 + exp(-g)), which is rounded to the type.
void swiglu(ConstMatrix gate, ConstMatrix up, Matrix out, const Execution& exec = {});

// The gradients of gate and up from that of out.
void swiglu_backward(ConstMatrix d_out, ConstMatrix gate, ConstMatrix up, Matrix d_gate,
                     Matrix d_up, const Execution& exec = {});

// y = x with elements zeroed at random, each with a probability of dropped / 2^16, and the others
// over the probability of staying. Which ones depends on `seed`, the place of an element and
// `dropped`, below 2^16, alone: gradients take the same call.
void dropout(ConstMatrix x, std::uint64_t seed, std::uint32_t dropped, Matrix y,
             const Execution& exec = {});

}  // namespace lowbitcore
