// X W^T and dY W of bf16 activations on tiles, with weights from tables.
//
// A weight of B bits takes one of 2^B values for an output and group. They are computed once a
// group, scaled and rounded to bf16, and looked up from then on: once integers lie in the low bits
// of 16-bit lanes, one instruction turns 32 of them into weights. As a table serves one output, a
// row of a tile holds inputs of one output (X W^T: W is the left operand, the result comes out
// transposed) or those of two outputs in turn (dY W: W is the right operand).
//
// Of large weights the second-level cache holds a thread's sums, of some rows and panels, and of
// these rows' packed activations a piece of the reduction, which all of these panels meet before
// the next piece; the first level holds a panel's piece, dequantised there. Of small ones it holds
// many panels at their whole depth, and rows come by, a strip's piece at a time in the first level.
// There weights are the right operand of X W^T, too, so that rows are used as they lie.
#pragma once

#include "gemm.h"

namespace lowbitcore {
namespace {

// Operands lie as [steps][2 tiles][16][16] words of two bf16; a step is 32 terms of the reduction,
// the tiles are 32 rows of the left operand or 32 columns of the right one.
constexpr int64_t kTileWords = 256;
constexpr int64_t kStepWords = 2 * kTileWords;
constexpr int64_t kStrip = 32;

constexpr int64_t kPieceSteps = 18;  // at most: 36 KB of a panel
constexpr int64_t kPieceWords = kPieceSteps * kStepWords;
constexpr int64_t kMostRows = 448;            // of activations at once: 448 KB of a piece
constexpr int64_t kMostSums = (3 << 18) / 4;  // that a thread holds: 768 KB
constexpr int64_t kRowAhead = 512;  // bytes; rows lie beyond what the processor prefetches itself
constexpr int64_t kPanelsTogether = 4;      // of dY W, whose groups lie across panels
constexpr int64_t kMostResident = 1 << 18;  // words of a thread's dequantised panels: 1 MB
constexpr int64_t kMostCopies = 3 << 18;    // of all threads' together
constexpr int64_t kFewestResident = 8;      // panels, or rows would come by too often
constexpr int64_t kFewestStrips = 8;        // of a thread; of fewer rows threads share the outputs

// ---- integers ----

// Words of 16 outputs so that 128 bits hold those of one: output 4 L + i is rows[i], lane L.
LOWBITCORE_INLINE void outputs_to_lanes(__m512i a, __m512i b, __m512i c, __m512i d,
                                        __m512i (&rows)[4]) {
  const __m512i ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
  const __m512i cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
  rows[0] = _mm512_unpacklo_epi64(ab0, cd0);
  rows[1] = _mm512_unpackhi_epi64(ab0, cd0);
  rows[2] = _mm512_unpacklo_epi64(ab1, cd1);
  rows[3] = _mm512_unpackhi_epi64(ab1, cd1);
}

// The 32 integers of every output of a tile. Those of 2 bits come twice, those of 3 bits as two
// halves of 64 bits with the middle word in both.
template <int B>
LOWBITCORE_INLINE void load_outputs(const uint32_t* words, __m512i (&rows)[4]) {
  static_assert(B <= 4, "wider ones take more than 128 bits");
  __m512i w[B];
  for (int r = 0; r < B; ++r) w[r] = _mm512_loadu_si512(words + r * kBlockN);
  if constexpr (B == 2) outputs_to_lanes(w[0], w[1], w[0], w[1], rows);
  if constexpr (B == 3) outputs_to_lanes(w[0], w[1], w[1], w[2], rows);
  if constexpr (B == 4) outputs_to_lanes(w[0], w[1], w[2], w[3], rows);
}

struct alignas(64) Lanes16 {
  uint16_t lane[32];
};

struct alignas(64) Lanes32 {
  int32_t lane[16];
};

// Which input's integer ends up in 16-bit lane j of an output's row.
template <int B>
constexpr int input_in_lane(int j) {
  if (B == 2) return 8 * (j % 4) + j / 4;
  if (B == 3) return j / 4 % 2 * 16 + j / 8 * 4 + j % 4;
  if (B == 4) return 4 * (j % 8) + j / 8;
  return j;
}

template <int B>
constexpr Lanes16 inputs_in_lanes() {
  Lanes16 inputs = {};
  for (int j = 0; j < 32; ++j) inputs.lane[j] = static_cast<uint16_t>(input_in_lane<B>(j));
  return inputs;
}

template <int B>
constexpr Lanes16 row_shifts() {
  Lanes16 shifts = {};
  for (int j = 0; j < 32; ++j) {
    const int bit = B * input_in_lane<B>(j);
    // Of 3 bits: from the start of a half, the second of which starts at bit 32; for both bytes.
    shifts.lane[j] = static_cast<uint16_t>(B == 3 ? (bit - j / 4 % 2 * 32) * 0x101 : bit % 16);
  }
  return shifts;
}

// An output's integers in the low bits of 16-bit lanes; above them lies anything.
template <int B>
LOWBITCORE_INLINE __m512i row_of(__m512i output) {
  static constexpr Lanes16 kShifts = row_shifts<B>();
  const __m512i shifts = _mm512_load_si512(&kShifts);
  if constexpr (B == 3) {
    return _mm512_multishift_epi64_epi8(shifts, output);
  } else {
    return _mm512_srlv_epi16(output, shifts);
  }
}

// ---- the weights of 16 outputs in a group ----

constexpr int64_t kMostTiles = 18;  // that are dequantised at once
static_assert(kMostTiles >= kPieceSteps && kMostTiles >= kPanelsTogether, "runs of tiles");

LOWBITCORE_INLINE __m512i four_times(const uint32_t* lane) {
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(lane)));
}

