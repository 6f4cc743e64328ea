// Builds a kernel from its text, statement by statement.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "decode.h"

namespace ptxsim {

// Walks through a kernel's body: scopes, declarations, labels, instructions.
class KernelBuilder {
 public:
  KernelBuilder(const Module& module, const KernelText& text, Kernel& kernel)
      : module_(module),
        text_(text),
        kernel_(kernel),
        tokens_(tokenize(text.body, text.body_line)) {
    kernel_.register_names.push_back("a constant");
    scopes_.emplace_back();
  }

  void build();

  Operand resolve(const OperandText& text, Type type);
  Operand constant(uint64_t bits, bool wide);
  const Kernel& kernel() const { return kernel_; }
  void require_label(std::string_view name, size_t instruction) {
    scopes_.back().pending.push_back({std::string(name), instruction, tokens_[at_ - 1].line});
  }
  int64_t parameter_offset(std::string_view name) const {
    for (const Parameter& parameter : kernel_.parameters) {
      if (parameter.name == name) return parameter.offset;
    }
    return -1;
  }

  std::vector<uint32_t> reads, writes;  // of the statement being decoded

 private:
  struct PendingLabel {
    std::string name;
    size_t instruction;
    int line;
  };
  struct Scope {
    std::map<std::string, Operand, std::less<>> registers;
    std::map<std::string, uint32_t, std::less<>> labels;
    std::map<std::string, std::vector<std::string>, std::less<>> branch_tables;
    std::vector<PendingLabel> pending;
  };

  void close_scope();
  void declare_registers();
  void declare_register(std::string name, Type type);
  void parse_directive();
  void parse_instruction();
  OperandText parse_operand();
  Operand special(std::string_view name);
  uint64_t symbol_address(const Variable& variable);
  const Variable* find_variable(std::string_view name) const;

  const Token& token(size_t ahead = 0) const {
    static const Token end{Token::kEnd, "", 0};
    return at_ + ahead < tokens_.size() ? tokens_[at_ + ahead] : end;
  }
  void expect(std::string_view text) {
    if (token().text != text) {
      fail("PTX line %d: expected '%s', got '%s'", token().line, std::string(text).c_str(),
           std::string(token().text).c_str());
    }
    ++at_;
  }

  const Module& module_;
  const KernelText& text_;
  Kernel& kernel_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  std::vector<Scope> scopes_;
  std::map<std::pair<uint64_t, bool>, Operand> constants_;
  std::map<std::string, Operand, std::less<>> specials_;
  std::map<std::string, Variable, std::less<>> body_variables_;
  std::map<std::string, uint32_t, std::less<>> placed_;  // shared and local variables
};

}  // namespace ptxsim
