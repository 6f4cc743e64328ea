// wgmma of sm_90a: products of four warps, which run from their issue to the wait that covers them.
//
// A product is computed when it is waited for. Until then its accumulators have no value, and what
// it reads may not be changed: the machine sees to registers, SharedMemory to memory. Each warp has
// its 16 rows of the product for itself, so that the four of a group need not keep step; that they
// issue the same is checked.
#include <algorithm>

#include "access.h"
#include "decode.h"
#include "lanes.h"
#include "number.h"
#include "semantics.h"

namespace ptxsim {
namespace {

constexpr int kRows = 16;   // of a warp
constexpr int kDepth = 16;  // in 16-bit elements
constexpr int kMostColumns = 256;
constexpr uint32_t kPiece = 16;  // bytes that lie together whatever the layout

// What Instruction::immediate holds.
struct Modes {
  uint32_t columns;
  bool negate_a, negate_b, transpose_a, transpose_b, bfloat;

  uint32_t packed() const {
    return columns | static_cast<uint32_t>(negate_a) << 16 | static_cast<uint32_t>(negate_b) << 17 |
           static_cast<uint32_t>(transpose_a) << 18 | static_cast<uint32_t>(transpose_b) << 19 |
           static_cast<uint32_t>(bfloat) << 20;
  }
  static Modes of(const Instruction& i) {
    const uint32_t bits = i.immediate;
    const auto flag = [&](int at) { return (bits >> at & 1) != 0; };
    return {bits & 0xffff, flag(16), flag(17), flag(18), flag(19), flag(20)};
  }
};

// A matrix in shared memory: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout".
// Lines are rows of A or columns of B. Eight elements that are neighbours along the depth, or along
// the lines if it is transposed, are a piece; pieces form tiles of 8 by up to 8, whose pieces are
// permuted by address bits.
class Operand16 {
 public:
  Operand16(uint64_t descriptor, bool transposed) : transposed_(transposed) {
    start_ = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    leading_ = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
    stride_ = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 49 & 7) fail("wgmma: a descriptor with a base offset is not supported");
    constexpr uint32_t kAcross[] = {1, 8, 4, 2};  // none, 128, 64, 32 bytes
    across_ = kAcross[descriptor >> 62];
  }

  // The address of the piece that holds element (line, depth), both multiples of 8 where they run
  // along the piece.
  uint32_t piece(uint32_t line, uint32_t depth) const {
    uint32_t offset;
    if (!transposed_) {
      offset = line % 8 * across_ * kPiece + line / 8 * stride_ +
               depth / 8 * (across_ == 1 ? leading_ : kPiece);
    } else {
      const uint32_t along = line / 8;
      offset = across_ == 1 ? along * stride_ + depth % 8 * kPiece + depth / 8 * leading_
                            : along % across_ * kPiece + along / across_ * leading_ +
                                  depth % 8 * across_ * kPiece + depth / 8 * stride_;
    }
    const uint32_t address = start_ + offset;
    return address ^ (address >> 7 & (across_ - 1)) << 4;
  }

  // Calls body(address, first line, first depth) for the pieces of some lines.
  template <class Body>
  void for_pieces(uint32_t first_line, uint32_t lines, Body body) const {
    const uint32_t line_step = transposed_ ? 8 : 1, depth_step = transposed_ ? 1 : 8;
    for (uint32_t line = first_line; line < first_line + lines; line += line_step) {
      for (uint32_t depth = 0; depth < kDepth; depth += depth_step) {
        body(piece(line, depth), line, depth);
      }
    }
  }

  // put(line, depth, bits) for every element of some lines.
  template <class Put>
  void for_elements(const uint8_t* memory, uint32_t first_line, uint32_t lines, Put put) const {
    for_pieces(first_line, lines, [&](uint32_t address, uint32_t line, uint32_t depth) {
      uint16_t piece[8];
      std::memcpy(piece, memory + address, sizeof piece);
      for (uint32_t e = 0; e < 8; ++e) {
        put(transposed_ ? line + e : line, transposed_ ? depth : depth + e, piece[e]);
      }
    });
  }