// Exact ones are without their scales: differences of integers, which bf16 holds.
enum class Values { kExact, kScaled };

template <Values V>
inline Vec scales_of(const Vec& scales) {
  return V == Values::kScaled ? scales : Vec::broadcast(1.0f);
}

// Looked up.
template <int B, Values V = Values::kScaled>
struct GroupWeights {
  alignas(64) uint16_t table[kBlockN][16];

  void fill(const Block<B>& block, int64_t g) {
    alignas(64) float scale[kBlockN], zero[kBlockN];
    scales_of<V>(block.scale(g, 0)).store(scale);
    block.zero(g, 0).store(zero);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const Vec q = {_mm512_cvtepi32_ps(_mm512_and_si512(lanes, _mm512_set1_epi32((1 << B) - 1)))};
    const auto weights = [&](int n) LOWBITCORE_LAMBDA {
      return (q - Vec::broadcast(zero[n])) * Vec::broadcast(scale[n]);
    };
    for (int n = 0; n < kBlockN; n += 2) {
      const __m512bh both = _mm512_cvtne2ps_pbh(weights(n + 1).v, weights(n).v);
      _mm512_store_si512(table[n], reinterpret_cast<__m512i>(both));
    }
  }

  // Tiles of 16 outputs, a row each, by 32 inputs in input_in_lane's order; `apart` words from each
  // other.
  void rows(const Block<B>& block, int64_t first, int64_t count, uint32_t* out,
            int64_t apart) const {
    // Through memory: loading from it is how a lane gets everywhere for nothing.
    alignas(64) uint32_t lanes[kMostTiles][4][16];
    for (int64_t t = 0; t < count; ++t) {
      __m512i r[4];
      load_outputs<B>(block.tile_words(first + t), r);
      for (int i = 0; i < 4; ++i) _mm512_store_si512(lanes[t][i], r[i]);
    }
    for (int64_t t = 0; t < count; ++t) {
      rows(lanes[t], out + t * apart, std::make_integer_sequence<int, 16>());
    }
  }

  template <int... N>
  LOWBITCORE_INLINE void rows(const uint32_t (&lanes)[4][16], uint32_t* out,
                              std::integer_sequence<int, N...>) const {
    (row<N>(four_times(lanes[N % 4] + N / 4 * 4), out), ...);
  }

  template <int N>
  LOWBITCORE_INLINE void row(__m512i output, uint32_t* out) const {
    const auto* entries = reinterpret_cast<const __m256i*>(table[N]);
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_load_si256(entries));
    _mm512_store_si512(out + N * 16, _mm512_permutexvar_epi16(row_of<B>(output), twice));
  }

  // Steps of 8 pairs of outputs by 32 inputs, 16 in each of two tiles, in the order of column_of;
  // `apart` words from each other.
  void pairs(const Block<B>& block, int64_t first, int64_t count, uint32_t* out,
             int64_t apart) const {
    alignas(64) uint32_t lanes[kMostTiles][4][16];
    for (int64_t t = 0; t < count; ++t) {
      __m512i r[4];
      load_outputs<B>(block.tile_words(first + t), r);
      for (int i = 0; i < 4; i += 2) {
        const bool in_turn = B != 3;
        const __m512i low = in_turn ? _mm512_unpacklo_epi16(r[i], r[i + 1]) : r[i];
        const __m512i high = in_turn ? _mm512_unpackhi_epi16(r[i], r[i + 1]) : r[i + 1];
        _mm512_store_si512(lanes[t][i], low);
        _mm512_store_si512(lanes[t][i + 1], high);
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      pairs(lanes[t], out + t * apart, std::make_integer_sequence<int, 8>());
    }
  }

  template <int... P>
  LOWBITCORE_INLINE void pairs(const uint32_t (&lanes)[4][16], uint32_t* out,
                               std::integer_sequence<int, P...>) const {
    (pair<P>(four_times(lanes[P % 2 * 2] + P / 2 * 4), four_times(lanes[P % 2 * 2 + 1] + P / 2 * 4),
             out),
     ...);
  }

  // low and high: of 3 bits the integers of one output each, else words of both in turn.
  template <int P>
  LOWBITCORE_INLINE void pair(__m512i low, __m512i high, uint32_t* out) const {
    if constexpr (B == 3) {
      const __m512i even = row_of<B>(low), odd = row_of<B>(high);
      look_up<P>(_mm512_unpacklo_epi16(even, odd), out);
      look_up<P>(_mm512_unpackhi_epi16(even, odd), out + kTileWords);
    } else {
      // The q-th 128 bits take the q-th integer of a word.
      const __m512i q = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
      const __m512i by = _mm512_mullo_epi32(q, _mm512_set1_epi32(B * 0x10001));
      const __m512i left = _mm512_srlv_epi16(low, by);
      look_up<P>(left, out);
      look_up<P>(B == 2 ? _mm512_srli_epi16(left, 8) : _mm512_srlv_epi16(high, by),
                 out + kTileWords);
    }
  }

  // The second output's table is the upper half of the register.
  template <int P>
  LOWBITCORE_INLINE void look_up(__m512i integers, uint32_t* out) const {
    const __m512i low = _mm512_set1_epi16(15), upper = _mm512_set1_epi32(16 << 16);
    constexpr int kAndOr = 0xea;
    const __m512i entries = _mm512_ternarylogic_epi32(integers, low, upper, kAndOr);
    const __m512i both = _mm512_load_si512(table[2 * P]);
    _mm512_store_si512(out + P * 16, _mm512_permutexvar_epi16(entries, both));
  }
};

