// Causal attention of bf16 on tiles, after FlashAttention-2 (arXiv 2307.08691).
//
// Blocks of scores come out transposed, a row for each key and a lane for each query: sums over
// keys then go down lanes, and probabilities are operands of the next products as they lie.
//
//   forward    S^T = K Q^T, O^T = V^T P^T             for 32 queries, keys in runs
//   backward   S^T = K Q^T, dP^T = V dO^T,            for 64 keys by 64 queries
//              dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
//
// Rows past the last are zeros, and add nothing: as keys the diagonal hides them, as queries their
// gradients are zeros.
#pragma once

#include <math.h>

#include "attention.h"
#include "tiles.h"

namespace lowbitcore {
namespace {

constexpr int64_t kSums = 4 * kTileWords;  // of a product of two strips: [2][2 tiles]
constexpr int64_t kKeyStrips = 4;          // of the forward, between two looks at the maximum
constexpr int64_t kBlock = 2;              // strips of keys and of queries in the backward
constexpr int64_t kChunk = 16;  // strips of queries whose operands the second level is to hold

constexpr float kLog2E = 1.44269504f;

// ---- operands ----

inline uint16_t* words_of(const Heads& x, int64_t b, int64_t h) {
  return static_cast<uint16_t*>(head_of(x, b, h).data);
}

// A head's rows as operands: [strips][cols/32][2 tiles].
struct HeadRows {
  const uint16_t* data;
  int64_t stride, rows, panels;

  HeadRows(const ConstHeads& x, int64_t b, int64_t h)
      : data(static_cast<const uint16_t*>(head_of(x, b, h).data)),
        stride(x.row_stride),
        rows(x.rows),
        panels(x.cols / kPanel) {}

  __m512i line(int64_t row, int64_t panel) const {
    return row < rows ? _mm512_loadu_si512(data + row * stride + panel * kPanel)
                      : _mm512_setzero_si512();
  }
};

inline void store_transposed(__m512 (&r)[16], uint32_t* tile) {
  transpose_16x16(r);
  for (int i = 0; i < 16; ++i) _mm512_store_ps(tile + i * 16, r[i]);
}

// Of 32 rows by 32 columns X: X as a left operand.
inline void put_left(const HeadRows& x, int64_t row, int64_t panel, uint32_t* out) {
  for (int64_t r = 0; r < kStrip; ++r) _mm512_store_si512(out + r * 16, x.line(row + r, panel));
}

// X^T as a right operand.
inline void put_transposed_right(const HeadRows& x, int64_t row, int64_t panel, uint32_t* out) {
  for (int64_t half = 0; half < 2; ++half) {
    __m512 r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_castsi512_ps(x.line(row + half * 16 + i, panel));
    store_transposed(r, out + half * kTileWords);
  }
}

// Two rows of 32 bf16, interleaved: columns 0 to 15 and 16 to 31.
struct RowPair {
  __m512i half[2];

  RowPair(__m512i even, __m512i odd) {
    alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    half[0] = _mm512_permutex2var_epi16(even, low, odd);
    half[1] = _mm512_permutex2var_epi16(even, high, odd);
  }
};

// X as a right operand.
inline void put_right(const HeadRows& x, int64_t row, int64_t panel, uint32_t* out) {
  for (int64_t p = 0; p < 16; ++p) {
    const RowPair pair(x.line(row + 2 * p, panel), x.line(row + 2 * p + 1, panel));
    _mm512_store_si512(out + p * 16, pair.half[0]);
    _mm512_store_si512(out + kTileWords + p * 16, pair.half[1]);
  }
}

// X^T as a left operand.
inline void put_transposed_left(const HeadRows& x, int64_t row, int64_t panel, uint32_t* out) {
  __m512 r[2][16];
  for (int p = 0; p < 16; ++p) {
    const RowPair pair(x.line(row + 2 * p, panel), x.line(row + 2 * p + 1, panel));
    for (int half = 0; half < 2; ++half) r[half][p] = _mm512_castsi512_ps(pair.half[half]);
  }
  for (int half = 0; half < 2; ++half) store_transposed(r[half], out + half * kTileWords);
}

// `count` strips from `first` on, by one of the above.
template <typename Put>
inline void put_strips(const HeadRows& x, int64_t first, int64_t count, const Put& put,
                       uint32_t* out) {
  for (int64_t s = first; s < first + count; ++s) {
    for (int64_t p = 0; p < x.panels; ++p, out += kStepWords) put(x, s * kStrip, p, out);
  }
}

// c (+)= the sum over steps of a b; the operands' steps lie a_step and b_step words apart.
inline void multiply_strips(int64_t steps, const uint32_t* a, int64_t a_step, const uint32_t* b,
                            int64_t b_step, float* c, bool accumulate) {
  operands_are_stored();
  if (accumulate) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + kTileWords, 64);
    _tile_loadd(2, c + 2 * kTileWords, 64);
    _tile_loadd(3, c + 3 * kTileWords, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += a_step, b += b_step) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTileWords, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTileWords, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kTileWords, 64);
  _tile_stored(2, c + 2 * kTileWords, 64);
  _tile_stored(3, c + 3 * kTileWords, 64);
}

