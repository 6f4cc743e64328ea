#include "ptx.h"

#include <algorithm>
#include <cctype>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace ptxsim {

void fail(const char* format, ...) {
  char message[2048];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw Error(message);
}

namespace {

struct TypeName {
  std::string_view name;
  Type type;
  unsigned width;
};

constexpr TypeName kTypeNames[] = {
    {"pred", Type::kPred, 0},   {"b8", Type::kB8, 1},         {"u8", Type::kU8, 1},
    {"s8", Type::kS8, 1},       {"b16", Type::kB16, 2},       {"u16", Type::kU16, 2},
    {"s16", Type::kS16, 2},     {"b32", Type::kB32, 4},       {"u32", Type::kU32, 4},
    {"s32", Type::kS32, 4},     {"b64", Type::kB64, 8},       {"u64", Type::kU64, 8},
    {"s64", Type::kS64, 8},     {"f16", Type::kF16, 2},       {"bf16", Type::kBf16, 2},
    {"f16x2", Type::kF16x2, 4}, {"bf16x2", Type::kBf16x2, 4}, {"tf32", Type::kTf32, 4},
    {"f32", Type::kF32, 4},     {"f64", Type::kF64, 8},
};

bool is_word_character(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
         c == '.';
}

const Token kEndToken{Token::kEnd, "", 0};

const Token& token_at(const std::vector<Token>& tokens, size_t at) {
  return at < tokens.size() ? tokens[at] : kEndToken;
}

void expect(const std::vector<Token>& tokens, size_t& at, std::string_view text) {
  const Token& token = token_at(tokens, at);
  if (token.text != text) {
    fail("PTX line %d: expected '%s', got '%s'", token.line, std::string(text).c_str(),
         std::string(token.text).c_str());
  }
  ++at;
}

}  // namespace

Type parse_type(std::string_view name) {
  for (const TypeName& entry : kTypeNames) {
    if (entry.name == name) return entry.type;
  }
  return Type::kNone;
}

unsigned width_of(Type type) {
  for (const TypeName& entry : kTypeNames) {
    if (entry.type == type) return entry.width;
  }
  return 0;
}

bool is_signed_integer(Type type) {
  return type == Type::kS8 || type == Type::kS16 || type == Type::kS32 || type == Type::kS64;
}

std::vector<Token> tokenize(std::string_view text, int first_line) {
  std::vector<Token> tokens;
  int line = first_line;
  size_t at = 0;
  while (at < text.size()) {
    const char c = text[at];
    if (c == '\n') ++line;
    if (std::isspace(static_cast<unsigned char>(c)) || c == '\0') {
      ++at;
    } else if (text.compare(at, 2, "//") == 0) {
      at = std::min(text.find('\n', at), text.size());
    } else if (text.compare(at, 2, "/*") == 0) {
      const size_t end = std::min(text.find("*/", at + 2), text.size() - 2);
      line += static_cast<int>(std::count(text.begin() + at, text.begin() + end, '\n'));
      at = end + 2;
    } else if (c == '"') {
      const size_t end = std::min(text.find('"', at + 1), text.size() - 1);
      tokens.push_back({Token::kString, text.substr(at, end + 1 - at), line});
      at = end + 1;
    } else if (is_word_character(c)) {
      size_t end = at;
      while (end < text.size()) {
        if (is_word_character(text[end])) {
          ++end;
        } else if (text.compare(end, 2, "::") == 0) {  // L2::cache_hint, shared::cta
          end += 2;
        } else {
          break;
        }
      }
      tokens.push_back({Token::kWord, text.substr(at, end - at), line});
      at = end;
    } else {
      tokens.push_back({Token::kPunctuation, text.substr(at, 1), line});
      ++at;
    }
  }
  return tokens;
}

bool Statement::has(std::string_view modifier) const {
  return std::find(modifiers.begin(), modifiers.end(), modifier) != modifiers.end();
}

bool is_number(std::string_view word) {
  return !word.empty() && std::isdigit(static_cast<unsigned char>(word[0]));
}