// Computed: 256 values are too many for a register.
template <Values V>
struct GroupWeights<8, V> {
  alignas(64) float scale[kBlockN], zero[kBlockN];

  void fill(const Block<8>& block, int64_t g) {
    scales_of<V>(block.scale(g, 0)).store(scale);
    block.zero(g, 0).store(zero);
  }

  LOWBITCORE_INLINE Vec weights(const uint8_t* codes, int n) const {
    return (Vec::from_bytes(codes) - Vec::broadcast(zero[n])) * Vec::broadcast(scale[n]);
  }

  // A tile's integers by output: inputs 0 to 15, then 16 to 31.
  struct Codes {
    alignas(64) uint8_t half[2][4][4][16];  // [half][n % 4][n / 4]

    Codes(const Block<8>& block, int64_t tile) {
      const uint32_t* words = block.tile_words(tile);
      for (int h = 0; h < 2; ++h) {
        __m512i w[4], lanes[4];
        for (int r = 0; r < 4; ++r) w[r] = _mm512_loadu_si512(words + (4 * h + r) * kBlockN);
        outputs_to_lanes(w[0], w[1], w[2], w[3], lanes);
        for (int i = 0; i < 4; ++i) _mm512_store_si512(half[h][i], lanes[i]);
      }
    }

    const uint8_t* of(int h, int n) const { return half[h][n % 4][n / 4]; }
  };

  void rows(const Block<8>& block, int64_t first, int64_t count, uint32_t* out,
            int64_t apart) const {
    for (int64_t t = 0; t < count; ++t, out += apart) {
      const Codes codes(block, first + t);
      for (int n = 0; n < kBlockN; ++n) {
        const Vec low = weights(codes.of(0, n), n), high = weights(codes.of(1, n), n);
        const __m512bh row = _mm512_cvtne2ps_pbh(high.v, low.v);
        _mm512_store_si512(out + n * 16, reinterpret_cast<__m512i>(row));
      }
    }
  }

  void pairs(const Block<8>& block, int64_t first, int64_t count, uint32_t* out,
             int64_t apart) const {
    for (int64_t t = 0; t < count; ++t, out += apart) {
      const Codes codes(block, first + t);
      for (int n = 0; n < kBlockN; n += 2) {
        for (int h = 0; h < 2; ++h) {
          bf16_pairs(weights(codes.of(h, n), n), weights(codes.of(h, n + 1), n + 1))
              .store(out + h * kTileWords + n / 2 * 16);
        }
      }
    }
  }
};

// Where column k of 32 comes to lie in the two tiles of GroupWeights<B>::pairs.
template <int B>
constexpr int column_of(int k) {
  if (B == 2) return k / 4 % 2 * 16 + k % 4 * 4 + k / 8;
  if (B == 4) return k / 16 * 16 + k % 4 * 4 + k % 16 / 4;
  return k;
}

template <int B>
constexpr Lanes32 columns(int half) {
  Lanes32 lanes = {};
  for (int i = 0; i < 16; ++i) lanes.lane[i] = column_of<B>(16 * half + i);
  return lanes;
}

// ---- activations ----

// Rows as a left operand: a tile's rows are theirs.
inline void pack_left(const ConstMatrix& x, int64_t first, int64_t rows, int64_t step,
                      int64_t steps, uint32_t* out) {
  for (int64_t r = 0; r < kStrip; ++r) {
    uint32_t* to = out + r * 16;
    if (r < rows) {
      const char* row = row_pointer(x, first + r) + step * 64;
      for (int64_t s = 0; s < steps; ++s) std::memcpy(to + s * kStepWords, row + s * 64, 64);
    } else {
      for (int64_t s = 0; s < steps; ++s) std::memset(to + s * kStepWords, 0, 64);
    }
  }
}

// Rows as a right operand, inputs in the order of GroupWeights<B>::rows.
template <int B>
void pack_right(const ConstMatrix& x, int64_t first, int64_t rows, int64_t step, int64_t steps,
                uint32_t* out) {
  static constexpr Lanes16 kInputs = inputs_in_lanes<B>();
  const __m512i inputs = _mm512_load_si512(&kInputs);
  for (int64_t half = 0; half < kStrip; half += 16) {
    const char* row0 = row_pointer(x, first + half) + step * 64;
    for (int64_t s = 0; s < steps; ++s) {
      __m512 r[16];
      for (int64_t i = 0; i < 16; ++i) {
        __m512i row = _mm512_setzero_si512();
        if (half + i < rows) {
          const char* at = row0 + i * x.stride * 2 + s * 64;
          row = _mm512_loadu_si512(at);
          __builtin_prefetch(at + kRowAhead);
        }
        r[i] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(inputs, row));
      }
      transpose_16x16(r);
      for (int i = 0; i < 16; ++i) _mm512_store_ps(out + s * kStepWords + half * 16 + i * 16, r[i]);
    }
  }
}