 private:
  bool transposed_;
  uint32_t start_, leading_, stride_;
  uint32_t across_;  // pieces of a tile that follow each other
};

uint32_t first_row(const Context& context) {
  return static_cast<uint32_t>(context.warp->index) % 4 * kRows;
}

bool a_in_registers(const Instruction& i) { return i.a.kind == Operand::kVector; }

// Calls body(address) for all that a warp's part of the product reads from shared memory.
template <class Body>
void for_shared_pieces(const Context& context, const PendingWgmma& wgmma, Body body) {
  const Modes modes = Modes::of(*wgmma.instruction);
  const auto visit = [&](uint32_t address, uint32_t, uint32_t) { body(address); };
  Operand16(wgmma.b, modes.transpose_b).for_pieces(0, modes.columns, visit);
  if (!a_in_registers(*wgmma.instruction)) {
    Operand16(wgmma.a, modes.transpose_a).for_pieces(first_row(context), kRows, visit);
  }
}

template <class Format>
void load_a(const Context& context, const PendingWgmma& wgmma, float (*a)[kDepth]) {
  const Instruction& i = *wgmma.instruction;
  if (!a_in_registers(i)) {
    const uint32_t row0 = first_row(context);
    Operand16(wgmma.a, Modes::of(i).transpose_a)
        .for_elements(context.block->shared.data(), row0, kRows,
                      [&](uint32_t row, uint32_t k, uint16_t bits) {
                        a[row - row0][k] = Format::to_float(bits);
                      });
    return;
  }
  for (int r = 0; r < 4; ++r) {  // as in mma.m16n8k16
    const uint32_t* place = context.source(context.part(i.a, r));
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4 + 8 * (r & 1), column = 2 * (lane % 4) + 8 * (r >> 1);
      a[row][column] = Format::to_float(place[lane] & 0xffffu);
      a[row][column + 1] = Format::to_float(place[lane] >> 16);
    }
  }
}

// As mma sums: products exact in fp32, k ascending, the accumulator last.
template <class Format>
void compute(const Context& context, const PendingWgmma& wgmma) {
  const Instruction& i = *wgmma.instruction;
  const Modes modes = Modes::of(i);
  const uint32_t columns = modes.columns;
  alignas(64) float a[kRows][kDepth];
  alignas(64) float b[kDepth][kMostColumns];
  alignas(64) float sums[kRows][kMostColumns] = {};
  load_a<Format>(context, wgmma, a);
  Operand16(wgmma.b, modes.transpose_b)
      .for_elements(
          context.block->shared.data(), 0, columns,
          [&](uint32_t n, uint32_t k, uint16_t bits) { b[k][n] = Format::to_float(bits); });
  const float sign = modes.negate_a != modes.negate_b ? -1.0f : 1.0f;
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      const float factor = sign * a[row][k];
      for (uint32_t n = 0; n < columns; ++n) sums[row][n] += factor * b[k][n];
    }
  }
  for (int r = 0; r < static_cast<int>(columns / 2); ++r) {
    uint32_t* d = context.destination(context.part(i.d, r));
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4 + 8 * (r >> 1 & 1), column = r / 4 * 8 + 2 * (lane % 4) + (r & 1);
      const float before = wgmma.accumulates ? bit_cast<float>(d[lane]) : 0.0f;
      d[lane] = bit_cast<uint32_t>(sums[row][column] + before);
    }
  }
}

bool same_registers(const Context& context, const Operand& a, const Operand& b) {
  if (a.parts != b.parts) return false;
  for (int r = 0; r < a.parts; ++r) {
    if (context.part(a, r).id != context.part(b, r).id) return false;
  }
  return true;
}

void check_register(const Context& context, const Operand& part, bool has_value) {
  const Warp& warp = *context.warp;
  const char* name = context.kernel->register_names[part.id].c_str();
  if (has_value && context.options->undefined != 0 && warp.defined[part.id] != kAllLanes) {
    fail(
        "uninitialised register: %s has no value in lane %d: never written, or computed from one "
        "that was not",
        name, __builtin_ctz(~warp.defined[part.id]));
  }
  if (warp.written[part.id] > warp.wgmma_fence) {
    fail("no wgmma.fence since %s, an operand, was written", name);
  }
}

