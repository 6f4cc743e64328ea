#include "builder.h"

#include <algorithm>

namespace ptxsim {
namespace {

struct SpecialName {
  std::string_view name;
  Special what;
  bool wide;
};

constexpr SpecialName kSpecialNames[] = {
    {"%tid.x", Special::kTidX, false},
    {"%tid.y", Special::kTidY, false},
    {"%tid.z", Special::kTidZ, false},
    {"%ntid.x", Special::kNtidX, false},
    {"%ntid.y", Special::kNtidY, false},
    {"%ntid.z", Special::kNtidZ, false},
    {"%ctaid.x", Special::kCtaidX, false},
    {"%ctaid.y", Special::kCtaidY, false},
    {"%ctaid.z", Special::kCtaidZ, false},
    {"%nctaid.x", Special::kNctaidX, false},
    {"%nctaid.y", Special::kNctaidY, false},
    {"%nctaid.z", Special::kNctaidZ, false},
    {"%laneid", Special::kLaneId, false},
    {"%warpid", Special::kWarpId, false},
    {"%nwarpid", Special::kNwarpId, false},
    {"%lanemask_eq", Special::kLanemaskEq, false},
    {"%lanemask_lt", Special::kLanemaskLt, false},
    {"%lanemask_le", Special::kLanemaskLe, false},
    {"%lanemask_gt", Special::kLanemaskGt, false},
    {"%lanemask_ge", Special::kLanemaskGe, false},
    {"%smid", Special::kSmId, false},
    {"%nsmid", Special::kNsmId, false},
    {"%dynamic_smem_size", Special::kDynamicSharedBytes, false},
    {"%total_smem_size", Special::kTotalSharedBytes, false},
    {"%clock", Special::kClock, false},
    {"%clock64", Special::kClock, true},
};

}  // namespace

void KernelBuilder::build() {
  // Static shared memory is laid out first, as its size is where the dynamic part begins: every
  // variable that the body mentions, in the order of mention.
  for (size_t at = 0; at < tokens_.size(); ++at) {
    if (tokens_[at].text == ".shared" && at > 0 &&
        (tokens_[at - 1].text == ";" || tokens_[at - 1].text == "{" ||
         tokens_[at - 1].text == ":")) {
      for (Variable& variable : parse_variables(tokens_, ++at, Space::kShared)) {
        body_variables_[variable.name] = variable;
      }
      --at;
    }
  }
  for (const Token& each : tokens_) {
    const Variable* variable = find_variable(each.text);
    if (variable == nullptr || variable->space != Space::kShared || variable->bytes == 0 ||
        placed_.count(variable->name)) {
      continue;
    }
    const uint32_t place =
        (kernel_.static_shared + variable->align - 1) / variable->align * variable->align;
    placed_[variable->name] = place;
    kernel_.static_shared = place + static_cast<uint32_t>(variable->bytes);
  }
  kernel_.dynamic_shared_offset = kernel_.static_shared;
  while (at_ < tokens_.size()) {
    if (token().text == "{") {
      scopes_.emplace_back();
      ++at_;
    } else if (token().text == "}") {
      close_scope();
      ++at_;
    } else if (token().text == ";") {
      ++at_;
    } else if (token(1).text == ":") {
      scopes_.back().labels[std::string(token().text)] =
          static_cast<uint32_t>(kernel_.instructions.size());
      if (token(2).text == ".branchtargets") {
        std::vector<std::string>& table = scopes_.back().branch_tables[std::string(token().text)];
        for (at_ += 3; token().text != ";"; ++at_) {
          if (token().text != ",") table.emplace_back(token().text);
        }
      } else {
        at_ += 2;
      }
    } else if (token().text[0] == '.') {
      parse_directive();
    } else {
      parse_instruction();
    }
  }
  close_scope();
}

void KernelBuilder::close_scope() {
  Scope scope = std::move(scopes_.back());
  scopes_.pop_back();
  for (PendingLabel& pending : scope.pending) {
    Instruction& instruction = kernel_.instructions[pending.instruction];
    const auto find = [&](const std::string& name) -> const uint32_t* {
      const auto found = scope.labels.find(name);
      return found == scope.labels.end() ? nullptr : &found->second;
    };
    if (const auto table = scope.branch_tables.find(pending.name);
        table != scope.branch_tables.end()) {
      instruction.target = static_cast<uint32_t>(kernel_.branch_targets.size());
      instruction.immediate = static_cast<uint32_t>(table->second.size());
      for (const std::string& name : table->second) {
        const uint32_t* target = find(name);
        if (target == nullptr) fail("PTX line %d: no label '%s'", pending.line, name.c_str());
        kernel_.branch_targets.push_back(*target);
      }
    } else if (const uint32_t* target = find(pending.name)) {
      instruction.target = *target;
    } else if (!scopes_.empty()) {
      scopes_.back().pending.push_back(std::move(pending));
    } else {
      fail("PTX line %d: no label '%s'", pending.line, pending.name.c_str());
    }
  }
}

void KernelBuilder::declare_register(std::string name, Type type) {
  Operand operand;
  operand.id = static_cast<uint32_t>(kernel_.register_names.size());
  kernel_.register_names.push_back(name);
  if (type == Type::kPred) {
    operand.kind = Operand::kPredicate;
    operand.offset = kernel_.predicates++;
  } else {
    operand.kind = Operand::kRegister;
    operand.wide = width_of(type) == 8;
    operand.offset = kernel_.register_words;
    kernel_.register_words += operand.wide ? 2 * kLanes : kLanes;
  }
  scopes_.back().registers[std::move(name)] = operand;
}

void KernelBuilder::declare_registers() {
  const Type type = parse_type(token(1).text.substr(1));
  if (type == Type::kNone) {
    fail("PTX line %d: unknown register type '%s'", token().line,
         std::string(token(1).text).c_str());
  }
  for (at_ += 2;; ++at_) {
    const std::string name(token().text);
    ++at_;
    if (token().text == "<") {
      const uint64_t count = parse_number(token(1).text, false, Type::kU32);
      for (uint64_t k = 0; k < count; ++k) declare_register(name + std::to_string(k), type);
      at_ += 2;
      expect(">");
    } else {
      declare_register(name, type);
    }
    if (token().text != ",") break;
  }
  expect(";");
}

void KernelBuilder::parse_directive() {
  const std::string_view word = token().text;
  if (word == ".reg") {
    declare_registers();
  } else if (word == ".shared") {
    parse_variables(tokens_, ++at_, Space::kShared);  // placed beforehand
  } else if (word == ".local") {
    for (Variable& variable : parse_variables(tokens_, ++at_, Space::kLocal)) {
      const uint32_t place =
          (kernel_.local_bytes + variable.align - 1) / variable.align * variable.align;
      kernel_.local_bytes = place + static_cast<uint32_t>(variable.bytes);
      placed_[variable.name] = place;
      body_variables_[variable.name] = variable;
    }
  } else if (word == ".loc") {  // ends with its line
    const int line = token().line;
    while (token().kind != Token::kEnd && token().line == line) ++at_;
  } else if (word == ".pragma") {
    while (token().text != ";") ++at_;
  } else {
    fail("PTX line %d: unsupported directive '%s'", token().line, std::string(word).c_str());
  }
}

OperandText KernelBuilder::parse_operand() {
  OperandText operand;
  if (token().text == "{") {
    operand.form = OperandText::kVector;
    do {
      ++at_;
      operand.parts.push_back(parse_operand());
    } while (token().text == ",");
    expect("}");
    return operand;
  }
  const bool bracket = token().text == "[";
  if (bracket) {
    operand.form = OperandText::kAddress;
    ++at_;
  }
  if (token().text == "!") {
    operand.negated = true;
    ++at_;
  }
  if (token().text == "-") {
    operand.minus = true;
    ++at_;
  }
  if (token().kind != Token::kWord) {
    fail("PTX line %d: expected an operand, got '%s'", token().line,
         std::string(token().text).c_str());
  }
  operand.word = token().text;
  ++at_;
  if (token().text == "|") {
    operand.second = token(1).text;
    at_ += 2;
  }
  if (token().text == "+" || token().text == "-") {
    bool minus = token().text == "-";
    ++at_;
    if (token().text == "-") {
      minus = !minus;
      ++at_;
    }
    operand.offset = static_cast<int64_t>(parse_number(token().text, minus, Type::kS64));
    ++at_;
  }
  if (bracket) expect("]");
  return operand;
}

void KernelBuilder::parse_instruction() {
  const size_t first = at_;
  Statement statement;
  statement.line = token().line;
  if (token().text == "@") {
    ++at_;
    if (token().text == "!") {
      statement.guard_negated = true;
      ++at_;
    }
    statement.guard = token().text;
    ++at_;
  }
  std::string_view name = token().text;
  ++at_;
  const char* begin = tokens_[first].text.data();
  size_t last = at_;
  while (last < tokens_.size() && tokens_[last].text != ";") ++last;
  if (last == tokens_.size()) fail("PTX line %d: a semicolon is missing", statement.line);
  statement.text.assign(begin, static_cast<size_t>(tokens_[last].text.data() + 1 - begin));
  std::replace_if(
      statement.text.begin(), statement.text.end(), [](char c) { return c == '\t' || c == '\n'; },
      ' ');

  size_t dot = name.find('.');
  statement.opcode = name.substr(0, dot);
  while (dot != std::string_view::npos) {
    const size_t next = name.find('.', dot + 1);
    statement.modifiers.push_back(name.substr(dot + 1, next - dot - 1));
    dot = next;
  }
  const auto entry = opcodes().find(statement.opcode);
  if (entry == opcodes().end()) {
    fail("PTX line %d: unknown instruction: %s", statement.line, statement.text.c_str());
  }
  while (token().text != ";") {
    statement.operands.push_back(parse_operand());
    if (token().text != ",") break;
    ++at_;
  }
  expect(";");

  Instruction instruction;
  reads.clear();
  writes.clear();
  if (!statement.guard.empty()) {
    OperandText guard;
    guard.word = statement.guard;
    const Operand predicate = resolve(guard, Type::kPred);
    instruction.guard = predicate.offset;
    instruction.guard_id = predicate.id;
    instruction.guard_negated = statement.guard_negated;
  }
  Decoding decoding(*this, statement, instruction);
  try {
    entry->second(decoding);
    if (instruction.control == Control::kBranch || instruction.control == Control::kIndexedBranch) {
      const size_t label = instruction.control == Control::kBranch ? 0 : 1;
      require_label(decoding.word(label), kernel_.instructions.size());
    }
  } catch (const Error& error) {
    fail("PTX line %d: %s: %s", statement.line, error.what(), statement.text.c_str());
  }
  const auto keep = [&](std::vector<uint32_t>& ids, uint32_t& start, uint8_t& count) {
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    ids.erase(std::remove(ids.begin(), ids.end(), 0u), ids.end());
    start = static_cast<uint32_t>(kernel_.register_ids.size());
    count = static_cast<uint8_t>(ids.size());
    kernel_.register_ids.insert(kernel_.register_ids.end(), ids.begin(), ids.end());
  };
  keep(reads, instruction.first_read, instruction.reads);
  keep(writes, instruction.first_write, instruction.writes);
  kernel_.instructions.push_back(instruction);
  kernel_.source.push_back({statement.line, statement.text});
}

const Variable* KernelBuilder::find_variable(std::string_view name) const {
  if (const auto found = body_variables_.find(name); found != body_variables_.end()) {
    return &found->second;
  }
  const auto found = module_.variables.find(name);
  return found == module_.variables.end() ? nullptr : &found->second;
}

uint64_t KernelBuilder::symbol_address(const Variable& variable) {
  if (variable.space == Space::kShared && variable.bytes == 0) {
    // All extern shared arrays are one and the same memory, behind the static variables.
    const uint32_t align = std::max(variable.align, 16u);
    kernel_.dynamic_shared_offset = (kernel_.static_shared + align - 1) / align * align;
    return kernel_.dynamic_shared_offset;
  }
  if (variable.space == Space::kShared || variable.space == Space::kLocal) {
    return placed_.at(variable.name);
  }
  return reinterpret_cast<uint64_t>(module_.storage.at(variable.name).get());
}

Operand KernelBuilder::special(std::string_view name) {
  if (const auto found = specials_.find(name); found != specials_.end()) return found->second;
  for (const SpecialName& entry : kSpecialNames) {
    if (entry.name != name) continue;
    Operand operand;
    operand.kind = Operand::kRegister;
    operand.wide = entry.wide;
    operand.offset = kernel_.register_words;
    kernel_.register_words += entry.wide ? 2 * kLanes : kLanes;
    kernel_.specials.push_back({entry.what, operand.offset, entry.wide});
    specials_.emplace(std::string(name), operand);
    return operand;
  }
  fail("unknown register '%s'", std::string(name).c_str());
}

Operand KernelBuilder::constant(uint64_t bits, bool wide) {
  if (!wide) bits &= 0xffffffffu;
  const auto [place, inserted] = constants_.try_emplace({bits, wide});
  if (inserted) {
    Operand& operand = place->second;
    operand.kind = Operand::kConstant;
    operand.wide = wide;
    operand.offset = static_cast<uint32_t>(kernel_.constants.size());
    for (int lane = 0; lane < kLanes; ++lane) {
      kernel_.constants.push_back(static_cast<uint32_t>(bits));
      if (wide) kernel_.constants.push_back(static_cast<uint32_t>(bits >> 32));
    }
  }
  return place->second;
}

Operand KernelBuilder::resolve(const OperandText& text, Type type) {
  if (text.form == OperandText::kVector) {
    std::vector<Operand> resolved;
    for (const OperandText& part : text.parts) resolved.push_back(resolve(part, type));
    Operand vector;
    vector.kind = Operand::kVector;
    vector.parts = static_cast<uint8_t>(resolved.size());
    vector.offset = static_cast<uint32_t>(kernel_.parts.size());
    kernel_.parts.insert(kernel_.parts.end(), resolved.begin(), resolved.end());
    return vector;
  }
  Operand operand;
  const bool wide = width_of(type) == 8;
  if (is_number(text.word)) {
    operand = constant(parse_number(text.word, text.minus, type), wide);
  } else {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->registers.find(text.word); found != scope->registers.end()) {
        operand = found->second;
        break;
      }
    }
    if (operand.kind == Operand::kNone) {
      if (text.word == "_") {  // a result nobody wants
        declare_register("_", type);
        return resolve(text, type);
      }
      if (text.word[0] == '%') {
        operand = special(text.word);
      } else if (const Variable* variable = find_variable(text.word)) {
        operand = constant(symbol_address(*variable) + static_cast<uint64_t>(text.offset), wide);
        return operand;
      } else if (const int64_t offset = parameter_offset(text.word); offset >= 0) {
        operand = constant(static_cast<uint64_t>(offset), wide);
      } else {
        fail("cannot resolve the operand '%s'", std::string(text.word).c_str());
      }
    }
  }
  operand.negated = text.negated;
  operand.displacement = text.offset;
  return operand;
}

}  // namespace ptxsim