// ---- scores ----

// 2^x to two units in the last place, 0 from -inf. The polynomial is 1 + f q(f) for f in [0, 1], q
// such that the relative error's maximum is least.
LOWBITCORE_INLINE __m512 exp2(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(1.8671302e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.0170298e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5799913e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4016444e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9315130e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);
}

// Of 32 queries as lanes, those that see key `key` of the same strip.
inline uint32_t lanes_from(int64_t key) { return ~uint32_t{0} << key; }

// In a strip's scores of its own keys, -inf wherever a key comes after the query.
inline void hide_later_keys(float* s) {
  const __m512 hidden = _mm512_set1_ps(-INFINITY);
  for (int64_t key = 0; key < kStrip; ++key) {
    float* row = s + key / 16 * 2 * kTileWords + key % 16 * 16;
    const uint32_t lanes = ~lanes_from(key);
    _mm512_mask_store_ps(row, static_cast<__mmask16>(lanes), hidden);
    _mm512_mask_store_ps(row + kTileWords, static_cast<__mmask16>(lanes >> 16), hidden);
  }
}

// ---- results ----

// Sums [strips][panels] of columns by queries, times a factor for each query, to rows.
inline void store_columns(const float* c, int64_t panels, const __m512 (&factor)[2], int64_t rows,
                          uint16_t* to, int64_t stride) {
  for (int64_t p = 0; p < panels; ++p, c += kSums) {
    for (int64_t half = 0; half < 2; ++half) {
      const float* tile = c + half * kTileWords;
      __m512 low[16], high[16];
      for (int i = 0; i < 16; ++i) {
        low[i] = _mm512_mul_ps(_mm512_load_ps(tile + i * 16), factor[half]);
        high[i] = _mm512_mul_ps(_mm512_load_ps(tile + 2 * kTileWords + i * 16), factor[half]);
      }
      transpose_16x16(low);
      transpose_16x16(high);
      for (int64_t i = 0; i < 16 && half * 16 + i < rows; ++i) {
        store_bf16_line(low[i], high[i], to + (half * 16 + i) * stride + p * kPanel);
      }
    }
  }
}

// Sums [strips][panels] of keys by columns, times a factor, to all rows.
inline void store_rows(const float* c, float factor, const Heads& out, uint16_t* head) {
  const __m512 f = _mm512_set1_ps(factor);
  const int64_t panels = out.cols / kPanel;
  for (int64_t row = 0; row < out.rows; ++row) {
    const float* from =
        c + row / kStrip * panels * kSums + row % kStrip / 16 * 2 * kTileWords + row % 16 * 16;
    uint16_t* to = head + row * out.row_stride;
    for (int64_t p = 0; p < panels; ++p, from += kSums, to += kPanel) {
      store_bf16_line(_mm512_mul_ps(_mm512_load_ps(from), f),
                      _mm512_mul_ps(_mm512_load_ps(from + kTileWords), f), to);
    }
  }
}

// ---- forward ----

