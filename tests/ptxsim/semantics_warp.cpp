// What the lanes of a warp do together: shuffles, votes, reductions, matches.
#include <algorithm>

#include "access.h"
#include "decode.h"
#include "lanes.h"
#include "semantics.h"

namespace ptxsim {
namespace {

enum ShuffleMode : uint32_t { kUp, kDown, kButterfly, kIndex };

void shuffle(Context& context, const Instruction& i, uint32_t mask) {
  ++context.counters->shuffles;
  const uint32_t* a = context.source(i.a);
  const uint32_t* b = context.source(i.b);
  const uint32_t* c = context.source(i.c);
  uint32_t values[kLanes];
  uint32_t in_range = 0;
  for_active(mask, [&](int lane) {
    const int clamp = static_cast<int>(c[lane] & 31);
    const int segment = static_cast<int>(c[lane] >> 8 & 31);
    const int offset = static_cast<int>(b[lane] & 31);
    const int lowest = lane & segment;
    const int limit = lowest | (clamp & ~segment);
    int from = lane;
    bool valid = false;
    switch (i.immediate) {
      case kUp:
        from = lane - offset;
        valid = from >= limit;
        break;
      case kDown:
        from = lane + offset;
        valid = from <= limit;
        break;
      case kButterfly:
        from = lane ^ offset;
        valid = from <= limit;
        break;
      default:
        from = lowest | (offset & ~segment);
        valid = from <= limit;
        break;
    }
    if (!valid) from = lane;
    if (!(mask >> from & 1)) {
      fail("inactive lanes: lane %d reads from lane %d, which does not take part", lane, from);
    }
    values[lane] = a[from];
    in_range |= static_cast<uint32_t>(valid) << lane;
  });
  uint32_t* d = context.destination(i.d);
  for_active(mask, [&](int lane) { d[lane] = values[lane]; });
  if (i.e.kind != Operand::kNone) context.set_predicate(i.e, in_range, mask);
}

// An instruction with the lanes that take part named by operand k.
void take_members(Decoding& x, size_t k) {
  x.out.members = x.source(k, Type::kB32);
  x.out.convergence = Convergence::kMemberMask;
  x.out.definedness = Definedness::kStrict;
}

void decode_shuffle(Decoding& x) {
  if (!x.has("sync")) x.unsupported();
  x.out.d = x.destination(0);
  x.out.e = x.second_destination(0);
  x.out.a = x.source(1, Type::kB32);
  x.out.b = x.source(2, Type::kB32);
  x.out.c = x.source(3, Type::kB32);
  take_members(x, 4);
  x.out.immediate = x.has("up") ? kUp : x.has("down") ? kDown : x.has("bfly") ? kButterfly : kIndex;
  x.out.execute = shuffle;
}

enum VoteMode : uint32_t { kAll, kAny, kUniform, kBallot };

void vote(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t yes = context.predicate(i.a) & mask;
  if (i.immediate == kBallot) {
    uint32_t* d = context.destination(i.d);
    for_lanes(mask, [&](int lane) { d[lane] = yes; });
    return;
  }
  const bool result = i.immediate == kAll   ? yes == mask
                      : i.immediate == kAny ? yes != 0
                                            : yes == mask || yes == 0;
  context.set_predicate(i.d, result ? kAllLanes : 0, mask);
}

void decode_vote(Decoding& x) {
  if (!x.has("sync")) x.unsupported();
  x.out.d = x.destination(0);
  x.out.a = x.source(1, Type::kPred);
  take_members(x, 2);
  x.out.immediate = x.has("all") ? kAll : x.has("any") ? kAny : x.has("uni") ? kUniform : kBallot;
  x.out.execute = vote;
}

void active_mask(Context& context, const Instruction& i, uint32_t mask) {
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) { d[lane] = mask; });
}

template <class T>
void match(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  uint32_t equal[kLanes];
  uint32_t all = kAllLanes;
  for_active(mask, [&](int lane) {
    equal[lane] = 0;
    for_active(mask, [&](int other) {
      if (get<T>(a, lane) == get<T>(a, other)) equal[lane] |= 1u << other;
    });
    if (equal[lane] != mask) all = 0;
  });
  uint32_t* d = context.destination(i.d);
  for_active(mask, [&](int lane) { d[lane] = i.immediate ? all & mask : equal[lane]; });
  if (i.e.kind != Operand::kNone) context.set_predicate(i.e, all, mask);
}

void decode_match(Decoding& x) {
  x.out.d = x.destination(0);
  x.out.e = x.second_destination(0);
  x.out.a = x.source(1, x.type());
  take_members(x, 2);
  x.out.immediate = x.has("all");
  x.out.execute = width_of(x.type()) == 8 ? match<uint64_t> : match<uint32_t>;
}

template <class T, class Operation>
void reduce(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  T result = get<T>(a, __builtin_ctz(mask));
  for_active(mask & (mask - 1),
             [&](int lane) { result = Operation::apply(result, get<T>(a, lane)); });
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) { put<T>(d, lane, result); });
}

struct Add {
  static uint32_t apply(uint32_t a, uint32_t b) { return a + b; }
};
struct Minimum {
  template <class T>
  static T apply(T a, T b) {
    return std::min(a, b);
  }
};
struct Maximum {
  template <class T>
  static T apply(T a, T b) {
    return std::max(a, b);
  }
};
struct And {
  static uint32_t apply(uint32_t a, uint32_t b) { return a & b; }
};
struct Or {
  static uint32_t apply(uint32_t a, uint32_t b) { return a | b; }
};
struct Xor {
  static uint32_t apply(uint32_t a, uint32_t b) { return a ^ b; }
};

void decode_reduce(Decoding& x) {
  x.out.d = x.destination(0);
  x.out.a = x.source(1, Type::kB32);
  take_members(x, 2);
  const bool is_signed = x.type() == Type::kS32;
  x.out.execute =
      x.has("add")   ? reduce<uint32_t, Add>
      : x.has("min") ? (is_signed ? reduce<int32_t, Minimum> : reduce<uint32_t, Minimum>)
      : x.has("max") ? (is_signed ? reduce<int32_t, Maximum> : reduce<uint32_t, Maximum>)
      : x.has("and") ? reduce<uint32_t, And>
      : x.has("or")  ? reduce<uint32_t, Or>
      : x.has("xor") ? reduce<uint32_t, Xor>
                     : nullptr;
  if (x.out.execute == nullptr) x.unsupported();
}

}  // namespace

void register_warp_functions(OpcodeTable& table) {
  table["shfl"] = decode_shuffle;
  table["vote"] = decode_vote;
  table["match"] = decode_match;
  table["redux"] = decode_reduce;
  table["activemask"] = [](Decoding& x) {
    x.out.d = x.destination(0);
    x.out.execute = active_mask;
  };
}

}  // namespace ptxsim
