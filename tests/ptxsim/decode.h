// What the semantics_*.cpp need to turn a statement into an instruction.
#pragma once

#include <map>
#include <string_view>

#include "kernel.h"

namespace ptxsim {

class KernelBuilder;

// One statement being decoded. Operands are asked for by number; asking records who is read and
// written.
class Decoding {
 public:
  Decoding(KernelBuilder& builder, const Statement& statement, Instruction& instruction)
      : statement(statement), out(instruction), builder_(builder) {}

  const Statement& statement;
  Instruction& out;

  bool has(std::string_view modifier) const { return statement.has(modifier); }
  size_t operands() const { return statement.operands.size(); }
  Type type() const;              // the last modifier that is a type
  Type type(size_t which) const;  // the which-th modifier that is a type
  std::string_view word(size_t k) const;

  Operand source(size_t k, Type type);
  Operand destination(size_t k);
  Operand source(const OperandText& text, Type type);
  Operand destination(const OperandText& text);
  Operand second_destination(size_t k);  // q of p|q; kNone if there is none
  Operand address(size_t k, Space space);
  uint32_t immediate(size_t k) const;
  int64_t parameter_offset(std::string_view name) const;  // -1: no parameter of this name

  [[noreturn]] void unsupported() const;

 private:
  KernelBuilder& builder_;
};

using DecodeFunction = void (*)(Decoding&);
using OpcodeTable = std::map<std::string_view, DecodeFunction>;

const OpcodeTable& opcodes();  // all that are known

void register_moves(OpcodeTable& table);
void register_integers(OpcodeTable& table);
void register_bits(OpcodeTable& table);
void register_floats(OpcodeTable& table);
void register_halves(OpcodeTable& table);
void register_conversions(OpcodeTable& table);
void register_comparisons(OpcodeTable& table);
void register_memory(OpcodeTable& table);
void register_atomics(OpcodeTable& table);
void register_async_copies(OpcodeTable& table);
void register_warp_functions(OpcodeTable& table);
void register_tensor_cores(OpcodeTable& table);
void register_warpgroup_products(OpcodeTable& table);
void register_control(OpcodeTable& table);

}  // namespace ptxsim