// The softmax of 32 queries as far as it has come (see RunningSoftmax).
struct TileSoftmax {
  __m512 maximum[2], total[2];  // of scores, of 2^ what they lie under it times `scale`

  TileSoftmax()
      : maximum{_mm512_set1_ps(kLeast), _mm512_set1_ps(kLeast)},
        total{_mm512_setzero_ps(), _mm512_setzero_ps()} {}

  // Scores of `strips` of keys become probabilities under the new maximum, as right operands;
  // `shrink` is what earlier ones are to be multiplied by.
  void take(const float* s, int64_t strips, float scale, uint32_t* p, __m512 (&shrink)[2]) {
    const __m512 unit = _mm512_set1_ps(scale);
    for (int64_t half = 0; half < 2; ++half) {
      const float* scores = s + half * kTileWords;
      __m512 most[4];
      for (__m512& m : most) m = _mm512_set1_ps(-INFINITY);
      for (int64_t tile = 0; tile < 2 * strips; ++tile) {
        for (int64_t r = 0; r < 16; ++r) {
          const __m512 score = _mm512_load_ps(scores + tile * 2 * kTileWords + r * 16);
          most[r % 4] = _mm512_max_ps(most[r % 4], score);
        }
      }
      const __m512 seen =
          _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
      const __m512 now = _mm512_max_ps(maximum[half], seen);
      shrink[half] = exp2(_mm512_mul_ps(_mm512_sub_ps(maximum[half], now), unit));
      maximum[half] = now;
      __m512 sum[2] = {_mm512_mul_ps(total[half], shrink[half]), _mm512_setzero_ps()};
      for (int64_t pair = 0; pair < 16 * strips; ++pair) {
        Vec e[2];
        for (int i = 0; i < 2; ++i) {
          const float* row = scores + pair / 8 * 2 * kTileWords + (pair % 8 * 2 + i) * 16;
          e[i].v = exp2(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(row), now), unit));
          sum[i] = _mm512_add_ps(sum[i], e[i].v);
        }
        bf16_pairs(e[0], e[1])
            .store(p + pair / 16 * kStepWords + half * kTileWords + pair % 16 * 16);
      }
      total[half] = _mm512_add_ps(sum[0], sum[1]);
    }
  }
};

inline int64_t strip_words(int64_t cols) { return cols / kPanel * kStepWords; }
inline int64_t strip_sums(int64_t cols) { return cols / kPanel * kSums; }

size_t tiles_attention_workspace(int64_t rows, int64_t cols, int threads) {
  const int64_t strips = divide_up(rows, kStrip);
  return static_cast<size_t>(threads) *
         static_cast<size_t>((2 * strips + 1) * strip_words(cols) + strip_sums(cols)) * 4;
}

struct TilesAttentionForward {
  const AttentionInputs& in;
  const Heads& out;
  const View<float>& lse;

  int64_t together;  // heads of queries that attend to the same keys and values

  int64_t rows = in.q.rows, cols = in.q.cols, panels = cols / kPanel;
  int64_t strips = divide_up(rows, kStrip), words = strip_words(cols);

  void operator()(int64_t b, int64_t heads, void* memory) const {
    const int64_t first = heads * together, kv_head = first * in.k.heads / in.q.heads;
    auto* keys = static_cast<uint32_t*>(memory);
    uint32_t* values = keys + strips * words;
    put_strips(HeadRows(in.k, b, kv_head), 0, strips, put_left, keys);
    put_strips(HeadRows(in.v, b, kv_head), 0, strips, put_transposed_left, values);
    for (int64_t h = first; h < first + together; ++h) {
      for (int64_t i = 0; i < strips; ++i) queries(b, h, i, keys, values, values + strips * words);
    }
  }

