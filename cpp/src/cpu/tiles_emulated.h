// AMX in software, for tests on processors without it: the same kernels run on these tiles.
//
// What the real ones would fault on or leave undefined is made visible: no configuration, an
// unknown tile, a tile read before it was written. Real ones fault on a configuration that speaks
// of more than their eight tiles.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace lowbitcore {
namespace {
namespace emulated {

struct State {
  bool configured = false, written[8] = {};
  float tile[8][16][16];
};

inline State& state() {
  thread_local State s;
  return s;
}

inline float (&target(int t))[16][16] {
  State& s = state();
  if (!s.configured || t < 0 || t > 7) std::abort();
  s.written[t] = true;
  return s.tile[t];
}

inline float (&source(int t))[16][16] {
  if (t < 0 || t > 7 || !state().written[t]) std::abort();
  return target(t);
}

inline void load_config(const void* config) {
  const auto* c = static_cast<const std::uint8_t*>(config);
  if (state().configured || c[0] != 1) std::abort();
  for (int i = 1; i < 16; ++i) {
    if (c[i] != 0) std::abort();
  }
  for (int t = 0; t < 16; ++t) {
    const int bytes = t < 8 ? 64 : 0, rows = t < 8 ? 16 : 0;
    if (c[16 + 2 * t] != bytes || c[17 + 2 * t] != 0 || c[48 + t] != rows) std::abort();
  }
  state().configured = true;
}

inline void release() { state() = State(); }

inline void zero(int t) { std::memset(target(t), 0, sizeof(float[16][16])); }

inline void load(int t, const void* base, std::int64_t stride) {
  float (&tile)[16][16] = target(t);
  for (int r = 0; r < 16; ++r) {
    std::memcpy(tile[r], static_cast<const char*>(base) + r * stride, 64);
  }
}

inline void store(int t, void* base, std::int64_t stride) {
  const float (&tile)[16][16] = source(t);
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(base) + r * stride, tile[r], 64);
}

inline void dot_bf16(int c, int a, int b) {
  const float (&left)[16][16] = source(a);
  const float (&right)[16][16] = source(b);
  float (&sum)[16][16] = source(c);
  for (int r = 0; r < 16; ++r) {
    __m512 acc = _mm512_loadu_ps(sum[r]);
    for (int k = 0; k < 16; ++k) {
      const auto pair = reinterpret_cast<__m512bh>(_mm512_set1_ps(left[r][k]));
      acc = _mm512_dpbf16_ps(acc, pair, reinterpret_cast<__m512bh>(_mm512_loadu_ps(right[k])));
    }
    _mm512_storeu_ps(sum[r], acc);
  }
}

}  // namespace emulated
}  // namespace
}  // namespace lowbitcore

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated::load_config(config)
#define _tile_release() emulated::release()
#define _tile_zero(t) emulated::zero(t)
#define _tile_loadd(t, base, stride) emulated::load(t, base, stride)
#define _tile_stream_loadd(t, base, stride) emulated::load(t, base, stride)
#define _tile_stored(t, base, stride) emulated::store(t, base, stride)
#define _tile_dpbf16ps(c, a, b) emulated::dot_bf16(c, a, b)
