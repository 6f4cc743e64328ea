// Tensor cores of sm_80: mma.sync, and ldmatrix, stmatrix and movmatrix that feed it.
//
// Fragments, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix Fragments for mma"):
//   A, 16-bit:  register r holds rows g + 8 (r & 1), columns 2 t + {0, 1} + 8 (r >> 1)
//   B, 16-bit:  register r holds column g, rows 2 t + {0, 1} + 8 r
//   A, tf32:    register r holds row g + 8 (r & 1), column t + 4 (r >> 1)
//   B, tf32:    register r holds column g, row t + 4 r
//   C, D, f32:  register r holds row g + 8 (r >> 1), column 2 t + (r & 1)
#include "access.h"
#include "decode.h"
#include "lanes.h"
#include "number.h"
#include "semantics.h"

namespace ptxsim {
namespace {

constexpr int kRows = 16, kColumns = 8;

struct Tf32 {
  static float to_float(uint32_t bits) { return bit_cast<float>(bits & ~0x1fffu); }
};

// Element e of the 16-bit pair in a register, by lane.
template <class Format>
void unpack(const uint32_t* place, float* low, float* high) {
  for (int lane = 0; lane < kLanes; ++lane) low[lane] = Format::to_float(place[lane] & 0xffffu);
  for (int lane = 0; lane < kLanes; ++lane) high[lane] = Format::to_float(place[lane] >> 16);
}

template <class Format, int kDepth>
void load_fragments(Context& context, const Instruction& i, float (*a)[kDepth],
                    float (*b)[kColumns]) {
  alignas(64) float low[kLanes], high[kLanes];
  for (int r = 0; r < kDepth / 4; ++r) {
    unpack<Format>(context.source(context.part(i.a, r)), low, high);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4 + 8 * (r & 1), column = 2 * (lane % 4) + 8 * (r >> 1);
      a[row][column] = low[lane];
      a[row][column + 1] = high[lane];
    }
  }
  for (int r = 0; r < kDepth / 8; ++r) {
    unpack<Format>(context.source(context.part(i.b, r)), low, high);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = 2 * (lane % 4) + 8 * r;
      b[row][lane / 4] = low[lane];
      b[row + 1][lane / 4] = high[lane];
    }
  }
}

template <int kDepth>
void load_tf32_fragments(Context& context, const Instruction& i, float (*a)[kDepth],
                         float (*b)[kColumns]) {
  for (int r = 0; r < kDepth / 2; ++r) {
    const uint32_t* place = context.source(context.part(i.a, r));
    for (int lane = 0; lane < kLanes; ++lane) {
      a[lane / 4 + 8 * (r & 1)][lane % 4 + 4 * (r >> 1)] = Tf32::to_float(place[lane]);
    }
  }
  for (int r = 0; r < kDepth / 4; ++r) {
    const uint32_t* place = context.source(context.part(i.b, r));
    for (int lane = 0; lane < kLanes; ++lane) {
      b[lane % 4 + 4 * r][lane / 4] = Tf32::to_float(place[lane]);
    }
  }
}

// Products of the inputs are exact in fp32. They are summed with k ascending, the accumulator last;
// the order of the hardware is not specified.
template <class Format, int kDepth>
void mma(Context& context, const Instruction& i, uint32_t) {
  ++context.counters->mma;
  context.counters->mma_flops += 2 * kRows * kColumns * kDepth;
  alignas(64) float a[kRows][kDepth];
  alignas(64) float b[kDepth][kColumns];
  if constexpr (std::is_same_v<Format, Tf32>) {
    load_tf32_fragments<kDepth>(context, i, a, b);
  } else {
    load_fragments<Format, kDepth>(context, i, a, b);
  }
  alignas(64) float sums[kRows][kColumns];
  for (int row = 0; row < kRows; ++row) {
    float sum[kColumns] = {};
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < kColumns; ++column) sum[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < kColumns; ++column) sums[row][column] = sum[column];
  }
  for (int r = 0; r < 4; ++r) {
    const uint32_t* c = context.source(context.part(i.c, r));
    uint32_t* d = context.destination(context.part(i.d, r));
    for (int lane = 0; lane < kLanes; ++lane) {
      const float sum = sums[lane / 4 + 8 * (r >> 1)][2 * (lane % 4) + (r & 1)];
      d[lane] = bit_cast<uint32_t>(sum + bit_cast<float>(c[lane]));
    }
  }
}

void require_parts(const Operand& operand, int parts, const char* what) {
  const int found = operand.kind == Operand::kVector ? operand.parts : 1;
  if (found != parts) fail("%s has %d registers, expected %d", what, found, parts);
}

void decode_mma(Decoding& x) {
  const bool shape_fits = x.has("row") && x.has("col") && x.type(0) == Type::kF32 &&
                          x.type(3) == Type::kF32 && x.type(1) == x.type(2);
  if (!x.has("sync") || !shape_fits || x.has("sp")) x.unsupported();
  const Type inputs = x.type(1);
  const int depth = x.has("m16n8k16") ? 16 : x.has("m16n8k8") ? 8 : x.has("m16n8k4") ? 4 : 0;
  if (inputs == Type::kF16 && depth >= 8) {
    x.out.execute = depth == 16 ? mma<Half, 16> : mma<Half, 8>;
  } else if (inputs == Type::kBf16 && depth >= 8) {
    x.out.execute = depth == 16 ? mma<Bfloat, 16> : mma<Bfloat, 8>;
  } else if (inputs == Type::kTf32 && (depth == 8 || depth == 4)) {
    x.out.execute = depth == 8 ? mma<Tf32, 8> : mma<Tf32, 4>;
  } else {
    x.unsupported();
  }
  x.out.d = x.destination(0);
  x.out.a = x.source(1, Type::kB32);
  x.out.b = x.source(2, Type::kB32);
  x.out.c = x.source(3, Type::kF32);
  const int a_registers = inputs == Type::kTf32 ? depth / 2 : depth / 4;
  require_parts(x.out.d, 4, "D");
  require_parts(x.out.a, a_registers, "A");
  require_parts(x.out.b, a_registers / 2, "B");
  require_parts(x.out.c, 4, "C");
  x.out.convergence = Convergence::kWholeWarp;
  x.out.definedness = Definedness::kStrict;
  x.out.instruction_class = InstructionClass::k_tensor;
}