void check_registers(const Context& context, const Instruction& i, bool accumulates) {
  const Warp& warp = *context.warp;
  const auto state = [&](const Operand& part) { return warp.in_flight[part.id]; };
  const auto name = [&](const Operand& part) {
    return context.kernel->register_names[part.id].c_str();
  };
  if (a_in_registers(i)) {
    for (int r = 0; r < i.a.parts; ++r) {
      const Operand& part = context.part(i.a, r);
      if (state(part) == kAccumulates) {
        fail("in flight: a read of %s, which a wgmma is still accumulating", name(part));
      }
      check_register(context, part, true);
    }
  }
  // Accumulators may be those of wgmmas of the same shape that are under way.
  const bool continues =
      std::any_of(warp.wgmmas.begin(), warp.wgmmas.end(), [&](const PendingWgmma& other) {
        return same_registers(context, other.instruction->d, i.d);
      });
  for (int r = 0; r < i.d.parts; ++r) {
    const Operand& part = context.part(i.d, r);
    if (state(part) == kIsOperand) {
      fail("in flight: a wgmma accumulates in %s, which another is still reading", name(part));
    }
    if (state(part) == kAccumulates && !continues) {
      fail("in flight: a wgmma accumulates in %s, which one of another shape still does",
           name(part));
    }
    check_register(context, part, accumulates && !continues);
  }
}

// Every warp of a group issues the same wgmmas in the same order.
void join_warpgroup(const Context& context, const PendingWgmma& wgmma) {
  const size_t index = static_cast<size_t>(context.warp->index);
  if (index / 4 * 4 + 4 > context.block->warps.size()) {
    fail("warpgroup: warp %zu is in no group of four", index);
  }
  Warpgroup& group = context.block->warpgroups[index / 4];
  const size_t turn = group.count[index % 4]++;
  if (turn == group.issued.size()) {
    group.issued.push_back(wgmma);
    return;
  }
  const PendingWgmma& other = group.issued[turn];
  if (other.instruction != wgmma.instruction || other.a != wgmma.a || other.b != wgmma.b ||
      other.accumulates != wgmma.accumulates) {
    fail("warpgroup: wgmma number %zu of warp %zu is not what another warp of its group issued",
         turn, index);
  }
}

uint64_t uniform_descriptor(const Context& context, const Operand& operand) {
  const uint32_t* place = context.source(operand);
  const auto first = get<uint64_t>(place, 0);
  for (int lane = 1; lane < kLanes; ++lane) {
    if (get<uint64_t>(place, lane) != first) fail("wgmma: lane %d has another descriptor", lane);
  }
  return first;
}

void mark_registers(const Context& context) {
  Warp& warp = *context.warp;
  std::fill(warp.in_flight.begin(), warp.in_flight.end(), static_cast<uint8_t>(kIdle));
  for (const PendingWgmma& wgmma : warp.wgmmas) {
    const Instruction& i = *wgmma.instruction;
    for (int r = 0; r < i.d.parts; ++r) {
      const Operand& part = context.part(i.d, r);
      warp.in_flight[part.id] = kAccumulates;
      context.set_defined(part, 0, kAllLanes);
    }
    if (!a_in_registers(i)) continue;
    for (int r = 0; r < i.a.parts; ++r) warp.in_flight[context.part(i.a, r).id] = kIsOperand;
  }
}

void issue(Context& context, const Instruction& i, uint32_t) {
  const uint32_t scale = context.predicate(i.c);
  if (scale != 0 && scale != kAllLanes) fail("wgmma: lanes differ in scale-d");
  const PendingWgmma wgmma = {&i, a_in_registers(i) ? 0 : uniform_descriptor(context, i.a),
                              uniform_descriptor(context, i.b), scale != 0,
                              context.warp->wgmma_groups};
  check_registers(context, i, wgmma.accumulates);
  join_warpgroup(context, wgmma);
  SharedMemory& shared = context.block->shared;
  for_shared_pieces(context, wgmma, [&](uint32_t address) {
    shared.check(address, kPiece, 0, "a wgmma");
    shared.begin_async_read(address, kPiece, context.warp->index);
  });
  ++context.counters->wgmma;
  context.counters->mma_flops += 2 * kRows * Modes::of(i).columns * kDepth;
  context.warp->wgmmas.push_back(wgmma);
  mark_registers(context);
}

void fence(Context& context, const Instruction&, uint32_t) {
  context.warp->wgmma_fence = context.warp->executed;
}

