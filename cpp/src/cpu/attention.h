// Causal attention on vectors, after FlashAttention-2 (arXiv 2307.08691): products of fp32,
// whatever the type of the heads.
//
// Heads are taken apart into panels of 32 rows, and all products are those of panels:
//
//   forward    S^T = K Q^T, O^T = V^T P^T            for 32 queries, keys in runs
//   backward   S = Q K^T, dP = dO V^T,               for 64 queries by 64 keys
//              dV^T += dO^T P, dK^T += Q^T dS, dQ^T += K^T dS^T
//
// Rows past the last are zeros, and add nothing: as keys the diagonal hides them, as queries their
// gradients are zeros.
#pragma once

#include "elementwise.h"
#include "gemm.h"

namespace lowbitcore {
namespace {

constexpr int64_t kScores = kPanel * kPanel;  // of a panel of queries by one of keys
constexpr int64_t kKeyPanels = 4;             // of the forward, between two looks at the maximum
constexpr int64_t kSpan = 2;                  // panels of queries, and of keys, in the backward

constexpr float kUnseen = -__builtin_inff();
// Less than any score; of two -inf the difference would be NaN.
constexpr float kLeast = -3.40282347e38f;

// ---- operands ----

inline ConstMatrix head_of(const ConstHeads& x, int64_t b, int64_t h) {
  const int64_t bytes = bytes_of(x.dtype);
  const char* data = static_cast<const char*>(x.data);
  return {data + (b * x.batch_stride + h * x.head_stride) * bytes, x.dtype, x.rows, x.cols,
          x.row_stride};
}

inline Matrix head_of(const Heads& x, int64_t b, int64_t h) {
  const ConstMatrix head = head_of(ConstHeads(x), b, h);
  return {const_cast<void*>(head.data), head.dtype, head.rows, head.cols, head.stride};
}

inline Vec load_or_zero(const ConstMatrix& x, int64_t row, int64_t col) {
  return row < x.rows ? load_as_float(row_pointer(x, row), x.dtype, col) : Vec::broadcast(0.0f);
}

// Panels of X^T, [count][cols][32].
inline void put_columns(const ConstMatrix& x, int64_t first, int64_t count, float* out) {
  for (int64_t p = first; p < first + count; ++p) {
    for (int64_t c = 0; c < x.cols; c += kBlockN, out += kBlockN * kPanel) {
      alignas(64) float rows[kPanel * kBlockN];
      for (int64_t r = 0; r < kPanel; ++r) {
        for (int64_t i = 0; i < kBlockN; i += kWidth) {
          load_or_zero(x, p * kPanel + r, c + i).store(rows + r * kBlockN + i);
        }
      }
      transpose_tile(rows, out);
    }
  }
}

// Panels of X, [count][32][cols].
inline void put_rows(const ConstMatrix& x, int64_t first, int64_t count, float* out) {
  for (int64_t r = first * kPanel; r < (first + count) * kPanel; ++r, out += x.cols) {
    for (int64_t c = 0; c < x.cols; c += kWidth) load_or_zero(x, r, c).store(out + c);
  }
}

// ---- scores ----

// In scores [keys][queries] of a panel by itself, those of keys that come after the query.
inline void hide_later_rows(float* s) {
  for (int64_t key = 1; key < kPanel; ++key) {
    for (int64_t query = 0; query < key; ++query) s[key * kPanel + query] = kUnseen;
  }
}

// The same in scores [queries][keys].
inline void hide_later_columns(float* s) {
  for (int64_t query = 0; query < kPanel; ++query) {
    for (int64_t key = query + 1; key < kPanel; ++key) s[query * kPanel + key] = kUnseen;
  }
}

// ---- results ----

// Columns c [cols][32], times a factor for each of the 32, to those rows of y that there are.
inline void store_columns(const float* c, const float* factors, int64_t panel, const Matrix& y) {
  for (int64_t row = 0; row < kPanel; row += kBlockN) {
    for (int64_t col = 0; col < y.cols; col += kTileK) {
      alignas(64) float columns[kTileK * kBlockN], rows[kBlockN * kTileK];
      for (int64_t i = 0; i < kTileK; ++i) {
        for (int64_t r = 0; r < kBlockN; r += kWidth) {
          (Vec::load(factors + row + r) * Vec::load(c + (col + i) * kPanel + row + r))
              .store(columns + i * kBlockN + r);
        }
      }
      transpose_tile(columns, rows);
      const int64_t first = panel * kPanel + row;
      for (int64_t r = 0; r < smaller(kBlockN, y.rows - first); ++r) {
        for (int64_t i = 0; i < kTileK; i += kWidth) {
          store_as(Vec::load(rows + r * kTileK + i), row_pointer(y, first + r), y.dtype, col + i);
        }
      }
    }
  }
}

inline void store_columns(const float* c, float factor, int64_t panel, const Matrix& y) {
  alignas(64) float factors[kPanel];
  for (float& f : factors) f = factor;
  store_columns(c, factors, panel, y);
}

// ---- forward ----

// The softmax of 32 queries as far as it has come. The maximum is taken off before scores are
// multiplied: its own exponential is then 1 however large it is.
struct RunningSoftmax {
  alignas(64) float maximum[kPanel], total[kPanel];  // of scores, of exponentials
  alignas(64) float shrink[kPanel];  // what earlier probabilities are to be multiplied by

