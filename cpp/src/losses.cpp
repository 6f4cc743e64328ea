#include <lowbitcore/losses.h>

#include <cmath>
#include <string>

#include "call.h"

namespace lowbitcore {

namespace {

void check_lambda(const char* op, const char* argument, float value) {
  if (!std::isfinite(value)) check::fail(op, argument, "a number", std::to_string(value));
}

}  // namespace

void token_losses(ConstMatrix logits, View<const std::int64_t> targets, const LossTerms& terms,
                  View<float> losses, Matrix gradient, const Execution& exec) {
  const char* op = "token_losses";
  const std::int64_t tokens = logits.rows, vocabulary = logits.cols;
  check::vectors(op, "logits", logits);
  check::shape(op, "targets", targets, 1, tokens);
  check::shape(op, "losses", losses, 1, tokens);
  if (terms.teacher.data != nullptr) check::like(op, "teacher", terms.teacher, "logits", logits);
  if (gradient.data != nullptr) check::like(op, "gradient", gradient, "logits", logits);
  check_lambda(op, "lambda_ce", terms.lambda_ce);
  check_lambda(op, "lambda_kl", terms.lambda_kl);
  const Backend& backend = backend_with(op, exec, &Backend::token_losses);
  for (std::int64_t i = 0; i < tokens; ++i) {
    if (targets.data[i] < 0 || targets.data[i] >= vocabulary) {
      check::fail(op, "targets", "numbers from 0 to " + std::to_string(vocabulary - 1),
                  std::to_string(targets.data[i]));
    }
  }
  backend.token_losses(logits, targets, terms, losses, gradient, Call(op, exec));
}

}  // namespace lowbitcore