// ---- products ----

// Where the tiles of a left operand are, in bytes: `step` from one to the next of the reduction,
// `lower` to the second one of a step; their rows are `stride` apart.
struct LeftTiles {
  const char* first;
  int64_t stride, step, lower;

  explicit LeftTiles(const uint32_t* packed)
      : first(reinterpret_cast<const char*>(packed)),
        stride(64),
        step(kStepWords * 4),
        lower(kTileWords * 4) {}

  // Of rows as they lie, from a step of the reduction on.
  LeftTiles(const ConstMatrix& x, int64_t row, int64_t from)
      : first(row_pointer(x, row) + from * 64),
        stride(x.stride * 2),
        step(64),
        lower(16 * stride) {}
};

// Results of a strip and a panel are [2][2 tiles] whose halves lie kLowerSums apart, and those of
// the next strip or panel between them: a load waits for earlier stores that agree with it in the
// low 12 bits of their addresses, and so it meets none of the product before.
constexpr int64_t kLowerSums = 4 * kTileWords;

constexpr int64_t sums_at(int64_t i) { return i / 2 * 2 * kLowerSums + i % 2 * 2 * kTileWords; }
constexpr int64_t sums_of_all(int64_t count) { return round_up(count, 2) * kLowerSums; }

// A row of such results: its columns of the second tile lie kTileWords behind.
inline const float* row_of_sums(const float* c, int64_t row) {
  return c + row / 16 * kLowerSums + row % 16 * 16;
}

// c (+)= a b; Lower and Right say whether the second tiles of a and of b count, LeftStreams which
// operand the first-level cache is not to keep, as it would displace the other. That one is loaded
// first: its tiles take longer. between() comes before each step, meanwhile() before results are
// stored, which wait for the last step.
template <bool LeftStreams, bool Lower, bool Right, typename Between, typename Meanwhile>
void multiply_tiles(int64_t steps, LeftTiles a, const uint32_t* b, float* c, bool accumulate,
                    const Between& between, const Meanwhile& meanwhile) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (accumulate) {
    _tile_loadd(0, c, 64);
    if (Right) _tile_loadd(1, c + kTileWords, 64);
    if (Lower) _tile_loadd(2, c + kLowerSums, 64);
    if (Lower && Right) _tile_loadd(3, c + kLowerSums + kTileWords, 64);
  }
  for (int64_t s = 0; s < steps; ++s, a.first += a.step, b += kStepWords) {
    between();
    if (LeftStreams) {
      _tile_stream_loadd(4, a.first, a.stride);
      if (Lower) _tile_stream_loadd(5, a.first + a.lower, a.stride);
      _tile_loadd(6, b, 64);
      if (Right) _tile_loadd(7, b + kTileWords, 64);
    } else {
      _tile_stream_loadd(6, b, 64);
      if (Right) _tile_stream_loadd(7, b + kTileWords, 64);
      _tile_loadd(4, a.first, a.stride);
      if (Lower) _tile_loadd(5, a.first + a.lower, a.stride);
    }
    _tile_dpbf16ps(0, 4, 6);
    if (Right) _tile_dpbf16ps(1, 4, 7);
    if (Lower) _tile_dpbf16ps(2, 5, 6);
    if (Lower && Right) _tile_dpbf16ps(3, 5, 7);
  }
  meanwhile();
  _tile_stored(0, c, 64);
  if (Right) _tile_stored(1, c + kTileWords, 64);
  if (Lower) _tile_stored(2, c + kLowerSums, 64);
  if (Lower && Right) _tile_stored(3, c + kLowerSums + kTileWords, 64);
}

// Asks for `each` lines, and the same number of those behind them the next time.
struct Ahead {
  const char* lines;
  int64_t each;

  template <int Level>
  LOWBITCORE_INLINE void ask() {
    for (int64_t i = 0; i < each; ++i, lines += 64) __builtin_prefetch(lines, 0, Level);
  }
};

// Of a piece of the reduction: even ones, as sums travel once a piece.
constexpr int64_t piece_steps(int64_t depth) {
  const int64_t all = depth / kStrip;
  return divide_up(all, divide_up(all, kPieceSteps));
}

// How the product of a large weight is cut.
struct Blocks {
  int64_t rows, panels;  // of a thread's sums
  int64_t steps;         // of a piece
  int64_t together;      // panels that are dequantised at once

  Blocks(int64_t m, int64_t depth, int64_t outputs, int64_t most_together, int threads) {
    const int64_t all = outputs / kPanel;
    steps = piece_steps(depth);
    rows = round_up(divide_up(m, divide_up(m, kMostRows)), kStrip);
    const int64_t most = larger(kMostSums / (rows * kPanel), 1);
    panels = divide_up(all, round_up(divide_up(all, most), threads));
    together = smaller(panels, most_together);
  }

  int64_t activation_words(int64_t depth) const { return rows * depth / 2; }
  int64_t piece_words() const { return together * kPieceWords; }
  int64_t sums() const { return panels * sums_of_all(rows / kStrip); }
};