// The rows of matrix q are at the addresses of lanes 8 q to 8 q + 7.
void check_rows(Context& context, const Access& access, int matrices, const char* what) {
  for (int lane = 0; lane < 8 * matrices; ++lane) {
    context.block->shared.check(access.addresses[lane], 16, lane, what);
  }
  for (int q = 0; q < matrices; ++q) {
    uint32_t rows[kLanes] = {};
    for (int row = 0; row < 8; ++row)
      rows[row] = static_cast<uint32_t>(access.addresses[8 * q + row]);
    const Wavefronts wavefronts = count_wavefronts(rows, 0xff, 16);
    context.counters->ldmatrix_wavefronts += wavefronts.actual;
    context.counters->ldmatrix_wavefronts_ideal += wavefronts.ideal;
  }
}

template <bool kTransposed>
void load_matrix(Context& context, const Instruction& i, uint32_t mask) {
  ++context.counters->ldmatrix;
  Access access(context, i, i.a, mask);
  if (access.space != Space::kShared) fail("ldmatrix: the addresses are not in shared memory");
  check_rows(context, access, i.elements, "an ldmatrix");
  for (int q = 0; q < i.elements; ++q) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      const auto address = static_cast<uint32_t>(access.addresses[8 * q + row]);
      context.block->shared.read(address, 16, context.warp->index, 8 * q + row);
      std::memcpy(matrix[row], context.block->shared.data() + address, 16);
    }
    uint32_t* d = context.destination(context.part(i.d, q));
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = kTransposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint32_t high = kTransposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      d[lane] = low | high << 16;
    }
  }
}

template <bool kTransposed>
void store_matrix(Context& context, const Instruction& i, uint32_t mask) {
  ++context.counters->shared_stores;
  Access access(context, i, i.d, mask);
  if (access.space != Space::kShared) fail("stmatrix: the addresses are not in shared memory");
  check_rows(context, access, i.elements, "an stmatrix");
  const uint32_t serial = context.serial();
  for (int q = 0; q < i.elements; ++q) {
    const uint32_t* a = context.source(context.part(i.a, q));
    uint16_t matrix[8][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      (kTransposed ? matrix[2 * t][g] : matrix[g][2 * t]) = static_cast<uint16_t>(a[lane]);
      (kTransposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1]) =
          static_cast<uint16_t>(a[lane] >> 16);
    }
    for (int row = 0; row < 8; ++row) {
      context.block->shared.write(static_cast<uint32_t>(access.addresses[8 * q + row]),
                                  reinterpret_cast<const uint8_t*>(matrix[row]), 16,
                                  context.warp->index, 8 * q + row, serial);
    }
  }
}

void move_matrix(Context& context, const Instruction& i, uint32_t) {
  const uint32_t* a = context.source(i.a);
  uint16_t matrix[8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    matrix[lane / 4][2 * (lane % 4)] = static_cast<uint16_t>(a[lane]);
    matrix[lane / 4][2 * (lane % 4) + 1] = static_cast<uint16_t>(a[lane] >> 16);
  }
  uint32_t* d = context.destination(i.d);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    d[lane] = matrix[2 * t][g] | static_cast<uint32_t>(matrix[2 * t + 1][g]) << 16;
  }
}

void take_matrices(Decoding& x) {
  if (!x.has("m8n8") || !x.has("b16") || !x.has("sync")) x.unsupported();
  x.out.elements = x.has("x4") ? 4 : x.has("x2") ? 2 : 1;
  x.out.space = space_of(x);
  x.out.convergence = Convergence::kWholeWarp;
  x.out.definedness = Definedness::kStrict;
  x.out.instruction_class = InstructionClass::k_memory;
}

void decode_load_matrix(Decoding& x) {
  take_matrices(x);
  x.out.d = x.destination(0);
  x.out.a = x.address(1, x.out.space);
  require_parts(x.out.d, x.out.elements, "the destination");
  x.out.execute = x.has("trans") ? load_matrix<true> : load_matrix<false>;
}

void decode_store_matrix(Decoding& x) {
  take_matrices(x);
  x.out.d = x.address(0, x.out.space);
  x.out.a = x.source(1, Type::kB32);
  require_parts(x.out.a, x.out.elements, "the source");
  x.out.execute = x.has("trans") ? store_matrix<true> : store_matrix<false>;
}

}  // namespace

void register_tensor_cores(OpcodeTable& table) {
  table["mma"] = decode_mma;
  table["ldmatrix"] = decode_load_matrix;
  table["stmatrix"] = decode_store_matrix;
  table["movmatrix"] = [](Decoding& x) {
    if (!x.has("m8n8") || !x.has("trans") || !x.has("b16")) x.unsupported();
    take_operands(x, Type::kB32, 1);
    x.out.convergence = Convergence::kWholeWarp;
    x.out.definedness = Definedness::kStrict;
    x.out.execute = move_matrix;
  };
}

}  // namespace ptxsim