  RunningSoftmax() {
    for (int64_t q = 0; q < kPanel; ++q) maximum[q] = kLeast, total[q] = 0.0f;
  }

  // Scores [keys][32] become probabilities under the new maximum.
  void take(float* s, int64_t keys, float scale) {
    const Vec unit = Vec::broadcast(scale);
    for (int64_t q = 0; q < kPanel; q += kWidth) {
      Vec even = Vec::broadcast(kUnseen), odd = even;
      for (int64_t key = 0; key < keys; key += 2) {
        even = max(even, Vec::load(s + key * kPanel + q));
        odd = max(odd, Vec::load(s + (key + 1) * kPanel + q));
      }
      const Vec before = Vec::load(maximum + q), now = max(before, max(even, odd));
      const Vec less = exp_or_zero((before - now) * unit);
      Vec sum = Vec::load(total + q) * less;
      for (int64_t key = 0; key < keys; ++key) {
        float* at = s + key * kPanel + q;
        const Vec e = exp_or_zero((Vec::load(at) - now) * unit);
        e.store(at);
        sum = sum + e;
      }
      now.store(maximum + q);
      sum.store(total + q);
      less.store(shrink + q);
    }
  }
};

size_t vectors_attention_workspace(int64_t rows, int64_t cols, int threads) {
  const int64_t panels = divide_up(rows, kPanel);
  return static_cast<size_t>(threads * (2 * panels + 2) * kPanel * cols) * 4;
}

struct VectorsForward {
  const AttentionInputs& in;
  const Heads& out;
  const View<float>& lse;

  int64_t rows = in.q.rows, cols = in.q.cols;
  int64_t panels = divide_up(rows, kPanel), size = kPanel * cols;

  // A head of q, so that there are as many tasks as can be: those that share keys and values each
  // put them in place anew.
  void operator()(int64_t b, int64_t h, void* memory) const {
    auto* keys = static_cast<float*>(memory);
    float* values = keys + panels * size;
    float* queries = values + panels * size;
    const int64_t shared = h / (in.q.heads / in.k.heads);
    put_columns(head_of(in.k, b, shared), 0, panels, keys);
    put_rows(head_of(in.v, b, shared), 0, panels, values);
    for (int64_t i = 0; i < panels; ++i) {
      put_columns(head_of(in.q, b, h), i, 1, queries);
      attend_to_keys(i, keys, values, queries, queries + size, head_of(out, b, h),
                     lse.data + (b * in.q.heads + h) * lse.stride);
    }
  }