uint64_t parse_number(std::string_view word, bool minus, Type type) {
  std::string digits(word);
  const bool is_float_type = type == Type::kF32 || type == Type::kF64;
  char* end = nullptr;
  uint64_t bits = 0;
  if (digits.size() == 10 && digits[0] == '0' && (digits[1] == 'f' || digits[1] == 'F')) {
    bits = std::strtoull(digits.c_str() + 2, &end, 16);
    if (minus) bits ^= 0x80000000u;
    if (type == Type::kF64) {
      float single;
      const uint32_t low = static_cast<uint32_t>(bits);
      std::memcpy(&single, &low, 4);
      const double value = single;
      std::memcpy(&bits, &value, 8);
    }
  } else if (digits.size() == 18 && digits[0] == '0' && (digits[1] == 'd' || digits[1] == 'D')) {
    bits = std::strtoull(digits.c_str() + 2, &end, 16);
    if (minus) bits ^= 1ull << 63;
  } else if (is_float_type || digits.find('.') != std::string::npos) {
    const double value = std::strtod(digits.c_str(), &end) * (minus ? -1 : 1);
    if (width_of(type) == 8) {
      std::memcpy(&bits, &value, 8);
    } else {
      const float single = static_cast<float>(value);
      uint32_t low;
      std::memcpy(&low, &single, 4);
      bits = low;
    }
  } else {
    if (digits.back() == 'U') digits.pop_back();
    const bool binary =
        digits.size() > 2 && digits[0] == '0' && (digits[1] == 'b' || digits[1] == 'B');
    bits = binary ? std::strtoull(digits.c_str() + 2, &end, 2)
                  : std::strtoull(digits.c_str(), &end, 0);
    if (minus) bits = ~bits + 1;
  }
  if (end == nullptr || *end != '\0') fail("cannot read the number '%s'", digits.c_str());
  return bits;
}

std::vector<Variable> parse_variables(const std::vector<Token>& tokens, size_t& at, Space space) {
  uint32_t align = 0;
  Type type = Type::kNone;
  while (!token_at(tokens, at).text.empty() && token_at(tokens, at).text[0] == '.') {
    const std::string_view word = tokens[at].text;
    if (word == ".align") {
      align = static_cast<uint32_t>(parse_number(token_at(tokens, ++at).text, false, Type::kU32));
    } else if (const Type found = parse_type(word.substr(1)); found != Type::kNone) {
      type = found;
    }  // others (.attribute, .ptr) say nothing about size or place
    ++at;
  }
  std::vector<Variable> variables;
  while (true) {
    Variable variable;
    variable.space = space;
    variable.name = token_at(tokens, at++).text;
    const uint32_t element = width_of(type);
    variable.align = align ? align : element;
    uint64_t count = 1;
    while (token_at(tokens, at).text == "[") {
      ++at;
      uint64_t extent = 0;  // name[]: extern, sized by the launch
      if (token_at(tokens, at).text != "]") {
        extent = parse_number(tokens[at++].text, false, Type::kU64);
      }
      expect(tokens, at, "]");
      count *= extent;
    }
    variable.bytes = count * element;
    if (token_at(tokens, at).text == "=") {
      ++at;
      variable.initial.assign(variable.bytes, 0);
      size_t position = 0;
      int depth = 0;
      do {
        const Token& token = token_at(tokens, at++);
        if (token.text == "{") {
          ++depth;
        } else if (token.text == "}") {
          --depth;
        } else if (token.text != ",") {
          const bool minus = token.text == "-";
          const Token& value = minus ? token_at(tokens, at++) : token;
          if (!is_number(value.text)) {
            fail("PTX line %d: unsupported initialiser '%s' of %s", value.line,
                 std::string(value.text).c_str(), variable.name.c_str());
          }
          const uint64_t bits = parse_number(value.text, minus, type);
          if (position + element > variable.bytes) {
            fail("PTX line %d: too many initialisers of %s", value.line, variable.name.c_str());
          }
          std::memcpy(&variable.initial[position], &bits, element);
          position += element;
        }
      } while (depth > 0);
    }
    variables.push_back(std::move(variable));
    if (token_at(tokens, at).text != ",") break;
    ++at;
  }
  expect(tokens, at, ";");
  return variables;
}

