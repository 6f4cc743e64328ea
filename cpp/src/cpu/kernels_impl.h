// Every CPU kernel, written once over the vector type of a level. A kernels_*.cpp defines, in its
// anonymous namespace and before including this file:
//
//   Vec    kWidth floats: load, store, broadcast, from_bytes (kWidth uint8), load_bf16, load_f16,
//          store_bf16, store_f16, + - * /, madd(a,b,c) ~ a*b+c, fmadd and fnmadd (exactly fused),
//          min, max, round (ties to even), select_less(a,b,x,y) = a < b ? x : y, round_f16,
//          round_bf16 (of NaN: of those that bf16 or an operation has)
//   VecI   kWidth 32-bit integers: load, broadcast, right and left by a constant, |, as_float (of
//          its bits)
//   VecD   kDoubleWidth doubles: load, store, broadcast, fnmadd (exactly fused)
//   as_int(a)             the bits of a Vec
//   and_or(a,b,c)         a & b | c of VecI
//   kRows, kCols          the register tile of the GEMM: kRows rows by kCols floats
//   kDoubleRows           the same of doubles: kDoubleRows by 3 VecD
//   kDirectRows           up to this many rows, X W^T goes straight from the packed integers
//   kDirectTileRows       the same, where tiles are the alternative
//   transpose_tile        float [32][16] -> [16][32]
//
// A level with instructions for pairs of bf16 defines LOWBITCORE_PAIRS and
//
//   dot_pairs(a,b,c)      c + a.low*b.low + a.high*b.high in each 32-bit lane
//   bf16_pairs(low,high)  two Vec rounded to bf16, interleaved
//   transpose_pairs       up to 16 rows of pairs -> [pairs][rows]
//   transpose_tile_pairs  float [32][16] -> pairs, rounded to bf16, [8][32]
//   PairZeros             and its for_each_difference, see direct.h
//   kDirectPairs          whether X W^T straight from packed integers is better off with pairs
//   VecI                  store, load_u16 (kWidth uint16, widened)
//
// A level that multiplies bytes defines LOWBITCORE_DIGITS and
//
//   kDigitRows            up to this many rows of bf16 are multiplied in integers
//   kMostDigitBits        of weights that are
//   kByteChains           sums of one row that should not wait for one another
//   ByteSum<B>            add(a, b): in 32-bit lanes, the four products of integers of B bits with
//                         signed bytes; settle() after each tile, value()
//   for_each_four<B>      f(four, integers) of a tile's words
//   spread_digits<B>      digits of a tile's inputs to where its fours are
//   VecI                  store, + - * ^, nearest(Vec) and to_float
//
// Nothing here has external linkage, and nothing from the standard library that would: linking two
// levels must never let code of the higher one serve the lower (see CONTRIBUTING).

#include "attention.h"
#include "decode.h"
#include "dense.h"
#include "direct.h"
#include "doubles.h"
#include "elementwise.h"
#include "gemm.h"
#include "losses.h"
#include "low_rank.h"
#include "outer.h"
#include "quantization.h"
#ifdef LOWBITCORE_DIGITS
#include "digits.h"
#endif
#ifdef LOWBITCORE_TILES
#include "tiles_attention.h"
#include "tiles_gemm.h"
#endif