  // Panel `i` of queries; `sums` has room for their values.
  void attend_to_keys(int64_t i, const float* keys, const float* values, const float* queries,
                      float* sums, const Matrix& to, float* logs) const {
    alignas(64) float s[kKeyPanels * kScores];
    RunningSoftmax softmax;
    for (int64_t j = 0; j <= i; j += kKeyPanels) {
      const int64_t count = smaller(kKeyPanels, i + 1 - j);
      for (int64_t n = 0; n < count; ++n) {
        multiply_panels(kPanel, cols, keys + (j + n) * size, kPanel, queries, s + n * kScores,
                        false);
      }
      if (j + count > i) hide_later_rows(s + (count - 1) * kScores);
      softmax.take(s, count * kPanel, in.scale);
      for (int64_t r = 0; j > 0 && r < size; r += kWidth) {
        (Vec::load(sums + r) * Vec::load(softmax.shrink + r % kPanel)).store(sums + r);
      }
      multiply_panels(cols, count * kPanel, values + j * size, cols, s, sums, j > 0);
    }
    alignas(64) float inverse[kPanel];
    for (int64_t q = 0; q < kPanel; ++q) inverse[q] = 1.0f / softmax.total[q];
    store_columns(sums, inverse, i, to);
    for (int64_t q = 0; q < smaller(kPanel, rows - i * kPanel); ++q) {
      logs[i * kPanel + q] = in.scale * softmax.maximum[q] + __builtin_logf(softmax.total[q]);
    }
  }
};

// Calls f(batch, head, memory) for heads of x, with `scratch` bytes of its own for each thread.
template <typename F>
void for_each_head(const ConstHeads& x, size_t scratch, const Resources& use, const F& f) {
  parallel_for(x.batch * x.heads, use.threads, [&](int64_t item, int thread) {
    const TileScope scope;
    f(item / x.heads, item % x.heads,
      static_cast<char*>(use.workspace) + static_cast<size_t>(thread) * scratch);
  });
}

void vectors_attention(const AttentionInputs& in, Heads out, View<float> lse,
                       const Resources& use) {
  const size_t scratch = vectors_attention_workspace(in.q.rows, in.q.cols, 1);
  for_each_head(in.q, scratch, use, VectorsForward{in, out, lse});
}

// ---- backward ----

size_t vectors_attention_backward_workspace(int64_t rows, int64_t cols, int threads) {
  const int64_t panels = divide_up(rows, kPanel);
  return static_cast<size_t>(threads * (5 * panels + 5 * kSpan) * kPanel * cols) * 4;
}

struct VectorsBackward {
  const ConstHeads& d_out;
  const AttentionInputs& in;
  const ConstHeads& out;
  const View<const float>& lse;
  const Heads &dq, &dk, &dv;

  int64_t rows = in.q.rows, cols = in.q.cols;
  int64_t panels = divide_up(rows, kPanel), size = kPanel * cols;

  // Panels of a head of k and v, and `kSpan` of queries; "columns" are transposed.
  struct Scratch {
    float *key_columns, *keys, *value_columns, *dk, *dv;
    float *query_columns, *queries, *grad_columns, *grads, *dq;

    Scratch(int64_t head, int64_t span, float* memory)
        : key_columns(memory),
          keys(key_columns + head),
          value_columns(keys + head),
          dk(value_columns + head),
          dv(dk + head),
          query_columns(dv + head),
          queries(query_columns + span),
          grad_columns(queries + span),
          grads(grad_columns + span),
          dq(grads + span) {}
  };

  // A head of k and v, with all that attend to it.
  void operator()(int64_t b, int64_t kv_head, void* memory) const {
    const Scratch t(panels * size, kSpan * size, static_cast<float*>(memory));
    const ConstMatrix k = head_of(in.k, b, kv_head), v = head_of(in.v, b, kv_head);
    put_columns(k, 0, panels, t.key_columns);
    put_rows(k, 0, panels, t.keys);
    put_columns(v, 0, panels, t.value_columns);
    std::memset(t.dk, 0, static_cast<size_t>(panels * size) * 4);
    std::memset(t.dv, 0, static_cast<size_t>(panels * size) * 4);
    const int64_t group = in.q.heads / in.k.heads;
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
      for (int64_t i = 0; i < panels; i += kSpan) queries(b, h, i, t);
    }
    for (int64_t j = 0; j < panels; ++j) {
      store_columns(t.dk + j * size, in.scale, j, head_of(dk, b, kv_head));
      store_columns(t.dv + j * size, 1.0f, j, head_of(dv, b, kv_head));
    }
  }