  // Strip `i` of a head's queries; behind the operand of these lies room for their sums.
  void queries(int64_t b, int64_t h, int64_t i, const uint32_t* keys, const uint32_t* values,
               uint32_t* operand) const {
    alignas(64) float s[kKeyStrips * kSums];
    alignas(64) uint32_t p[kKeyStrips * kStepWords];
    auto* o = reinterpret_cast<float*>(operand + words);
    put_strips(HeadRows(in.q, b, h), i, 1, put_transposed_right, operand);
    std::memset(o, 0, static_cast<size_t>(panels * kSums) * 4);
    TileSoftmax softmax;
    for (int64_t j = 0; j <= i; j += kKeyStrips) {
      const int64_t count = smaller(kKeyStrips, i + 1 - j);
      for (int64_t n = 0; n < count; ++n) {
        multiply_strips(panels, keys + (j + n) * words, kStepWords, operand, kStepWords,
                        s + n * kSums, false);
      }
      if (j + count > i) hide_later_keys(s + (count - 1) * kSums);
      __m512 shrink[2];
      softmax.take(s, count, in.scale * kLog2E, p, shrink);
      for (int64_t r = 0; r < panels * kSums; r += 16) {
        const __m512 sum = _mm512_mul_ps(_mm512_load_ps(o + r), shrink[r / kTileWords % 2]);
        _mm512_store_ps(o + r, sum);
      }
      for (int64_t d = 0; d < panels; ++d) {
        multiply_strips(count, values + j * words + d * kStepWords, words, p, kStepWords,
                        o + d * kSums, true);
      }
    }
    const int64_t row = i * kStrip, here = smaller(kStrip, rows - row);
    alignas(64) float maximum[kStrip], total[kStrip];
    __m512 inverse[2];
    for (int half = 0; half < 2; ++half) {
      _mm512_store_ps(maximum + half * 16, softmax.maximum[half]);
      _mm512_store_ps(total + half * 16, softmax.total[half]);
      inverse[half] = _mm512_div_ps(_mm512_set1_ps(1.0f), softmax.total[half]);
    }
    store_columns(o, panels, inverse, here, words_of(out, b, h) + row * out.row_stride,
                  out.row_stride);
    float* logs = lse.data + (b * in.q.heads + h) * lse.stride + row;
    for (int64_t r = 0; r < here; ++r) logs[r] = maximum[r] * in.scale + ::logf(total[r]);
  }
};

void tiles_attention(const AttentionInputs& in, Heads out, View<float> lse, const Resources& use) {
  const size_t scratch = tiles_attention_workspace(in.q.rows, in.q.cols, 1);
  // Keys and values are packed once for all queries that attend to them, unless threads would wait.
  const int64_t shares = in.k.batch * in.k.heads;
  const bool even = divide_up(shares, use.threads) * use.threads * 10 <= shares * 11;
  const int64_t together = even ? in.q.heads / in.k.heads : 1;
  for_each_head(even ? in.k : in.q, scratch, use, TilesAttentionForward{in, out, lse, together});
}

// ---- backward ----

// What a strip of keys and one of queries leave for the products: probabilities and the gradients
// of scores as left operands, the latter as right ones, too.
struct BlockOperands {
  alignas(64) uint32_t p[kBlock][kBlock][kStepWords];         // [keys][queries]
  alignas(64) uint32_t ds[kBlock][kBlock][kStepWords];        // [keys][queries]
  alignas(64) uint32_t ds_right[kBlock][kBlock][kStepWords];  // [keys][queries]
};

// Of 32 keys by 32 queries, from scores s and dp = V dO^T; lse is in units of log 2.
template <bool Diagonal>
void grad_scores(const float* s, const float* dp, float scale, const float* lse, const float* delta,
                 uint32_t* p, uint32_t* ds, uint32_t* ds_right) {
  const __m512 unit = _mm512_set1_ps(scale);
  __m512 log[2], mean[2];
  for (int half = 0; half < 2; ++half) {
    log[half] = _mm512_load_ps(lse + half * 16);
    mean[half] = _mm512_load_ps(delta + half * 16);
  }
  for (int64_t key = 0; key < kStrip; key += 2) {
    __m512i line[2];
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t at = (key + i) / 16 * 2 * kTileWords + (key + i) % 16 * 16;
      __m512 e[2], g[2];
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t here = at + half * kTileWords;
        const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(s + here), unit, log[half]);
        e[half] = exp2(_mm512_min_ps(_mm512_setzero_ps(), x));  // see grad_scores on vectors
        if constexpr (Diagonal) {
          const auto seen = static_cast<__mmask16>(lanes_from(key + i) >> (half * 16));
          e[half] = _mm512_maskz_mov_ps(seen, e[half]);
        }
        g[half] = _mm512_mul_ps(e[half], _mm512_sub_ps(_mm512_load_ps(dp + here), mean[half]));
      }
      const auto probabilities = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(e[1], e[0]));
      line[i] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(g[1], g[0]));
      _mm512_store_si512(p + (key + i) * 16, probabilities);
      _mm512_store_si512(ds + (key + i) * 16, line[i]);
    }
    const RowPair pair(line[0], line[1]);
    _mm512_store_si512(ds_right + key / 2 * 16, pair.half[0]);
    _mm512_store_si512(ds_right + kTileWords + key / 2 * 16, pair.half[1]);
  }
}