// How the product of a small weight is cut. Each thread dequantises what it multiplies by itself:
// what another one has written takes longer to fetch than to compute.
struct Resident {
  int64_t panels;         // that a thread has at a time
  int64_t steps, pieces;  // of the reduction

  Resident(int64_t depth, int64_t outputs, int threads)
      : steps(piece_steps(depth)), pieces(pieces_of(depth)) {
    const int64_t all = outputs / kPanel;
    const int64_t most = most_panels(depth, smaller(kMostResident, kMostCopies / threads));
    panels = divide_up(all, divide_up(all, most));
  }

  // Says the same for any number of rows and threads: sums are added up in another order here.
  static bool serves(int64_t depth, int64_t outputs) {
    return most_panels(depth, kMostResident) >= smaller(kFewestResident, outputs / kPanel);
  }

  int64_t weight_words() const { return pieces * panels * kPieceWords; }
  int64_t sums() const { return sums_of_all(pieces == 1 ? 2 : panels); }
  int64_t words() const { return weight_words() + kPieceWords + sums(); }

 private:
  static int64_t pieces_of(int64_t depth) { return divide_up(depth / kStrip, piece_steps(depth)); }

  static int64_t most_panels(int64_t depth, int64_t words) {
    return larger(words / (pieces_of(depth) * kPieceWords), 1);
  }
};

inline size_t tiles_workspace(int64_t m, int64_t depth, int64_t outputs, int64_t together,
                              int threads) {
  if (m == 0) return 0;
  if (Resident::serves(depth, outputs)) {
    return static_cast<size_t>(threads * Resident(depth, outputs, threads).words()) * 4;
  }
  const Blocks blocks(m, depth, outputs, together, threads);
  return static_cast<size_t>(blocks.activation_words(depth) +
                             threads * (blocks.piece_words() + blocks.sums())) *
         4;
}

// For writing, of 32 columns of some rows.
LOWBITCORE_INLINE void prefetch_outputs(const Matrix& out, int64_t first, int64_t rows,
                                        int64_t panel) {
  for (int64_t r = 0; r < rows; ++r) {
    __builtin_prefetch(row_pointer(out, first + r) + panel * kPanel * 2, 1);
  }
}

inline Vec bias_or_zero(const float* bias, int64_t n) {
  return bias == nullptr ? Vec::broadcast(0.0f) : Vec::load(bias + n);
}

// Two registers of results as one line of bf16.
LOWBITCORE_INLINE void store_line(const Vec& low, const Vec& high, const Matrix& out, int64_t row,
                                  int64_t col) {
  char* to = row_pointer(out, row) + col * 2;
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)));
}

// Product::pack(x, first row, rows, first step, steps, out) packs a strip of activations;
// fill(panel, panels, first step, steps, out) dequantises a piece of panels, [panels][kPieceSteps];
// multiply(rows, ...) is multiply_tiles for a strip of so many rows, of which the first-level cache
// is not to keep the activations; store(c, rows, row, panel) takes a strip's result.
template <typename Product>
void tiles_gemm(const ConstMatrix& x, int64_t outputs, int64_t most_together, const Resources& use,
                const Product& product) {
  const Blocks blocks(x.rows, x.cols, outputs, most_together, use.threads);
  auto* packed = static_cast<uint32_t*>(use.workspace);
  uint32_t* weights = packed + blocks.activation_words(x.cols);
  auto* results = reinterpret_cast<float*>(weights + use.threads * blocks.piece_words());
  const int64_t all_steps = x.cols / kStrip, all_panels = outputs / kPanel;
  for (int64_t row0 = 0; row0 < x.rows; row0 += blocks.rows) {
    const int64_t rows = smaller(blocks.rows, x.rows - row0), strips = divide_up(rows, kStrip);
    // A strip's activations from a piece's first step on.
    const auto strip_of = [&](int64_t step, int64_t strip) {
      const int64_t steps = smaller(blocks.steps, all_steps - step);
      return packed + (step * strips + strip * steps) * kStepWords;
    };
    parallel_for(strips, use.threads, [&](int64_t strip, int) {
      const int64_t row = strip * kStrip;
      for (int64_t step = 0; step < all_steps; step += blocks.steps) {
        product.pack(x, row0 + row, smaller(kStrip, rows - row), step,
                     smaller(blocks.steps, all_steps - step), strip_of(step, strip));
      }
    });
    parallel_for(divide_up(all_panels, blocks.panels), use.threads, [&](int64_t i, int thread) {
      const TileScope scope;
      const int64_t panel0 = i * blocks.panels;
      const int64_t panels = smaller(blocks.panels, all_panels - panel0);
      uint32_t* w = weights + thread * blocks.piece_words();
      float* c = results + thread * blocks.sums();
      const auto sums_of = [&](int64_t panel, int64_t strip) {
        return c + panel * sums_of_all(strips) + sums_at(strip);
      };
      for (int64_t step = 0; step < all_steps; step += blocks.steps) {
        const int64_t steps = smaller(blocks.steps, all_steps - step), end = step + steps;
        // The next piece of activations comes from beyond the second level: each product asks for
        // a part of it.
        Ahead activations = {reinterpret_cast<const char*>(strip_of(end == all_steps ? 0 : end, 0)),
                             divide_up(kStepWords / 16, panels)};
        const int64_t sum_lines = divide_up(2 * kTileWords / 16, steps);  // of a half, a step
        for (int64_t first = 0; first < panels; first += blocks.together) {
          const int64_t together = smaller(blocks.together, panels - first);
          product.fill(panel0 + first, together, step, steps, w);
          for (int64_t p = first; p < first + together; ++p) {
            const uint32_t* piece = w + (p - first) * kPieceWords;
            for (int64_t strip = 0; strip < strips; ++strip) {
              float* sums = sums_of(p, strip);
              const float* next = sums_of(p, strip + 1);
              Ahead upper = {reinterpret_cast<const char*>(next), sum_lines};
              Ahead lower = {reinterpret_cast<const char*>(next + kLowerSums), sum_lines};
              product.multiply(smaller(kStrip, rows - strip * kStrip), steps, strip_of(step, strip),
                               piece, sums, step > 0, [&] {
                                 upper.ask<3>();
                                 lower.ask<3>();
                                 activations.ask<2>();
                               });
            }
          }
        }
      }
      // A row's results are stored side by side: each row lies in a page of its own.
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t row = strip * kStrip, count = smaller(kStrip, rows - row);
        for (int64_t p = 0; p < panels; ++p) {
          if (p + 1 < panels) prefetch_outputs(product.out, row0 + row, count, panel0 + p + 1);
          product.store(sums_of(p, strip), count, row0 + row, panel0 + p);
        }
      }
    });
  }
}

