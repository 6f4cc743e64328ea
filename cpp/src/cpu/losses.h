// Losses of logits, a token at a time.
#pragma once

#include "elementwise.h"

namespace lowbitcore {
namespace {

// The largest of a row; what is NaN may be left out.
inline float row_max(const char* row, DType dtype, int64_t cols) {
  Vec most = load_as_float(row, dtype, 0);
  for (int64_t c = kWidth; c < cols; c += kWidth) most = max(load_as_float(row, dtype, c), most);
  alignas(64) float lanes[kWidth];
  most.store(lanes);
  float value = lanes[0];
  for (const float lane : lanes) value = lane > value ? lane : value;
  return value;
}

// The softmax of a row: exp(x - max) / total.
template <DType Type>
struct RowSoftmax {
  const char* row;
  Vec max;
  float log_total;  // with the maximum in it: log of the sum of exp(x)
  Vec inverse;

  RowSoftmax(const char* logits, int64_t cols) : row(logits) {
    const float most = row_max(row, Type, cols);
    max = Vec::broadcast(most);
    const float total = row_sum(cols, [&](int64_t c) { return exponential(c); });
    log_total = most + __builtin_logf(total);
    inverse = Vec::broadcast(1.0f / total);
  }
  Vec logit(int64_t c) const { return load_as_float(row, Type, c); }
  // Of a masked logit 0: it counts for nothing.
  Vec exponential(int64_t c) const { return exp_or_zero(logit(c) - max); }
  // p f(c), and 0 where p is, however large the other may be. Keeps NaN.
  template <typename F>
  Vec expectation(int64_t c, const F& f) const {
    const Vec e = exponential(c), zero = Vec::broadcast(0.0f);
    constexpr float kSmallest = 1.17549435e-38f;
    return select_less(e, Vec::broadcast(kSmallest), zero, e * inverse * f(c));
  }
};

// gradient(c) is that of logits c to c + kWidth, without what the target's has beside. It is asked
// for once before it is stored: `out` may be the logits' own row.
template <DType Type, typename F>
void store_gradient(int64_t cols, int64_t target, float lambda_ce, char* out, const F& gradient) {
  alignas(64) float less[kWidth] = {};
  const int64_t first = target / kWidth * kWidth;
  less[target - first] = lambda_ce;
  for (int64_t c = 0; c < cols; c += kWidth) {
    const Vec value = gradient(c);
    store_as(c == first ? value - Vec::load(less) : value, out, Type, c);
  }
}

void token_losses(ConstMatrix logits, View<const int64_t> targets, const LossTerms& terms,
                  View<float> losses, Matrix gradient, const Resources& use) {
  const float ce = terms.lambda_ce, kl = terms.lambda_kl;
  const int64_t cols = logits.cols;
  with_dtype(logits.dtype, [&](auto type) {
    constexpr DType dtype = decltype(type)::value;
    for_each_row(logits, use, [&](int64_t row) {
      const RowSoftmax<dtype> own(row_pointer(logits, row), cols);
      const int64_t target = targets.data[row], block = target / kWidth * kWidth;
      alignas(64) float lanes[kWidth];
      own.logit(block).store(lanes);
      const float entropy = own.log_total - lanes[target - block];
      char* out = gradient.data == nullptr ? nullptr : row_pointer(gradient, row);
      if (terms.teacher.data == nullptr) {
        losses.data[row] = ce * entropy;
        if (out == nullptr) return;
        const Vec scale = own.inverse * Vec::broadcast(ce);
        store_gradient<dtype>(cols, target, ce, out,
                              [&](int64_t c) { return own.exponential(c) * scale; });
        return;
      }
      const RowSoftmax<dtype> other(row_pointer(terms.teacher, row), cols);
      // log p - log p_t is the difference of logits, less that of the logarithms of totals.
      const float apart = own.log_total - other.log_total;
      const auto difference = [&](int64_t c) {
        return own.logit(c) - other.logit(c) - Vec::broadcast(apart);
      };
      const RowSoftmax<dtype>& weights = terms.reverse ? own : other;
      const float sum =
          row_sum(cols, [&](int64_t c) { return weights.expectation(c, difference); });
      const float divergence = terms.reverse ? sum : -sum;
      losses.data[row] = kl * divergence + ce * entropy;
      if (out == nullptr) return;
      if (terms.reverse) {  // p (kl (log p - log p_t - KL) + ce)
        const Vec unit = Vec::broadcast(kl), rest = Vec::broadcast(ce - kl * divergence);
        store_gradient<dtype>(cols, target, ce, out, [&](int64_t c) {
          return own.expectation(c, [&](int64_t at) { return fmadd(unit, difference(at), rest); });
        });
      } else {  // (kl + ce) p - kl p_t
        const Vec mine = Vec::broadcast(kl + ce) * own.inverse;
        const Vec theirs = Vec::broadcast(kl) * other.inverse;
        store_gradient<dtype>(cols, target, ce, out, [&](int64_t c) {
          return fnmadd(theirs, other.exponential(c), own.exponential(c) * mine);
        });
      }
    });
  });
}

}  // namespace
}  // namespace lowbitcore