// The sum of a row of dO times its row of O, which is that of P dP.
inline float row_product(const uint16_t* a, const uint16_t* b, int64_t cols) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < cols; c += kWidth) {
    sum = _mm512_fmadd_ps(Vec::load_bf16(a + c).v, Vec::load_bf16(b + c).v, sum);
  }
  return _mm512_reduce_add_ps(sum);
}

size_t tiles_attention_backward_workspace(int64_t rows, int64_t cols, int threads) {
  const int64_t strips = divide_up(rows, kStrip), chunk = smaller(strips, kChunk);
  const int64_t words = 3 * strips + 4 * chunk, sums = 2 * strips + chunk;
  return static_cast<size_t>(threads) *
         static_cast<size_t>(words * strip_words(cols) + sums * strip_sums(cols) +
                             2 * chunk * kStrip) *
         4;
}

struct TilesAttentionBackward {
  const ConstHeads& d_out;
  const AttentionInputs& in;
  const ConstHeads& out;
  const View<const float>& lse;
  const Heads &dq, &dk, &dv;

  int64_t rows = in.q.rows, cols = in.q.cols, panels = cols / kPanel;
  int64_t strips = divide_up(rows, kStrip), words = strip_words(cols), sums = strip_sums(cols);

  // A head of k and v, with all that attend to it.
  struct Scratch {
    uint32_t *keys, *keys_transposed, *values;
    uint32_t *queries, *queries_transposed, *grads, *grads_transposed;
    float *dk, *dv, *dq, *lse, *delta;

    Scratch(const TilesAttentionBackward& a, void* memory) {
      const int64_t chunk = smaller(a.strips, kChunk);
      keys = static_cast<uint32_t*>(memory);
      keys_transposed = keys + a.strips * a.words;
      values = keys_transposed + a.strips * a.words;
      queries = values + a.strips * a.words;
      queries_transposed = queries + chunk * a.words;
      grads = queries_transposed + chunk * a.words;
      grads_transposed = grads + chunk * a.words;
      dk = reinterpret_cast<float*>(grads_transposed + chunk * a.words);
      dv = dk + a.strips * a.sums;
      dq = dv + a.strips * a.sums;
      lse = dq + chunk * a.sums;
      delta = lse + chunk * kStrip;
    }
  };