// Whether tiles are read from rows as they lie: in whole lines, which the first-level cache does
// not hold to a few of its sets.
inline bool tiles_as_they_lie(const ConstMatrix& x) {
  const auto address = reinterpret_cast<std::uintptr_t>(x.data);
  return address % 64 == 0 && x.stride % 32 == 0 && x.stride % 1024 != 0;
}

// The same for resident weights, which fill dequantises as the right operand: a thread's share of
// strips and panels.
template <typename Product>
void multiply_resident(const ConstMatrix& x, const Resident& resident, Range strips,
                       Range all_panels, int64_t most_together, uint32_t* weights,
                       const Product& product) {
  const TileScope scope;
  uint32_t* packed = weights + resident.weight_words();
  auto* results = reinterpret_cast<float*>(packed + kPieceWords);
  const int64_t pieces = resident.pieces;
  const auto step_of = [&](int64_t piece) { return piece * resident.steps; };
  const auto steps_of = [&](int64_t piece) {
    return smaller(resident.steps, x.cols / kStrip - step_of(piece));
  };
  for (int64_t panel0 = all_panels.first; panel0 < all_panels.end; panel0 += resident.panels) {
    const int64_t panels = smaller(resident.panels, all_panels.end - panel0);
    const auto weights_of = [&](int64_t piece, int64_t panel) {
      return weights + (piece * panels + panel) * kPieceWords;
    };
    const auto sums_of = [&](int64_t panel) {
      return results + sums_at(pieces == 1 ? panel % 2 : panel);
    };
    for (int64_t piece = 0; piece < pieces; ++piece) {
      for (int64_t first = 0; first < panels; first += most_together) {
        product.fill(panel0 + first, smaller(most_together, panels - first), step_of(piece),
                     steps_of(piece), weights_of(piece, first));
      }
    }
    for (int64_t strip = strips.first; strip < strips.end; ++strip) {
      const int64_t row = strip * kStrip, rows = smaller(kStrip, x.rows - row);
      const bool direct = rows == kStrip && tiles_as_they_lie(x);
      // The next strip, where rows follow each other in memory.
      Ahead next = {nullptr, 0};
      if (strip + 1 < strips.end && x.stride == x.cols) {
        next = {row_pointer(x, row + kStrip), divide_up(kStrip, panels)};
      }
      const auto between = [&] { next.ask<2>(); };
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t step = step_of(piece), steps = steps_of(piece);
        if (!direct) pack_left(x, row, rows, step, steps, packed);
        const LeftTiles left = direct ? LeftTiles(x, row, step) : LeftTiles(packed);
        const bool last = piece + 1 == pieces;
        const auto multiply = [&](auto lower, int64_t p) {
          multiply_tiles<false, decltype(lower)::value, true>(
              steps, left, weights_of(piece, p), sums_of(p), piece > 0, between, [&] {
                if (last && p > 0) product.store(sums_of(p - 1), rows, row, panel0 + p - 1);
              });
        };
        for (int64_t p = 0; p < panels; ++p) {
          rows > 16 ? multiply(std::true_type(), p) : multiply(std::false_type(), p);
        }
        if (last) product.store(sums_of(panels - 1), rows, row, panel0 + panels - 1);
      }
    }
  }
}

template <typename Product>
void tiles_gemm_resident(const ConstMatrix& x, int64_t outputs, int64_t most_together,
                         const Resources& use, const Product& product) {
  const Resident resident(x.cols, outputs, use.threads);
  const Range strips = {0, divide_up(x.rows, kStrip)}, panels = {0, outputs / kPanel};
  const auto multiply = [&](Range some_strips, Range some_panels, int thread) {
    multiply_resident(x, resident, some_strips, some_panels, most_together,
                      static_cast<uint32_t*>(use.workspace) + thread * resident.words(), product);
  };
  // By rows the next operation, if it does so too, finds its own in the cache of its thread. Of few
  // rows the weights cost more, and each thread takes some.
  if (strips.end >= kFewestStrips * use.threads) {
    parallel_ranges(strips.end, use.threads,
                    [&](Range share, int thread) { multiply(share, panels, thread); });
  } else {
    parallel_ranges(panels.end, use.threads,
                    [&](Range share, int thread) { multiply(strips, share, thread); });
  }
}

