// One new token of each sequence through a block of a LLaMA-like model, straight from packed
// weights and past the keys and values of earlier tokens. Of so little work the calls between
// products cost as much as these, so a block is two calls, between which a host puts the token's
// keys and values where it keeps them:
//
//   n = norm(x);  q, k, v = Wq n, Wk n, Wv n;  q and k, normed if wanted, turned to the position
//   h = x + Wo attend(q, keys, values);  n' = norm'(h);  y = h + Wd (silu(Wg n') * (Wu n'))
//
// x, y [batch, K] and whatever lies between are of one type, to which each operation above rounds
// its result, as transformers does it; within one all is fp32. Results do not depend on the number
// of threads. On the CPU; elsewhere Error. A workspace that a host brings serves each operation
// inside in turn: the most that qgemm_nt_workspace_size says of the weights and
// add_low_rank_workspace_size of adapters will do. What lies between them a call allocates.
#pragma once

#include <lowbitcore/format.h>
#include <lowbitcore/low_rank.h>
#include <lowbitcore/types.h>

namespace lowbitcore {

// x W^T + bias, and what its adapters add.
struct AdaptedWeight {
  QuantWeight weight;
  const float* bias = nullptr;  // [N]
  // [K]: the weight's inputs are x's columns in that order, as permute_columns takes it; null: as
  // they are. Adapters read x as it is.
  const std::int32_t* order = nullptr;
  const LowRank* adapters = nullptr;
  std::size_t adapter_count = 0;
};

struct Norm {
  ConstMatrix weight;  // [1, cols]
  float eps = 0.0f;
};

// out = softmax(scale q keys^T) values for one query a head; q and out are [batch, heads * cols],
// heads side by side. Query head h attends to head h / (heads of q / heads of keys). At least one
// key; columns: a multiple of 32, at most 256; scale above 0. Scores and sums are fp32.
void attend(ConstMatrix q, const ConstHeads& keys, const ConstHeads& values, float scale,
            Matrix out, const Execution& exec = {});

struct Projections {
  Norm norm;
  AdaptedWeight q, k, v;
  Norm q_norm, k_norm;  // of each head's columns; without data there is none
};

// q, k and v of a token, up to attention. cos, sin: [1 or batch, cols of a head], a multiple of 64,
// of the type of x.
void project_token(ConstMatrix x, const Projections& projections, ConstMatrix cos, ConstMatrix sin,
                   Matrix q, Matrix k, Matrix v, const Execution& exec = {});

struct RestOfBlock {
  AdaptedWeight o;
  Norm norm;
  AdaptedWeight gate, up, down;
};

// The block's result, from its x, from q, and from all keys and values, the token's own among them.
void finish_token(ConstMatrix x, ConstMatrix q, const ConstHeads& keys, const ConstHeads& values,
                  float scale, const RestOfBlock& rest, Matrix y, const Execution& exec = {});

}  // namespace lowbitcore
