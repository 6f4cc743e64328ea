// Decoding: what a new token takes besides products, norms, positions and adapters. Attention of
// one query to the KV cache (online softmax), and sums.
#pragma once

#include "elementwise.h"

namespace lowbitcore {
namespace {

// ---- attention ----

constexpr int64_t kKeys = 64;    // whose scores are held at a time
constexpr int kColsAtOnce = 32;  // of values

// out [cols] of one query: its maximum so far, the sum of exponentials and that of values move on
// with each `kKeys` keys (Milakov and Gimelshein, arXiv 1805.02867).
template <DType Type>
void attend_head(const char* q, const char* keys, int64_t key_step, const char* values,
                 int64_t value_step, int64_t rows, int64_t cols, float scale, char* out) {
  alignas(64) float query[kMostHeadCols], sums[kMostHeadCols], weights[kKeys];
  for (int64_t c = 0; c < cols; c += kWidth) {
    load_as_float(q, Type, c).store(query + c);
    Vec::broadcast(0.0f).store(sums + c);
  }
  constexpr float kNothing = -__builtin_inff();
  float most = kNothing, total = 0.0f;
  for (int64_t first = 0; first < rows; first += kKeys) {
    const int64_t count = smaller(kKeys, rows - first);
    float top = most;
    for (int64_t i = 0; i < count; ++i) {
      const char* key = keys + (first + i) * key_step;
      Vec even = Vec::broadcast(0.0f), odd = even;
      for (int64_t c = 0; c < cols; c += 2 * kWidth) {
        even = madd(Vec::load(query + c), load_as_float(key, Type, c), even);
        odd = madd(Vec::load(query + c + kWidth), load_as_float(key, Type, c + kWidth), odd);
      }
      weights[i] = scale * lane_sum(even + odd);
      if (weights[i] > top) top = weights[i];
    }
    for (int64_t i = count; i < round_up(count, kWidth); ++i) weights[i] = 0.0f;
    // Of scores that overflowed there may be nothing but -inf so far.
    const float base = top == kNothing ? 0.0f : top;
    alignas(64) float before[kWidth];
    exp(Vec::broadcast(most - base)).store(before);
    const float factor = first == 0 ? 0.0f : before[0];
    for (int64_t i = 0; i < count; i += kWidth) {
      exp(Vec::load(weights + i) - Vec::broadcast(base)).store(weights + i);
    }
    total *= factor;
    for (int64_t i = 0; i < count; ++i) total += weights[i];
    most = top;
    for (int64_t c = 0; c < cols; c += kColsAtOnce) {
      constexpr int kVecs = kColsAtOnce / kWidth;
      Vec sum[2][kVecs];  // of keys in turn, so that sums do not wait for one another
      for (int v = 0; v < kVecs; ++v) {
        sum[0][v] = Vec::load(sums + c + v * kWidth) * Vec::broadcast(factor);
        sum[1][v] = Vec::broadcast(0.0f);
      }
      const auto add = [&](int64_t i, Vec(&to)[kVecs]) LOWBITCORE_LAMBDA {
        const char* value = values + (first + i) * value_step;
        for (int v = 0; v < kVecs; ++v) {
          to[v] =
              madd(Vec::broadcast(weights[i]), load_as_float(value, Type, c + v * kWidth), to[v]);
        }
      };
      int64_t i = 0;
      for (; i + 1 < count; i += 2) {
        add(i, sum[0]);
        add(i + 1, sum[1]);
      }
      if (i < count) add(i, sum[0]);
      for (int v = 0; v < kVecs; ++v) (sum[0][v] + sum[1][v]).store(sums + c + v * kWidth);
    }
  }
  if (most == kNothing) total = __builtin_nanf("");  // as of 0 / 0
  for (int64_t c = 0; c < cols; c += kWidth) {
    store_as(Vec::load(sums + c) / Vec::broadcast(total), out, Type, c);
  }
}

void attend(ConstMatrix q, const ConstHeads& keys, const ConstHeads& values, float scale,
            Matrix out, const Resources& use) {
  const int64_t cols = keys.cols, heads = q.cols / cols, group = heads / keys.heads;
  with_dtype(q.dtype, [&](auto type) {
    constexpr DType dtype = decltype(type)::value;
    constexpr int64_t bytes = bytes_of(dtype);
    const auto head_of = [&](const ConstHeads& x, int64_t batch, int64_t head) {
      return static_cast<const char*>(x.data) +
             (batch * x.batch_stride + head / group * x.head_stride) * bytes;
    };
    parallel_for(q.rows * heads, use.threads, [&](int64_t task, int) {
      const int64_t batch = task / heads, head = task % heads;
      attend_head<dtype>(row_pointer(q, batch) + head * cols * bytes, head_of(keys, batch, head),
                         keys.row_stride * bytes, head_of(values, batch, head),
                         values.row_stride * bytes, keys.rows, cols, scale,
                         row_pointer(out, batch) + head * cols * bytes);
    });
  });
}

// ---- sums ----

void add(ConstMatrix a, ConstMatrix b, Matrix sum, const Resources& use) {
  with_dtype(a.dtype, [&](auto type) {
    constexpr DType dtype = decltype(type)::value;
    for_each_row(a, use, [&](int64_t row) {
      for (int64_t c = 0; c < a.cols; c += kWidth) {
        store_as(load_as_float(row_pointer(a, row), dtype, c) +
                     load_as_float(row_pointer(b, row), dtype, c),
                 row_pointer(sum, row), dtype, c);
      }
    });
  });
}

}  // namespace
}  // namespace lowbitcore