// Calls f(first tile, tiles, weights) for the tiles of a block, those of a group together.
template <int B, typename F>
LOWBITCORE_INLINE void for_each_group(const Block<B>& block, int64_t first, int64_t count,
                                      const F& f) {
  const int64_t group_tiles = block.group_size / kTileK;
  GroupWeights<B> weights;
  for (int64_t tile = first; tile < first + count;) {
    const int64_t g = tile / group_tiles;
    const int64_t end = smaller((g + 1) * group_tiles, first + count);
    weights.fill(block, g);
    f(tile, end - tile, weights);
    tile = end;
  }
}

// Asks for a tile and what its group needs; harmless past the end of a weight.
template <int B>
LOWBITCORE_INLINE void prefetch_weights(const Block<B>& block, int64_t tile) {
  const int64_t g = tile * kTileK / block.group_size;
  prefetch_tile(block, tile, 0);
  if (tile * kTileK % block.group_size == 0) {
    __builtin_prefetch(block.scales + g * block.stride);
    __builtin_prefetch(block.zeros + g * kBlockN);
  }
}

template <int B>
struct Forward {
  const QuantWeight& w;
  const float* bias;
  Matrix out;

  void pack(const ConstMatrix& x, int64_t row, int64_t rows, int64_t step, int64_t steps,
            uint32_t* to) const {
    pack_right<B>(x, row, rows, step, steps, to);
  }

  void fill(int64_t panel, int64_t, int64_t step, int64_t steps, uint32_t* out) const {
    for (int64_t half = 0; half < 2; ++half) {
      const Block<B> block(w, panel * 2 + half);
      uint32_t* tiles = out + half * kTileWords;
      for_each_group(block, step, steps, [&](int64_t tile, int64_t count, const auto& weights) {
        weights.rows(block, tile, count, tiles + (tile - step) * kStepWords, kStepWords);
      });
    }
  }

  template <typename Between>
  void multiply(int64_t rows, int64_t steps, const uint32_t* activations, const uint32_t* weights,
                float* c, bool accumulate, const Between& between) const {
    if (rows > 16) {
      multiply_tiles<false, true, true>(steps, LeftTiles(weights), activations, c, accumulate,
                                        between, [] {});
    } else {
      multiply_tiles<false, true, false>(steps, LeftTiles(weights), activations, c, accumulate,
                                         between, [] {});
    }
  }

  void store(const float* c, int64_t rows, int64_t row, int64_t panel) const {
    const int64_t n = panel * kPanel;
    const Vec b[2] = {bias_or_zero(bias, n), bias_or_zero(bias, n + 16)};
    for (int64_t first = 0; first < rows; first += 16, c += kTileWords) {
      __m512 low[16], high[16];
      for (int i = 0; i < 16; ++i) {
        low[i] = _mm512_load_ps(c + i * 16);
        high[i] = _mm512_load_ps(c + kLowerSums + i * 16);
      }
      transpose_16x16(low);
      transpose_16x16(high);
      for (int64_t i = 0; i < smaller(16, rows - first); ++i) {
        store_line(Vec{low[i]} + b[0], Vec{high[i]} + b[1], out, row + first + i, n);
      }
    }
  }
};

// Of resident weights.
template <int B>
struct ResidentForward {
  const QuantWeight& w;
  const float* bias;
  Matrix out;

  void fill(int64_t panel, int64_t, int64_t step, int64_t steps, uint32_t* out) const {
    for (int64_t half = 0; half < 2; ++half) {
      const Block<B> block(w, panel * 2 + half);
      for (int64_t s = 0; s < steps; ++s) {
        dequantize_tile(block, step + s, out + s * kStepWords + half * kTileWords, 16);
      }
    }
  }

  void store(const float* c, int64_t rows, int64_t row, int64_t panel) const {
    const int64_t n = panel * kPanel;
    const Vec b[2] = {bias_or_zero(bias, n), bias_or_zero(bias, n + 16)};
    for (int64_t r = 0; r < rows; ++r) {
      const float* left = row_of_sums(c, r);
      store_line(Vec::load(left) + b[0], Vec::load(left + kTileWords) + b[1], out, row + r, n);
    }
  }
};

template <int B>
struct Backward {
  const QuantWeight& w;
  Matrix out;

  void pack(const ConstMatrix& dy, int64_t row, int64_t rows, int64_t step, int64_t steps,
            uint32_t* to) const {
    pack_left(dy, row, rows, step, steps, to);
  }

  void fill(int64_t panel, int64_t panels, int64_t step, int64_t steps, uint32_t* out) const {
    constexpr int64_t kApart = kPieceWords;
    for (int64_t n = 0; n < 2 * steps; ++n) {
      const Block<B> block(w, 2 * step + n);
      uint32_t* rows = out + n / 2 * kStepWords + n % 2 * kTileWords / 2;
      for_each_group(block, panel, panels, [&](int64_t tile, int64_t count, const auto& weights) {
        weights.pairs(block, tile, count, rows + (tile - panel) * kApart, kApart);
      });
    }
  }

