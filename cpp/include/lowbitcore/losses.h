// The loss of each token from its logits, and its gradient, in closed form: a few passes over a
// row, which the cache holds, and nothing stored between them.
//
//   CE = -log p(target)      KL = sum_v p_t (log p_t - log p)
//   reversed:                KL = sum_v p (log p - log p_t)
//
// with p and p_t the softmax of the logits and of a teacher's. In fp32; gradients are rounded once.
// They do not depend on the number of threads. On the CPU; elsewhere Error.
#pragma once

#include <lowbitcore/types.h>

namespace lowbitcore {

// lambda_kl KL + lambda_ce CE (arXiv 2306.08162, equations 2 and 3).
struct LossTerms {
  float lambda_ce = 1.0f;
  ConstMatrix teacher;  // as the logits, of their type; no data: no KL
  float lambda_kl = 0.0f;
  bool reverse = false;
};

// logits: [tokens, vocabulary], a multiple of 32 columns. targets: [1, tokens], from 0 to
// vocabulary - 1. losses: [1, tokens]. gradient: as the logits, of their type, and in their place
// or the teacher's if wanted; no data: none.
void token_losses(ConstMatrix logits, View<const std::int64_t> targets, const LossTerms& terms,
                  View<float> losses, Matrix gradient, const Execution& exec = {});

}  // namespace lowbitcore
