// Round-to-nearest, GPTQ, and weights in training.
//
// Rows of the buffers of the first two are input columns, lanes are outputs: every output is
// quantized by the same sequence of exactly rounded operations, whatever the width of a vector.
#pragma once

#include "common.h"

namespace lowbitcore {
namespace {

struct Grid {
  Vec scale, zero;
};

// The smallest positive fp16: where a tiny range would round to a scale of zero.
constexpr float kSmallestScale = 5.9604644775390625e-8f;

inline Vec quantize_lane(const Vec& w, const Grid& grid, const Vec& max_code) {
  const Vec q = round(w / grid.scale) + grid.zero;
  return min(max(q, Vec::broadcast(0.0f)), max_code);
}

inline Grid make_grid(const Vec& low, const Vec& high, const Vec& max_code, const GridOptions& o) {
  const Vec zero = Vec::broadcast(0.0f), one = Vec::broadcast(1.0f);
  const Vec range = high - low;
  const Vec scale = max(round_f16(range / max_code), Vec::broadcast(kSmallestScale));
  Grid grid;
  grid.scale = select_less(zero, range, scale, one);
  if (o.sym) {
    grid.zero = round((max_code + one) * Vec::broadcast(0.5f));
  } else {
    const Vec z = round((zero - low) / grid.scale);
    grid.zero = min(max(z, zero), max_code);
  }
  return grid;
}

// The grid of `count` rows. Row i is w + rows[i]*kStripOutputs, or w + i*kStripOutputs without
// `rows`; its squared errors count importance[i] times, or once without.
inline Grid find_grid(const float* w, const int32_t* rows, const float* importance, int64_t count,
                      int bits, const GridOptions& options) {
  const auto row = [&](int64_t i) {
    return Vec::load(w + (rows != nullptr ? rows[i] : i) * kStripOutputs);
  };
  const Vec zero = Vec::broadcast(0.0f);
  const Vec max_code = Vec::broadcast(static_cast<float>((1 << bits) - 1));
  Vec low = zero, high = zero;
  for (int64_t i = 0; i < count; ++i) {
    low = min(low, row(i));
    high = max(high, row(i));
  }
  if (options.sym) {
    high = max(zero - low, high);
    low = zero - high;
  }
  Grid best = make_grid(low, high, max_code, options);
  if (!options.mse) return best;

  const auto error_of = [&](const Grid& grid) {
    Vec error = zero;
    for (int64_t i = 0; i < count; ++i) {
      const Vec x = row(i);
      const Vec e = fnmadd(grid.scale, quantize_lane(x, grid, max_code) - grid.zero, x);
      const Vec weighted = importance != nullptr ? e * Vec::broadcast(importance[i]) : e;
      error = fmadd(weighted, e, error);
    }
    return error;
  };
  Vec best_error = error_of(best);
  const auto consider = [&](const Grid& grid) {
    const Vec error = error_of(grid);
    best.scale = select_less(error, best_error, grid.scale, best.scale);
    best.zero = select_less(error, best_error, grid.zero, best.zero);
    best_error = min(error, best_error);
  };
  // Both ends are clipped alike, down to a fifth of the range; then scale and zero move apart.
  for (int step = 1; step <= 40; ++step) {
    const Vec shrink = Vec::broadcast(1.0f - 0.02f * static_cast<float>(step));
    consider(make_grid(low * shrink, high * shrink, max_code, options));
  }
  const Grid centre = best;
  const int reach = options.sym ? 0 : 2;
  for (int shift = -reach; shift <= reach; ++shift) {
    for (int step = -6; step <= 6; ++step) {
      const Vec factor = Vec::broadcast(1.0f + 0.025f * static_cast<float>(step));
      const Vec z = centre.zero + Vec::broadcast(static_cast<float>(shift));
      consider({max(round_f16(centre.scale * factor), Vec::broadcast(kSmallestScale)),
                min(max(z, zero), max_code)});
    }
  }
  return best;
}

inline void store_grid(const Grid& grid, int64_t g, int64_t first, int64_t lane, int64_t count,
                       const View<float>& scales, const View<uint8_t>& zeros) {
  alignas(64) float s[kWidth], z[kWidth];
  grid.scale.store(s);
  grid.zero.store(z);
  for (int64_t i = 0; i < kWidth && lane + i < count; ++i) {
    scales.data[g * scales.stride + first + lane + i] = s[i];
    zeros.data[g * zeros.stride + first + lane + i] = static_cast<uint8_t>(z[i]);
  }
}

// One input column of a strip's integers into codes [N,K].
inline void store_codes(const float* q, int64_t column, int64_t first, int64_t count,
                        const View<uint8_t>& codes) {
  for (int64_t n = 0; n < count; ++n) {
    codes.data[(first + n) * codes.stride + column] = static_cast<uint8_t>(q[n]);
  }
}

void quantize_rtn(ConstMatrix weight, const QuantFormat& f, const GridOptions& options,
                  View<uint8_t> codes, View<float> scales, View<uint8_t> zeros,
                  const Resources& use) {
  const int64_t group = group_columns(f);
  const Vec max_code = Vec::broadcast(static_cast<float>((1 << f.bits) - 1));
  float* scratch = static_cast<float*>(use.workspace);
  parallel_for(
      divide_up(f.out_features, kStripOutputs), use.threads, [&](int64_t strip, int thread) {
        const int64_t first = strip * kStripOutputs,
                      count = smaller(kStripOutputs, f.out_features - first);
        float* w = scratch + thread * group * kStripOutputs;
        for (int64_t g = 0; g < f.groups(); ++g) {
          const int64_t k0 = g * group, columns = smaller(group, f.in_features - k0);
          ConstMatrix part = weight;
          part.data = row_pointer(weight, 0) + k0 * bytes_of(weight.dtype);
          part.cols = columns;
          load_columns(part, first, count, kStripOutputs, w);
          for (int64_t lane = 0; lane < kStripOutputs; lane += kWidth) {
            const Grid grid = find_grid(w + lane, nullptr, nullptr, columns, f.bits, options);
            store_grid(grid, g, first, lane, count, scales, zeros);
            for (int64_t k = 0; k < columns; ++k) {
              float* at = w + k * kStripOutputs + lane;
              quantize_lane(Vec::load(at), grid, max_code).store(at);
            }
          }
          for (int64_t k = 0; k < columns; ++k) {
            store_codes(w + k * kStripOutputs, k0 + k, first, count, codes);
          }
        }
      });
}

size_t quantize_rtn_workspace(const QuantFormat& f, int threads) {
  return static_cast<size_t>(threads * group_columns(f) * kStripOutputs) * sizeof(float);
}

// ---- GPTQ ----

constexpr int64_t kGptqBlock = 128;  // columns whose errors are applied to the rest together

// w[row(i)] -= sum over j in [begin, end) of u[j,i] * error[j - begin], in rising j, for the rows
// i in [from, to). Four rows and two vectors at a time; the order of the sum is that of a column at
// a time, so how columns are blocked does not change a bit.
inline void apply_errors(const View<const float>& u, int64_t begin, int64_t end, int64_t from,
                         int64_t to, const float* error, const int32_t* order, float* w) {
  constexpr int kRowsAtOnce = 4, kVecs = 2;
  for (int64_t lane = 0; lane < kStripOutputs; lane += kVecs * kWidth) {
    int64_t i = from;
    for (; i + kRowsAtOnce <= to; i += kRowsAtOnce) {
      Vec acc[kRowsAtOnce][kVecs];
      for (int r = 0; r < kRowsAtOnce; ++r) {
        for (int v = 0; v < kVecs; ++v) {
          acc[r][v] = Vec::load(w + order[i + r] * kStripOutputs + lane + v * kWidth);
        }
      }
      for (int64_t j = begin; j < end; ++j) {
        Vec e[kVecs];
        for (int v = 0; v < kVecs; ++v) {
          e[v] = Vec::load(error + (j - begin) * kStripOutputs + lane + v * kWidth);
        }
        for (int r = 0; r < kRowsAtOnce; ++r) {
          const Vec c = Vec::broadcast(u.data[j * u.stride + i + r]);
          for (int v = 0; v < kVecs; ++v) acc[r][v] = fnmadd(c, e[v], acc[r][v]);
        }
      }
      for (int r = 0; r < kRowsAtOnce; ++r) {
        for (int v = 0; v < kVecs; ++v) {
          acc[r][v].store(w + order[i + r] * kStripOutputs + lane + v * kWidth);
        }
      }
    }
    for (; i < to; ++i) {
      for (int v = 0; v < kVecs; ++v) {
        float* at = w + order[i] * kStripOutputs + lane + v * kWidth;
        Vec acc = Vec::load(at);
        for (int64_t j = begin; j < end; ++j) {
          acc = fnmadd(Vec::broadcast(u.data[j * u.stride + i]),
                       Vec::load(error + (j - begin) * kStripOutputs + lane + v * kWidth), acc);
        }
        acc.store(at);
      }
    }
  }
}

// The grids of a strip, kept as floats: [G][kStripOutputs / kWidth][scale, zero][kWidth].
inline Grid load_grid(const float* grids, int64_t at) {
  const float* p = grids + at * 2 * kWidth;
  return {Vec::load(p), Vec::load(p + kWidth)};
}

inline void keep_grid(const Grid& grid, float* grids, int64_t at) {
  grid.scale.store(grids + at * 2 * kWidth);
  grid.zero.store(grids + at * 2 * kWidth + kWidth);
}

inline void gptq_strip(const GptqProblem& p, int64_t strip, float* w, float* error, float* grids) {
  const QuantFormat& f = p.format;
  const int64_t k = f.in_features, group = group_columns(f);
  const int64_t first = strip * kStripOutputs,
                count = smaller(kStripOutputs, f.out_features - first);
  constexpr int kVecs = kStripOutputs / kWidth;
  const Vec max_code = Vec::broadcast(static_cast<float>((1 << f.bits) - 1));

  load_columns(p.weight, first, count, kStripOutputs, w);
  for (int64_t i = 0; i < k; ++i) {
    if (p.dead[i]) std::memset(w + i * kStripOutputs, 0, kStripOutputs * sizeof(float));
  }
  if (p.options.static_groups) {
    for (int64_t g = 0; g < f.groups(); ++g) {
      const int64_t k0 = g * group;
      for (int v = 0; v < kVecs; ++v) {
        const Grid grid = find_grid(w + k0 * kStripOutputs + v * kWidth, nullptr, p.importance + k0,
                                    smaller(group, k - k0), f.bits, p.options.grid);
        keep_grid(grid, grids, g * kVecs + v);
        store_grid(grid, g, first, v * kWidth, count, p.scales, p.zeros);
      }
    }
  }

  double loss = 0.0;
  // A block never straddles the start of a group that was not complete before it, so that grids
  // found on the way see every earlier error: whole groups where they are shorter than a block,
  // else pieces.
  const int64_t whole = group <= kGptqBlock ? kGptqBlock / group * group : 0;
  for (int64_t begin = 0; begin < k;) {
    const int64_t block = whole > 0 ? whole : smaller(kGptqBlock, group - begin % group);
    const int64_t end = smaller(begin + block, k);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = (p.options.static_groups ? p.order[i] : i) / group;
      if (!p.options.static_groups && i % group == 0) {
        for (int v = 0; v < kVecs; ++v) {
          const Grid grid = find_grid(w + v * kWidth, p.order + i, p.importance + i,
                                      smaller(group, k - i), f.bits, p.options.grid);
          keep_grid(grid, grids, g * kVecs + v);
          store_grid(grid, g, first, v * kWidth, count, p.scales, p.zeros);
        }
      }
      float* column = w + p.order[i] * kStripOutputs;
      float* e = error + (i - begin) * kStripOutputs;
      alignas(64) float q[kStripOutputs];
      const Vec diagonal = Vec::broadcast(p.u.data[i * p.u.stride + i]);
      for (int v = 0; v < kVecs; ++v) {
        const Grid grid = load_grid(grids, g * kVecs + v);
        const Vec x = Vec::load(column + v * kWidth);
        const Vec code = quantize_lane(x, grid, max_code);
        code.store(q + v * kWidth);
        (fnmadd(grid.scale, code - grid.zero, x) / diagonal).store(e + v * kWidth);
      }
      store_codes(q, p.order[i], first, count, p.codes);
      for (int64_t n = 0; n < count; ++n) loss += static_cast<double>(e[n]) * e[n];
      apply_errors(p.u, i, i + 1, i + 1, end, e, p.order, w);
    }
    apply_errors(p.u, begin, end, end, k, error, p.order, w);
    begin = end;
  }
  p.loss[strip] = loss;
}

// Floats of a strip: its weights and the errors of a block, and its grids.
inline int64_t strip_floats(const QuantFormat& f) {
  return (f.in_features + kGptqBlock) * kStripOutputs;
}
inline int64_t grid_floats(const QuantFormat& f) { return f.groups() * 2 * kStripOutputs; }

size_t gptq_workspace(const QuantFormat& f, int threads) {
  return static_cast<size_t>(threads * (strip_floats(f) + grid_floats(f))) * sizeof(float);
}

void gptq(const GptqProblem& p, const Resources& use) {
  const int64_t floats = strip_floats(p.format);
  float* scratch = static_cast<float*>(use.workspace);
  parallel_for(divide_up(p.format.out_features, kStripOutputs), use.threads,
               [&](int64_t strip, int thread) {
                 float* w = scratch + thread * floats;
                 gptq_strip(p, strip, w, w + p.format.in_features * kStripOutputs,
                            scratch + use.threads * floats + thread * grid_floats(p.format));
               });
}

// ---- weights in training ----

// Groups that a thread takes at a time.
constexpr int64_t kLatentRows = 64;

// Calls f(r, latent values, scale, zero) for every group.
template <typename F>
inline void for_each_latent_row(const LatentWeight& w, int threads, const F& f) {
  parallel_for(divide_up(w.latent.rows, kLatentRows), threads, [&](int64_t i, int) {
    const int64_t end = smaller(w.latent.rows, (i + 1) * kLatentRows);
    for (int64_t r = i * kLatentRows; r < end; ++r) {
      f(r, w.latent.data + r * w.latent.stride, Vec::broadcast(w.scales.data[r * w.scales.stride]),
        Vec::broadcast(w.zeros.data[r * w.zeros.stride]));
    }
  });
}

// q - z. Operands are in the order in which NaN stays NaN.
inline Vec latent_steps(const float* latent, const Vec& zero, const Vec& max_code) {
  return min(max_code, max(Vec::broadcast(0.0f), round(Vec::load(latent)))) - zero;
}

void add_fake_quantized(const LatentWeight& w, Matrix out, const Resources& use) {
  const Vec max_code = Vec::broadcast(static_cast<float>((1 << w.bits) - 1));
  for_each_latent_row(w, use.threads,
                      [&](int64_t r, const float* latent, const Vec& scale, const Vec& zero) {
                        char* row = row_pointer(out, r);
                        for (int64_t c = 0; c < out.cols; c += kWidth) {
                          const Vec before = load_as_float(row, out.dtype, c);
                          const Vec steps = latent_steps(latent + c, zero, max_code);
                          store_as(fmadd(scale, steps, before), row, out.dtype, c);
                        }
                      });
}

void fake_quantized_grads(ConstMatrix dw, const LatentWeight& w, View<float> d_latent,
                          View<float> d_scales, const Resources& use) {
  const Vec max_code = Vec::broadcast(static_cast<float>((1 << w.bits) - 1));
  for_each_latent_row(w, use.threads,
                      [&](int64_t r, const float* latent, const Vec& scale, const Vec& zero) {
                        const char* row = row_pointer(dw, r);
                        Vec sum = Vec::broadcast(0.0f);
                        for (int64_t c = 0; c < dw.cols; c += kWidth) {
                          const Vec d = load_as_float(row, dw.dtype, c);
                          (d * scale).store(d_latent.data + r * d_latent.stride + c);
                          sum = fmadd(d, latent_steps(latent + c, zero, max_code), sum);
                        }
                        alignas(64) float lanes[kWidth];
                        sum.store(lanes);
                        for (int half = kWidth / 2; half > 0; half /= 2) {
                          for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
                        }
                        d_scales.data[r * d_scales.stride] = lanes[0];
                      });
}

}  // namespace
}  // namespace lowbitcore
