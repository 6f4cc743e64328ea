#include "decode.h"

#include <algorithm>

#include "builder.h"

namespace ptxsim {

const OpcodeTable& opcodes() {
  static const OpcodeTable table = [] {
    OpcodeTable filled;
    register_moves(filled);
    register_integers(filled);
    register_bits(filled);
    register_floats(filled);
    register_halves(filled);
    register_conversions(filled);
    register_comparisons(filled);
    register_memory(filled);
    register_atomics(filled);
    register_async_copies(filled);
    register_warp_functions(filled);
    register_tensor_cores(filled);
    register_warpgroup_products(filled);
    register_control(filled);
    return filled;
  }();
  return table;
}

Type Decoding::type() const {
  for (auto modifier = statement.modifiers.rbegin(); modifier != statement.modifiers.rend();
       ++modifier) {
    if (const Type found = parse_type(*modifier); found != Type::kNone) return found;
  }
  unsupported();
}

Type Decoding::type(size_t which) const {
  for (const std::string_view modifier : statement.modifiers) {
    const Type found = parse_type(modifier);
    if (found != Type::kNone && which-- == 0) return found;
  }
  unsupported();
}

std::string_view Decoding::word(size_t k) const {
  if (k >= operands()) fail("too few operands");
  return statement.operands[k].word;
}

namespace {

void record(const Kernel& kernel, const Operand& operand, std::vector<uint32_t>& ids) {
  if (operand.kind == Operand::kVector) {
    for (int part = 0; part < operand.parts; ++part) {
      ids.push_back(kernel.parts[operand.offset + part].id);
    }
  } else {
    ids.push_back(operand.id);
  }
}

}  // namespace

Operand Decoding::source(const OperandText& text, Type type) {
  const Operand operand = builder_.resolve(text, type);
  record(builder_.kernel(), operand, builder_.reads);
  return operand;
}

Operand Decoding::destination(const OperandText& text) {
  const Operand operand = builder_.resolve(text, Type::kB64);
  if (operand.kind == Operand::kConstant) fail("a constant cannot be written");
  record(builder_.kernel(), operand, builder_.writes);
  return operand;
}

Operand Decoding::source(size_t k, Type type) {
  if (k >= operands()) fail("too few operands");
  return source(statement.operands[k], type);
}

Operand Decoding::destination(size_t k) {
  if (k >= operands()) fail("too few operands");
  return destination(statement.operands[k]);
}

Operand Decoding::second_destination(size_t k) {
  if (statement.operands.at(k).second.empty()) return {};
  OperandText text;
  text.word = statement.operands[k].second;
  return destination(text);
}

Operand Decoding::address(size_t k, Space space) {
  // Addresses in shared and local memory may be held in 32 bits; a symbol or number becomes as
  // wide.
  const bool narrow = space == Space::kShared || space == Space::kLocal || space == Space::kParam;
  return source(k, narrow ? Type::kU32 : Type::kU64);
}

uint32_t Decoding::immediate(size_t k) const {
  const OperandText& text = statement.operands.at(k);
  if (!is_number(text.word)) fail("operand %zu must be a number", k);
  return static_cast<uint32_t>(parse_number(text.word, text.minus, Type::kU32));
}

int64_t Decoding::parameter_offset(std::string_view name) const {
  return builder_.parameter_offset(name);
}

void Decoding::unsupported() const { fail("unknown instruction"); }

Kernel decode_kernel(const Module& module, const KernelText& text) {
  Kernel kernel;
  kernel.name = text.name;
  kernel.parameters = text.parameters;
  kernel.parameter_bytes = text.parameter_bytes;
  kernel.max_threads = text.max_threads;
  KernelBuilder(module, text, kernel).build();
  kernel.uses_wgmma = std::any_of(kernel.instructions.begin(), kernel.instructions.end(),
                                  [](const Instruction& i) { return i.is_wgmma; });
  return kernel;
}

}  // namespace ptxsim
