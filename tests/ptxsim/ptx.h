// PTX text: tokens, statements, and what a module declares. Nothing here knows what an instruction
// means.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace ptxsim {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

enum class Type {
  kNone,
  kPred,
  kB8,
  kU8,
  kS8,
  kB16,
  kU16,
  kS16,
  kB32,
  kU32,
  kS32,
  kB64,
  kU64,
  kS64,
  kF16,
  kBf16,
  kF16x2,
  kBf16x2,
  kTf32,
  kF32,
  kF64,
};

Type parse_type(std::string_view name);  // without the dot; kNone if it is no type
unsigned width_of(Type type);            // in bytes
bool is_signed_integer(Type type);

struct Token {
  enum Kind { kWord, kString, kPunctuation, kEnd };
  Kind kind;
  std::string_view text;
  int line;
};

std::vector<Token> tokenize(std::string_view text, int first_line);

// One operand as written: a word (register, symbol, number), an address [base+offset], a vector
// {...}, or two words p|q.
struct OperandText {
  enum Form { kWord, kAddress, kVector };
  Form form = kWord;
  bool negated = false;  // !p
  bool minus = false;    // -1
  std::string_view word;
  std::string_view second;  // q of p|q
  int64_t offset = 0;
  std::vector<OperandText> parts;
};

struct Statement {
  int line = 0;
  std::string text;
  std::string_view guard;
  bool guard_negated = false;
  std::string_view opcode;
  std::vector<std::string_view> modifiers;
  std::vector<OperandText> operands;

  bool has(std::string_view modifier) const;
};

uint64_t parse_number(std::string_view word, bool minus, Type type);
bool is_number(std::string_view word);

struct Parameter {
  std::string name;
  uint32_t offset;
  uint32_t bytes;
};

enum class Space { kGeneric, kGlobal, kShared, kLocal, kConst, kParam };

struct Variable {
  std::string name;
  Space space = Space::kGlobal;
  uint32_t align = 1;
  uint64_t bytes = 0;  // 0: extern shared memory, the dynamic part
  std::vector<uint8_t> initial;
};

struct KernelText {
  std::string name;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t max_threads = 1024;  // .maxntid
  std::string_view body;        // between the braces
  int body_line = 0;
};

struct AlignedDelete {
  void operator()(uint8_t* pointer) const;
};

// A loaded PTX text. Kernels are decoded when they are first launched; until then only their
// outlines are known.
struct Module {
  explicit Module(std::string ptx);

  std::string text;
  std::vector<KernelText> kernels;
  std::map<std::string, Variable, std::less<>> variables;
  // Where .global and .const variables live.
  std::map<std::string, std::unique_ptr<uint8_t[], AlignedDelete>, std::less<>> storage;
};

// Parses `.shared .align 4 .b8 name[64] = {...};` from the token after the state space.
std::vector<Variable> parse_variables(const std::vector<Token>& tokens, size_t& at, Space space);

}  // namespace ptxsim