namespace lowbitcore {
namespace {

#ifdef LOWBITCORE_TILES
// Tables serve a group at a time, which inputs with a g_idx need not come in.
bool on_tiles(const ConstMatrix& activations, const QuantWeight& w) {
  return activations.dtype == DType::bf16 && w.g_idx == nullptr;
}
#endif

void qgemm_nt(ConstMatrix x, const QuantWeight& w, const float* bias, Matrix y,
              const Resources& use) {
  with_bits(w.format.bits, [&](auto bits) {
    constexpr int B = decltype(bits)::value;
    const bool bf16 = x.dtype == DType::bf16;
#ifdef LOWBITCORE_DIGITS
    if (digits_nt<B>(x, w, bias, y, use)) return;
#endif
#ifdef LOWBITCORE_TILES
    if (x.rows > kDirectTileRows && on_tiles(x, w)) return tiles_nt<B>(x, w, bias, y, use);
#endif
    if (x.rows <= kDirectRows) {
      with_direct_element(bf16 && w.g_idx == nullptr, [&](auto element) {
        direct_nt<B, decltype(element)>(x, w, bias, y, use.threads, use.workspace);
      });
    } else {
      with_element(bf16, [&](auto element) {
        panel_nt<B, decltype(element)>(x, w, bias, y, use.threads, use.workspace);
      });
    }
  });
}

size_t qgemm_nt_workspace(const QuantFormat& f, int64_t m, int threads) {
  size_t most = larger(gemm_workspace(m, f.in_features, threads), direct_workspace(f.in_features));
#ifdef LOWBITCORE_TILES
  most = larger(most, tiles_nt_workspace(f, m, threads));
#endif
  return most;
}

void qgemm_nn(ConstMatrix dy, const QuantWeight& w, Matrix dx, const Resources& use) {
  with_bits(w.format.bits, [&](auto bits) {
    constexpr int B = decltype(bits)::value;
#ifdef LOWBITCORE_TILES
    if (on_tiles(dy, w)) return tiles_nn<B>(dy, w, dx, use);
#endif
    with_element(dy.dtype == DType::bf16, [&](auto element) {
      panel_nn<B, decltype(element)>(dy, w, dx, use.threads, use.workspace);
    });
  });
}

size_t qgemm_nn_workspace(const QuantFormat& f, int64_t m, int threads) {
  size_t most = gemm_workspace(m, f.out_features, threads);
#ifdef LOWBITCORE_TILES
  most = larger(most, tiles_nn_workspace(f, m, threads));
#endif
  return most;
}

void attention(const AttentionInputs& in, Heads out, View<float> lse, const Resources& use) {
#ifdef LOWBITCORE_TILES
  if (in.q.dtype == DType::bf16) return tiles_attention(in, out, lse, use);
#endif
  vectors_attention(in, out, lse, use);
}

size_t attention_workspace([[maybe_unused]] DType dtype, int64_t rows, int64_t cols, int threads) {
#ifdef LOWBITCORE_TILES
  if (dtype == DType::bf16) return tiles_attention_workspace(rows, cols, threads);
#endif
  return vectors_attention_workspace(rows, cols, threads);
}

void attention_backward(ConstHeads d_out, const AttentionInputs& in, ConstHeads out,
                        View<const float> lse, Heads dq, Heads dk, Heads dv, const Resources& use) {
#ifdef LOWBITCORE_TILES
  if (in.q.dtype == DType::bf16) {
    return tiles_attention_backward(d_out, in, out, lse, dq, dk, dv, use);
  }
#endif
  vectors_attention_backward(d_out, in, out, lse, dq, dk, dv, use);
}

size_t attention_backward_workspace([[maybe_unused]] DType dtype, int64_t rows, int64_t cols,
                                    int threads) {
#ifdef LOWBITCORE_TILES
  if (dtype == DType::bf16) return tiles_attention_backward_workspace(rows, cols, threads);
#endif
  return vectors_attention_backward_workspace(rows, cols, threads);
}

constexpr Backend make_backend(const char* name) {
  Backend backend{};
  backend.name = name;
  backend.qgemm_nt = qgemm_nt;
  backend.qgemm_nn = qgemm_nn;
  backend.qgemm_grad_scales = qgemm_grad_scales;
  backend.qgemm_nt_workspace = qgemm_nt_workspace;
  backend.qgemm_nn_workspace = qgemm_nn_workspace;
  backend.qgemm_grad_scales_workspace = qgemm_grad_scales_workspace;
  backend.dequantize = dequantize;
  backend.quantize_rtn = quantize_rtn;
  backend.quantize_rtn_workspace = quantize_rtn_workspace;
  backend.accumulate_hessian = accumulate_hessian;
  backend.accumulate_hessian_workspace = accumulate_hessian_workspace;
  backend.accumulate_cross = accumulate_cross;
  backend.accumulate_cross_workspace = accumulate_cross_workspace;
  backend.gptq = gptq;
  backend.gptq_workspace = gptq_workspace;
  backend.subtract_product = subtract_product;
  backend.add_fake_quantized = add_fake_quantized;
  backend.fake_quantized_grads = fake_quantized_grads;
  backend.rms_norm = rms_norm;
  backend.rms_norm_backward = rms_norm_backward;
  backend.rotate = rotate;
  backend.swiglu = swiglu;
  backend.swiglu_backward = swiglu_backward;
  backend.dropout = dropout;
  backend.token_losses = token_losses;
  backend.attend = attend;
  backend.add_low_rank = add_low_rank;
  backend.add_low_rank_workspace = add_low_rank_workspace;
  backend.add_low_rank_backward = add_low_rank_backward;
  backend.add_low_rank_backward_workspace = add_low_rank_backward_workspace;
  backend.gemm_nt = gemm_nt;
  backend.gemm_nt_workspace = gemm_nt_workspace;
  backend.gemm_nn = gemm_nn;
  backend.gemm_nn_workspace = gemm_nn_workspace;
  backend.add = add;
  backend.attention = attention;
  backend.attention_workspace = attention_workspace;
  backend.attention_backward = attention_backward;
  backend.attention_backward_workspace = attention_backward_workspace;
  return backend;
}

}  // namespace
}  // namespace lowbitcore