void commit(Context& context, const Instruction&, uint32_t) { ++context.warp->wgmma_groups; }

void wait(Context& context, const Instruction& i, uint32_t) {
  Warp& warp = *context.warp;
  // Groups end in the order in which they were committed.
  const auto stays = [&](const PendingWgmma& wgmma) {
    return warp.wgmma_groups < i.immediate || wgmma.group >= warp.wgmma_groups - i.immediate;
  };
  const auto end = std::find_if(warp.wgmmas.begin(), warp.wgmmas.end(), stays);
  if (end == warp.wgmmas.begin()) return;
  for (auto wgmma = warp.wgmmas.begin(); wgmma != end; ++wgmma) {
    const Instruction& issued = *wgmma->instruction;
    (Modes::of(issued).bfloat ? compute<Bfloat> : compute<Half>)(context, *wgmma);
    for_shared_pieces(context, *wgmma, [&](uint32_t address) {
      context.block->shared.end_async_read(address, kPiece, warp.index);
    });
    for (int r = 0; r < issued.d.parts; ++r) {
      context.set_defined(context.part(issued.d, r), kAllLanes, kAllLanes);
    }
  }
  warp.wgmmas.erase(warp.wgmmas.begin(), end);
  mark_registers(context);
}

uint32_t columns_of(const Decoding& x) {
  for (const std::string_view modifier : x.statement.modifiers) {
    if (modifier.substr(0, 4) != "m64n" || modifier.substr(modifier.size() - 3) != "k16") continue;
    const std::string_view digits = modifier.substr(4, modifier.size() - 7);
    if (!is_number(digits)) break;
    const uint64_t columns = parse_number(digits, false, Type::kU32);
    if (columns % 8 == 0 && columns >= 8 && columns <= kMostColumns) {
      return static_cast<uint32_t>(columns);
    }
  }
  x.unsupported();
}

void decode_product(Decoding& x) {
  const Type inputs = x.type(1);
  const bool known = (inputs == Type::kF16 || inputs == Type::kBf16) && inputs == x.type(2) &&
                     x.type(0) == Type::kF32;
  if (!known || x.has("sp")) x.unsupported();
  Modes modes = {};
  modes.columns = columns_of(x);
  x.out.d = x.destination(0);
  x.out.a = x.source(1, Type::kB64);  // registers in braces, or a descriptor
  x.out.b = x.source(2, Type::kB64);
  x.out.c = x.source(3, Type::kPred);
  const bool registers = a_in_registers(x.out);
  const size_t operands = registers ? 7 : 8;
  if (x.operands() != operands) fail("%zu operands, expected %zu", x.operands(), operands);
  if (x.out.d.parts != modes.columns / 2 || (registers && x.out.a.parts != 4)) {
    fail("wgmma: D needs %u registers, A 4", modes.columns / 2);
  }
  if (x.out.c.kind != Operand::kPredicate) x.unsupported();
  const auto sign = [&](size_t k) {
    const uint32_t value = x.immediate(k);
    if (value != 1 && value != ~0u) x.unsupported();
    return value != 1;
  };
  modes.negate_a = sign(4);
  modes.negate_b = sign(5);
  modes.transpose_a = !registers && x.immediate(6) != 0;
  modes.transpose_b = x.immediate(registers ? 6 : 7) != 0;
  modes.bfloat = inputs == Type::kBf16;
  x.out.immediate = modes.packed();
  x.out.is_wgmma = true;
  x.out.execute = issue;
}

void decode_wgmma(Decoding& x) {
  if (!x.has("sync") || !x.has("aligned")) x.unsupported();
  x.out.convergence = Convergence::kWholeWarp;
  x.out.definedness = Definedness::kHandler;
  x.out.instruction_class = InstructionClass::k_tensor;
  if (x.has("mma_async")) {
    decode_product(x);
  } else if (x.has("fence")) {
    x.out.execute = fence;
  } else if (x.has("commit_group")) {
    x.out.execute = commit;
  } else if (x.has("wait_group")) {
    x.out.immediate = x.immediate(0);
    x.out.execute = wait;
  } else {
    x.unsupported();
  }
}

}  // namespace

void register_warpgroup_products(OpcodeTable& table) { table["wgmma"] = decode_wgmma; }

}  // namespace ptxsim