namespace {

std::vector<Parameter> parse_parameters(const std::vector<Token>& tokens, size_t& at,
                                        uint32_t& total) {
  std::vector<Parameter> parameters;
  expect(tokens, at, "(");
  uint32_t offset = 0;
  while (token_at(tokens, at).text != ")") {
    expect(tokens, at, ".param");
    uint32_t align = 0;
    Type type = Type::kNone;
    for (; token_at(tokens, at).text[0] == '.'; ++at) {
      const std::string_view word = tokens[at].text;
      if (word == ".align") {
        align = static_cast<uint32_t>(parse_number(token_at(tokens, ++at).text, false, Type::kU32));
      } else if (word == ".ptr") {
        // .ptr .global .align 16: the alignment of what is pointed to, not of the parameter
        while (token_at(tokens, at + 1).text[0] == '.') {
          if (tokens[++at].text == ".align") ++at;
        }
      } else if (const Type found = parse_type(word.substr(1)); found != Type::kNone) {
        type = found;
      }
    }
    const std::string name(token_at(tokens, at++).text);
    uint32_t count = 1;
    if (token_at(tokens, at).text == "[") {
      count = static_cast<uint32_t>(parse_number(token_at(tokens, ++at).text, false, Type::kU32));
      ++at;
      expect(tokens, at, "]");
    }
    if (align == 0) align = width_of(type);
    offset = (offset + align - 1) / align * align;
    parameters.push_back({name, offset, width_of(type) * count});
    offset += width_of(type) * count;
    if (token_at(tokens, at).text == ",") ++at;
  }
  ++at;
  total = offset;
  return parameters;
}

// The end of a brace block that opens at `open`, comments and strings left aside.
size_t closing_brace(std::string_view text, size_t open) {
  int depth = 0;
  for (size_t at = open; at < text.size(); ++at) {
    if (text.compare(at, 2, "//") == 0) {
      at = std::min(text.find('\n', at), text.size());
    } else if (text[at] == '"') {
      at = std::min(text.find('"', at + 1), text.size());
    } else if (text[at] == '{') {
      ++depth;
    } else if (text[at] == '}' && --depth == 0) {
      return at;
    }
  }
  fail("PTX: a kernel's closing brace is missing");
}

// The part of `text` from `start` up to and with the first `stop` outside of comments.
size_t find_outside_comments(std::string_view text, size_t start, std::string_view stops) {
  for (size_t at = start; at < text.size(); ++at) {
    if (text.compare(at, 2, "//") == 0) {
      at = std::min(text.find('\n', at), text.size());
    } else if (stops.find(text[at]) != std::string_view::npos) {
      return at;
    }
  }
  return std::string_view::npos;
}

void parse_entry(Module& module, const std::vector<Token>& header, size_t at, std::string_view body,
                 int body_line) {
  KernelText kernel;
  kernel.name = token_at(header, at++).text;
  if (token_at(header, at).text == "(") {
    kernel.parameters = parse_parameters(header, at, kernel.parameter_bytes);
  }
  for (; at < header.size(); ++at) {
    if (header[at].text != ".maxntid") continue;
    kernel.max_threads = 1;
    while (is_number(token_at(header, at + 1).text)) {
      kernel.max_threads *=
          static_cast<uint32_t>(parse_number(header[++at].text, false, Type::kU32));
      if (token_at(header, at + 1).text == ",") ++at;
    }
  }
  kernel.body = body;
  kernel.body_line = body_line;
  module.kernels.push_back(std::move(kernel));
}

}  // namespace

void AlignedDelete::operator()(uint8_t* pointer) const { std::free(pointer); }

Module::Module(std::string ptx) : text(std::move(ptx)) {
  const std::string_view source(text);
  size_t start = 0;
  int line = 1;
  bool initialiser = false;
  // Top-level items end in ';' (variables), '}' (functions) or with their line (.version, .target).
  for (size_t search = 0; (search = find_outside_comments(source, search, ";{")) != source.npos;) {
    const std::vector<Token> tokens = tokenize(source.substr(start, search - start), line);
    const auto is = [&](std::string_view word) {
      return std::any_of(tokens.begin(), tokens.end(),
                         [&](const Token& t) { return t.text == word; });
    };
    if (source[search] == '{' && !tokens.empty() && tokens.back().text == "=") initialiser = true;
    size_t end = search;
    if (source[search] == '{') end = closing_brace(source, search);
    if (initialiser && source[search] == '{') {
      search = end + 1;  // goes on to the variable's semicolon
      continue;
    }
    if (source[search] == '{') {
      for (size_t at = 0; at < tokens.size(); ++at) {
        if (tokens[at].text != ".entry") continue;
        const int body_line = line + static_cast<int>(std::count(source.begin() + start,
                                                                 source.begin() + search, '\n'));
        parse_entry(*this, tokens, at + 1, source.substr(search + 1, end - search - 1), body_line);
      }
    } else if (!is(".func")) {
      std::vector<Token> whole = tokenize(source.substr(start, search + 1 - start), line);
      for (size_t at = 0; at < whole.size(); ++at) {
        const std::string_view word = whole[at].text;
        if (word != ".shared" && word != ".global" && word != ".const") continue;
        ++at;
        const Space space = word == ".shared"   ? Space::kShared
                            : word == ".global" ? Space::kGlobal
                                                : Space::kConst;
        for (Variable& variable : parse_variables(whole, at, space)) {
          std::string name = variable.name;
          variables.emplace(std::move(name), std::move(variable));
        }
        break;
      }
    }
    initialiser = false;
    line += static_cast<int>(std::count(source.begin() + start, source.begin() + end + 1, '\n'));
    start = search = end + 1;
  }
  for (const auto& [name, variable] : variables) {
    if (variable.space == Space::kShared) continue;
    constexpr size_t kAlignment = 256;
    const size_t bytes = (variable.bytes + kAlignment) / kAlignment * kAlignment;
    auto* memory = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, bytes));
    std::memset(memory, 0, bytes);
    if (!variable.initial.empty()) std::memcpy(memory, variable.initial.data(), variable.bytes);
    storage.emplace(name, std::unique_ptr<uint8_t[], AlignedDelete>(memory));
  }
}

}  // namespace ptxsim