  template <typename Between>
  void multiply(int64_t rows, int64_t steps, const uint32_t* activations, const uint32_t* weights,
                float* c, bool accumulate, const Between& between) const {
    if (rows > 16) {
      multiply_tiles<true, true, true>(steps, LeftTiles(activations), weights, c, accumulate,
                                       between, [] {});
    } else {
      multiply_tiles<true, false, true>(steps, LeftTiles(activations), weights, c, accumulate,
                                        between, [] {});
    }
  }

  void store(const float* c, int64_t rows, int64_t row, int64_t panel) const {
    static constexpr Lanes32 kColumns[2] = {columns<B>(0), columns<B>(1)};
    for (int64_t r = 0; r < rows; ++r) {
      const float* left = row_of_sums(c, r);
      const __m512 a = _mm512_load_ps(left), b = _mm512_load_ps(left + kTileWords);
      Vec v[2];
      for (int half = 0; half < 2; ++half) {
        v[half].v = _mm512_permutex2var_ps(a, _mm512_load_si512(&kColumns[half]), b);
      }
      store_line(v[0], v[1], out, row + r, panel * kPanel);
    }
  }
};

// ---- few rows ----

// Of up to 16 rows, weights are not rounded: groups are summed with exact differences, and scales
// multiply the sums.
constexpr int64_t kFewRows = 16;

inline size_t few_workspace(int64_t depth) { return static_cast<size_t>(depth * kStrip / 2) * 4; }

// total [16 outputs][16 rows] += a group's part; activations are packed by pack_right.
template <int B>
void add_group_of_few(const Block<B>& block, int64_t g, int64_t first, int64_t end,
                      const uint32_t* activations, float (&total)[kBlockN][16]) {
  alignas(64) uint32_t tiles[kMostTiles][kTileWords];
  alignas(64) float sums[kBlockN][16], scale[kBlockN];
  GroupWeights<B, Values::kExact> weights;
  weights.fill(block, g);
  _tile_zero(0);
  for (int64_t tile = first; tile < end; tile += kMostTiles) {
    const int64_t count = smaller(kMostTiles, end - tile);
    weights.rows(block, tile, count, tiles[0], kTileWords);
    for (int64_t t = 0; t < count; ++t) {
      _tile_loadd(4, tiles[t], 64);
      _tile_loadd(6, activations + (tile + t) * kStepWords, 64);
      _tile_dpbf16ps(0, 4, 6);
      prefetch_weights(block, tile + t + kMostTiles);
    }
  }
  _tile_stored(0, sums, 64);
  block.scale(g, 0).store(scale);
  for (int n = 0; n < kBlockN; ++n) {
    madd(Vec::broadcast(scale[n]), Vec::load(sums[n]), Vec::load(total[n])).store(total[n]);
  }
}

template <int B>
void tiles_nt_few(const ConstMatrix& x, const QuantWeight& w, const float* bias, const Matrix& y,
                  const Resources& use) {
  auto* packed = static_cast<uint32_t*>(use.workspace);
  const int64_t tiles = x.cols / kTileK;
  pack_right<B>(x, 0, x.rows, 0, tiles, packed);
  parallel_for(y.cols / kBlockN, use.threads, [&](int64_t n, int) {
    const TileScope scope;
    const Block<B> block(w, n);
    const int64_t group_tiles = block.group_size / kTileK;
    alignas(64) float total[kBlockN][16] = {};
    for (int64_t first = 0, g = 0; first < tiles; first += group_tiles, ++g) {
      add_group_of_few(block, g, first, smaller(first + group_tiles, tiles), packed, total);
    }
    __m512 r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_ps(total[i]);
    transpose_16x16(r);
    alignas(64) float rows[kFewRows][kBlockN];
    for (int i = 0; i < 16; ++i) _mm512_store_ps(rows[i], r[i]);
    store_outputs(rows[0], x.rows, kBlockN, bias, y, 0, n * kBlockN);
  });
}

inline size_t tiles_nt_workspace(const QuantFormat& f, int64_t m, int threads) {
  if (m <= kFewRows) return few_workspace(f.in_features);
  return tiles_workspace(m, f.in_features, f.out_features, 1, threads);
}

inline size_t tiles_nn_workspace(const QuantFormat& f, int64_t m, int threads) {
  return tiles_workspace(m, f.out_features, f.in_features, kPanelsTogether, threads);
}

template <int B>
void tiles_nt(ConstMatrix x, const QuantWeight& w, const float* bias, Matrix y,
              const Resources& use) {
  if (x.rows <= kFewRows) return tiles_nt_few<B>(x, w, bias, y, use);
  if (Resident::serves(x.cols, y.cols)) {
    tiles_gemm_resident(x, y.cols, 1, use, ResidentForward<B>{w, bias, y});
  } else {
    tiles_gemm(x, y.cols, 1, use, Forward<B>{w, bias, y});
  }
}

template <int B>
void tiles_nn(ConstMatrix dy, const QuantWeight& w, Matrix dx, const Resources& use) {
  const Backward<B> product{w, dx};
  if (Resident::serves(dy.cols, dx.cols)) {
    tiles_gemm_resident(dy, dx.cols, kPanelsTogether, use, product);
  } else {
    tiles_gemm(dy, dx.cols, kPanelsTogether, use, product);
  }
}

}  // namespace
}  // namespace lowbitcore
