// RMSNorm, rotary positions (RoPE), SwiGLU and dropout: a row at a time, in one pass over memory.
#pragma once

#include "common.h"

namespace lowbitcore {
namespace {

// Calls f(row) for all rows, of which a thread takes about so many elements at a time.
template <typename F>
void for_each_row(const ConstMatrix& m, const Resources& use, const F& f) {
  constexpr int64_t kElements = 1 << 14;
  const int64_t step = larger(1, kElements / m.cols);
  parallel_for(divide_up(m.rows, step), use.threads, [&](int64_t part, int) {
    const int64_t end = smaller(m.rows, (part + 1) * step);
    for (int64_t row = part * step; row < end; ++row) f(row);
  });
}

// The type of the activations becomes a constant of the loop.
template <typename F>
inline void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(std::integral_constant<DType, DType::f32>());
    case DType::bf16:
      return f(std::integral_constant<DType, DType::bf16>());
    default:
      return f(std::integral_constant<DType, DType::f16>());
  }
}

// A value as the type holds it.
template <DType Type>
Vec rounded(const Vec& v) {
  if constexpr (Type == DType::bf16) return round_bf16(v);
  if constexpr (Type == DType::f16) return round_f16(v);
  return v;
}

// All lanes, one after another.
inline float lane_sum(const Vec& v) {
  alignas(64) float lanes[kWidth];
  v.store(lanes);
  float sum = 0.0f;
  for (const float lane : lanes) sum += lane;
  return sum;
}

// The sum of a row of products in a fixed order: two vectors in turn, then lane after lane.
template <typename F>
float row_sum(int64_t cols, const F& product) {
  Vec even = Vec::broadcast(0.0f), odd = even;
  for (int64_t c = 0; c < cols; c += 2 * kWidth) {
    even = even + product(c);
    odd = odd + product(c + kWidth);
  }
  return lane_sum(even + odd);
}

// e^x by 2^n e^r with |r| <= ln 2 / 2; relative error below 4e-7. What lies beyond the range of
// normal numbers is taken for its end. Keeps NaN.
inline Vec exp(const Vec& x) {
  const Vec in = min(Vec::broadcast(88.3f), max(Vec::broadcast(-87.3f), x));
  const Vec n = round(in * Vec::broadcast(1.44269504f));
  Vec r = fnmadd(n, Vec::broadcast(0.693145752f), in);  // a number with few bits, so exact
  r = fnmadd(n, Vec::broadcast(1.42860677e-6f), r);
  Vec p = Vec::broadcast(1.0f / 720);
  constexpr float kTerms[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float term : kTerms) p = fmadd(p, r, Vec::broadcast(term));
  // Above 1.5 * 2^23 an integer lies in the low bits of a mantissa.
  const Vec exponent = n + Vec::broadcast(12582912.0f + 127.0f);
  return p * as_int(exponent).template left<23>().as_float();
}

// 0 where it would be no normal number. Keeps NaN.
inline Vec exp_or_zero(const Vec& x) {
  return select_less(x, Vec::broadcast(-87.3f), Vec::broadcast(0.0f), exp(x));
}

// 0 where it would be no normal number.
inline Vec sigmoid(const Vec& x) {
  const Vec one = Vec::broadcast(1.0f), zero = Vec::broadcast(0.0f);
  return select_less(x, Vec::broadcast(-87.3f), zero, one / (one + exp(zero - x)));
}

// 1 / sqrt(mean(x^2) + eps)
inline float inverse_size(const char* row, DType dtype, int64_t cols, float eps) {
  const float sum = row_sum(cols, [&](int64_t c) {
    const Vec v = load_as_float(row, dtype, c);
    return v * v;
  });
  return 1.0f / __builtin_sqrtf(sum / static_cast<float>(cols) + eps);
}

void rms_norm(ConstMatrix x, ConstMatrix weight, float eps, Matrix y, const Resources& use) {
  const char* w = row_pointer(weight, 0);
  with_dtype(x.dtype, [&](auto type) {
    constexpr DType dtype = decltype(type)::value;
    for_each_row(x, use, [&](int64_t row) {
      const char* in = row_pointer(x, row);
      char* out = row_pointer(y, row);
      const Vec scale = Vec::broadcast(inverse_size(in, dtype, x.cols, eps));
      for (int64_t c = 0; c < x.cols; c += kWidth) {
        const Vec v = rounded<dtype>(load_as_float(in, dtype, c) * scale);
        store_as(load_as_float(w, dtype, c) * v, out, dtype, c);
      }
    });
  });
}

// With r = 1 / sqrt(mean(x^2) + eps) and g = weight * dy, dx = r (g - x r^2 mean(g x)).
void rms_norm_backward(ConstMatrix dy, ConstMatrix x, ConstMatrix weight, float eps, Matrix dx,
                       const Resources& use) {
  const char* w = row_pointer(weight, 0);
  with_dtype(x.dtype, [&](auto type) {
    constexpr DType dtype = decltype(type)::value;
    for_each_row(x, use, [&](int64_t row) {
      const char* in = row_pointer(x, row);
      const char* grad = row_pointer(dy, row);
      char* out = row_pointer(dx, row);
      const auto g = [&](int64_t c) {
        return load_as_float(w, dtype, c) * load_as_float(grad, dtype, c);
      };
      const float r = inverse_size(in, dtype, x.cols, eps);
      const float sum =
          row_sum(x.cols, [&](int64_t c) { return g(c) * load_as_float(in, dtype, c); });
      const Vec scale = Vec::broadcast(r);
      const Vec along = Vec::broadcast(r * r * (sum / static_cast<float>(x.cols)));
      for (int64_t c = 0; c < x.cols; c += kWidth) {
        store_as(scale * fnmadd(along, load_as_float(in, dtype, c), g(c)), out, dtype, c);
      }
    });
  });
}

