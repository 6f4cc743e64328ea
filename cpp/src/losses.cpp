#include <lowbitcore/losses.h>

#include <cmath>
#include <string>

#include "call.h"

namespace lowbitcore {

void token_losses(ConstMatrix logits, View<const std::int64_t> targets, const LossTerms& terms,
                  View<float> losses, Matrix gradient, const Execution& exec) {
  const char* op = "token_losses";
  const std::int64_t tokens = logits.rows, vocabulary = logits.cols;
  check::columns(op, "logits", vocabulary);
  check::shape(op, "logits", logits, tokens, vocabulary);
  check::shape(op, "targets", targets, 1, tokens);
  check::shape(op, "losses", losses, 1, tokens);
  for (const ConstMatrix& other : {terms.teacher, ConstMatrix(gradient)}) {
    if (other.data == nullptr) continue;
    const char* name = other.data == gradient.data ? "gradient" : "teacher";
    check::shape(op, name, other, tokens, vocabulary);
    check::same_dtype(op, name, other.dtype, "logits", logits.dtype);
  }
  for (const float lambda : {terms.lambda_ce, terms.lambda_kl}) {
    if (!std::isfinite(lambda)) check::fail(op, "lambda", "a number", std::to_string(lambda));
  }
  const Backend& backend = backend_of(exec);
  check_has(op, backend, backend.token_losses != nullptr);
  for (std::int64_t i = 0; i < tokens; ++i) {
    if (targets.data[i] < 0 || targets.data[i] >= vocabulary) {
      check::fail(op, "targets", "numbers from 0 to " + std::to_string(vocabulary - 1),
                  std::to_string(targets.data[i]));
    }
  }
  backend.token_losses(logits, targets, terms, losses, gradient, Call(op, exec, 0));
}

}  // namespace lowbitcore