  // Panels of queries of a head, from `i` on.
  void queries(int64_t b, int64_t h, int64_t i, const Scratch& t) const {
    const int64_t count = smaller(kSpan, panels - i), first = i * kPanel;
    const ConstMatrix q = head_of(in.q, b, h), g = head_of(d_out, b, h), o = head_of(out, b, h);
    put_columns(q, i, count, t.query_columns);
    put_rows(q, i, count, t.queries);
    put_columns(g, i, count, t.grad_columns);
    put_rows(g, i, count, t.grads);
    float logs[kSpan * kPanel] = {}, deltas[kSpan * kPanel] = {};
    for (int64_t r = 0; r < smaller(count * kPanel, rows - first); ++r) {
      logs[r] = lse.data[(b * in.q.heads + h) * lse.stride + first + r];
      const char* values = row_pointer(o, first + r);
      deltas[r] = row_sum(cols, [&](int64_t c) {
        return Vec::load(t.grads + r * cols + c) * load_as_float(values, o.dtype, c);
      });
    }
    std::memset(t.dq, 0, static_cast<size_t>(count * size) * 4);
    for (int64_t j = 0; j < i + count; j += kSpan) {
      block(j, smaller(kSpan, i + count - j), i, count, logs, deltas, t);
    }
    for (int64_t n = 0; n < count; ++n) {
      store_columns(t.dq + n * size, in.scale, i + n, head_of(dq, b, h));
    }
  }

  // `key_count` panels of keys from j on by `count` of queries from i on.
  void block(int64_t j, int64_t key_count, int64_t i, int64_t count, const float* logs,
             const float* deltas, const Scratch& t) const {
    alignas(64) float p[kSpan * kScores], ds[kSpan * kScores];  // [queries][keys of a panel]
    alignas(64) float ds_columns[kSpan][kSpan * kScores];       // [panels of queries][keys][32]
    for (int64_t m = 0; m < key_count; ++m) {
      const int64_t key = (j + m) * size, seen = larger(0, j + m - i);
      for (int64_t n = seen; n < count; ++n) {
        float *p_here = p + n * kScores, *ds_here = ds + n * kScores;
        multiply_panels(kPanel, cols, t.query_columns + n * size, kPanel, t.key_columns + key,
                        p_here, false);
        multiply_panels(kPanel, cols, t.grad_columns + n * size, kPanel, t.value_columns + key,
                        ds_here, false);
        if (j + m == i + n) hide_later_columns(p_here);
        grad_scores(logs + n * kPanel, deltas + n * kPanel, p_here, ds_here,
                    ds_columns[n] + m * kScores);
      }
      const int64_t depth = (count - seen) * kPanel;
      multiply_panels(cols, depth, t.grads + seen * size, cols, p + seen * kScores, t.dv + key,
                      true);
      multiply_panels(cols, depth, t.queries + seen * size, cols, ds + seen * kScores, t.dk + key,
                      true);
    }
    for (int64_t n = 0; n < count; ++n) {
      const int64_t depth = smaller(key_count, i + n - j + 1) * kPanel;
      multiply_panels(cols, depth, t.keys + j * size, cols, ds_columns[n], t.dq + n * size, true);
    }
  }

  // Of 32 queries by 32 keys: scores become probabilities, dP the gradients of scores, which are
  // left transposed, too.
  void grad_scores(const float* logs, const float* deltas, float* p, float* ds,
                   float* transposed) const {
    alignas(64) float halves[2][kPanel * kBlockN];
    for (int64_t q = 0; q < kPanel; ++q) {
      const Vec unit = Vec::broadcast(in.scale), log = Vec::broadcast(logs[q]);
      const Vec delta = Vec::broadcast(deltas[q]), zero = Vec::broadcast(0.0f);
      for (int64_t key = 0; key < kPanel; key += kWidth) {
        const int64_t at = q * kPanel + key;
        // Above 0 by rounding alone, which is much where scores are huge. Keeps NaN.
        const Vec x = min(zero, madd(Vec::load(p + at), unit, zero - log));
        const Vec e = exp_or_zero(x);
        const Vec d = e * (Vec::load(ds + at) - delta);
        e.store(p + at);
        d.store(ds + at);
        d.store(halves[key / kBlockN] + q * kBlockN + key % kBlockN);
      }
    }
    for (int half = 0; half < 2; ++half) {
      transpose_tile(halves[half], transposed + half * kScores / 2);
    }
  }
};

void vectors_attention_backward(ConstHeads d_out, const AttentionInputs& in, ConstHeads out,
                                View<const float> lse, Heads dq, Heads dk, Heads dv,
                                const Resources& use) {
  const size_t scratch = vectors_attention_backward_workspace(in.q.rows, in.q.cols, 1);
  for_each_head(in.k, scratch, use, VectorsBackward{d_out, in, out, lse, dq, dk, dv});
}

}  // namespace
}  // namespace lowbitcore