void rotate(ConstMatrix x, ConstMatrix cos, ConstMatrix sin, bool inverse, Matrix y,
            const Resources& use) {
  const int64_t half = cos.cols / 2;
  with_dtype(x.dtype, [&](auto type) {
    constexpr DType dtype = decltype(type)::value;
    for_each_row(x, use, [&](int64_t row) {
      const char *a = row_pointer(cos, row % cos.rows), *b = row_pointer(sin, row % cos.rows);
      const char* in = row_pointer(x, row);
      char* out = row_pointer(y, row);
      for (int64_t first = 0; first < x.cols; first += cos.cols) {
        for (int64_t c = 0; c < half; c += kWidth) {
          const Vec x1 = load_as_float(in, dtype, first + c);
          const Vec x2 = load_as_float(in, dtype, first + half + c);
          const Vec cos1 = load_as_float(a, dtype, c), cos2 = load_as_float(a, dtype, half + c);
          const Vec sin1 = load_as_float(b, dtype, c), sin2 = load_as_float(b, dtype, half + c);
          const Vec s1 = rounded<dtype>(x2 * (inverse ? sin2 : sin1));
          const Vec s2 = rounded<dtype>(x1 * (inverse ? sin1 : sin2));
          const Vec c1 = rounded<dtype>(x1 * cos1), c2 = rounded<dtype>(x2 * cos2);
          store_as(inverse ? c1 + s1 : c1 - s1, out, dtype, first + c);
          store_as(inverse ? c2 - s2 : c2 + s2, out, dtype, first + half + c);
        }
      }
    });
  });
}

void swiglu(ConstMatrix gate, ConstMatrix up, Matrix out, const Resources& use) {
  with_dtype(gate.dtype, [&](auto type) {
    constexpr DType dtype = decltype(type)::value;
    for_each_row(gate, use, [&](int64_t row) {
      const char *a = row_pointer(gate, row), *b = row_pointer(up, row);
      char* o = row_pointer(out, row);
      for (int64_t c = 0; c < gate.cols; c += kWidth) {
        const Vec g = load_as_float(a, dtype, c);
        const Vec silu = rounded<dtype>(g * sigmoid(g));
        store_as(silu * load_as_float(b, dtype, c), o, dtype, c);
      }
    });
  });
}

void swiglu_backward(ConstMatrix d_out, ConstMatrix gate, ConstMatrix up, Matrix d_gate,
                     Matrix d_up, const Resources& use) {
  with_dtype(gate.dtype, [&](auto type) {
    constexpr DType dtype = decltype(type)::value;
    for_each_row(gate, use, [&](int64_t row) {
      const char *a = row_pointer(gate, row), *b = row_pointer(up, row);
      const char* d = row_pointer(d_out, row);
      char *da = row_pointer(d_gate, row), *db = row_pointer(d_up, row);
      const Vec one = Vec::broadcast(1.0f);
      for (int64_t c = 0; c < gate.cols; c += kWidth) {
        const Vec g = load_as_float(a, dtype, c), grad = load_as_float(d, dtype, c);
        const Vec s = sigmoid(g), silu = g * s;
        const Vec slope = s * fmadd(g, one - s, one);
        store_as(grad * load_as_float(b, dtype, c) * slope, da, dtype, c);
        store_as(grad * silu, db, dtype, c);
      }
    });
  });
}

// SplitMix64 (Steele, Lea and Flood 2014): the number of a place in the sequence of a seed.
inline uint64_t random_at(uint64_t seed, uint64_t place) {
  uint64_t z = seed + (place + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Sixteen generators of 32 bits a row (Marsaglia's xorshift), which need no product: 16 bits of a
// number decide on an element.
struct RowDraws {
  static constexpr int kStreams = 16;
  alignas(64) uint32_t state[kStreams];

  RowDraws(uint64_t seed, int64_t row) {
    for (int i = 0; i < kStreams; i += 2) {
      const uint64_t number = random_at(seed, static_cast<uint64_t>((row * kStreams + i) / 2));
      state[i] = static_cast<uint32_t>(number) | 1;  // of zeros would come zeros
      state[i + 1] = static_cast<uint32_t>(number >> 32) | 1;
    }
  }
  // What to multiply the next 32 elements by.
  void next(uint32_t dropped, float scale, float* factors) {
    for (int i = 0; i < kStreams; ++i) {
      uint32_t s = state[i];
      s ^= s << 13;
      s ^= s >> 17;
      s ^= s << 5;
      state[i] = s;
      factors[i] = (s & 0xffff) < dropped ? 0.0f : scale;
      factors[kStreams + i] = (s >> 16) < dropped ? 0.0f : scale;
    }
  }
};

void dropout(ConstMatrix x, uint64_t seed, uint32_t dropped, Matrix y, const Resources& use) {
  constexpr int64_t kStep = 2 * RowDraws::kStreams;
  const float scale = 65536.0f / static_cast<float>(65536 - dropped);
  with_dtype(x.dtype, [&](auto type) {
    constexpr DType dtype = decltype(type)::value;
    for_each_row(x, use, [&](int64_t row) {
      const char* in = row_pointer(x, row);
      char* out = row_pointer(y, row);
      RowDraws draws(seed, row);
      for (int64_t c = 0; c < x.cols; c += kStep) {
        alignas(64) float factors[kStep];
        draws.next(dropped, scale, factors);
        for (int64_t i = 0; i < kStep; i += kWidth) {
          const Vec v = load_as_float(in, dtype, c + i) * Vec::load(factors + i);
          store_as(v, out, dtype, c + i);
        }
      }
    });
  });
}

}  // namespace
}  // namespace lowbitcore