  void operator()(int64_t b, int64_t kv_head, void* memory) const {
    const Scratch t(*this, memory);
    const int64_t group = in.q.heads / in.k.heads;
    const HeadRows k(in.k, b, kv_head), v(in.v, b, kv_head);
    put_strips(k, 0, strips, put_left, t.keys);
    put_strips(k, 0, strips, put_transposed_left, t.keys_transposed);
    put_strips(v, 0, strips, put_left, t.values);
    std::memset(t.dk, 0, static_cast<size_t>(strips * sums) * 4);
    std::memset(t.dv, 0, static_cast<size_t>(strips * sums) * 4);
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
      for (int64_t first = 0; first < strips; first += kChunk) {
        queries(b, h, first, smaller(kChunk, strips - first), t);
      }
    }
    store_rows(t.dk, in.scale, dk, words_of(dk, b, kv_head));
    store_rows(t.dv, 1.0f, dv, words_of(dv, b, kv_head));
  }

  // `count` strips of queries of a head, from `first` on.
  void queries(int64_t b, int64_t h, int64_t first, int64_t count, const Scratch& t) const {
    const HeadRows q(in.q, b, h), g(d_out, b, h), o(out, b, h);
    put_strips(q, first, count, put_right, t.queries);
    put_strips(q, first, count, put_transposed_right, t.queries_transposed);
    put_strips(g, first, count, put_right, t.grads);
    put_strips(g, first, count, put_transposed_right, t.grads_transposed);
    const float* logs = lse.data + (b * in.q.heads + h) * lse.stride;
    for (int64_t i = 0; i < count * kStrip; ++i) {
      const int64_t row = first * kStrip + i;
      const bool there = row < rows;
      t.lse[i] = there ? logs[row] * kLog2E : 0.0f;
      t.delta[i] =
          there ? row_product(g.data + row * g.stride, o.data + row * o.stride, cols) : 0.0f;
    }
    std::memset(t.dq, 0, static_cast<size_t>(count * sums) * 4);
    const int64_t end = first + count;
    for (int64_t j = 0; j < end; j += kBlock) {
      for (int64_t i = larger(first, j); i < end; i += kBlock) {
        block(j, smaller(kBlock, end - j), i, smaller(kBlock, end - i), first, t);
      }
    }
    const __m512 scale = _mm512_set1_ps(in.scale);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = (first + i) * kStrip;
      store_columns(t.dq + i * sums, panels, {scale, scale}, smaller(kStrip, rows - row),
                    words_of(dq, b, h) + row * dq.row_stride, dq.row_stride);
    }
  }

  // Strips of keys from j on by strips of queries from i on, of which the chunk's first is `first`.
  void block(int64_t j, int64_t key_strips, int64_t i, int64_t query_strips, int64_t first,
             const Scratch& t) const {
    BlockOperands operands;
    alignas(64) float s[kSums], dp[kSums];
    const int64_t i0 = i - first;
    for (int64_t n = 0; n < query_strips; ++n) {
      const int64_t at = i0 + n;
      for (int64_t m = 0; m < key_strips && j + m <= i + n; ++m) {
        multiply_strips(panels, t.keys + (j + m) * words, kStepWords,
                        t.queries_transposed + at * words, kStepWords, s, false);
        multiply_strips(panels, t.values + (j + m) * words, kStepWords,
                        t.grads_transposed + at * words, kStepWords, dp, false);
        const auto grad = j + m == i + n ? grad_scores<true> : grad_scores<false>;
        grad(s, dp, in.scale * kLog2E, t.lse + at * kStrip, t.delta + at * kStrip, operands.p[m][n],
             operands.ds[m][n], operands.ds_right[m][n]);
      }
    }
    for (int64_t m = 0; m < key_strips; ++m) {
      const int64_t n = larger(0, j + m - i), from = (i0 + n) * words, to = (j + m) * sums;
      for (int64_t d = 0; d < panels; ++d) {
        multiply_strips(query_strips - n, operands.p[m][n], kStepWords,
                        t.grads + from + d * kStepWords, words, t.dv + to + d * kSums, true);
        multiply_strips(query_strips - n, operands.ds[m][n], kStepWords,
                        t.queries + from + d * kStepWords, words, t.dk + to + d * kSums, true);
      }
    }
    for (int64_t n = 0; n < query_strips; ++n) {
      const int64_t seen = smaller(key_strips, i + n - j + 1);
      for (int64_t d = 0; d < panels; ++d) {
        multiply_strips(seen, t.keys_transposed + j * words + d * kStepWords, words,
                        operands.ds_right[0][n], kBlock * kStepWords,
                        t.dq + (i0 + n) * sums + d * kSums, true);
      }
    }
  }
};

void tiles_attention_backward(ConstHeads d_out, const AttentionInputs& in, ConstHeads out,
                              View<const float> lse, Heads dq, Heads dk, Heads dv,
                              const Resources& use) {
  const size_t scratch = tiles_attention_backward_workspace(in.q.rows, in.q.cols, 1);
  for_each_head(in.k, scratch, use, TilesAttentionBackward{d_out, in, out, lse, dq, dk, dv});
}

}  // namespace
}  // namespace lowbitcore
