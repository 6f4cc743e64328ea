// cvt between all types.
#include <cmath>
#include <limits>
#include <type_traits>

#include "decode.h"
#include "lanes.h"
#include "number.h"
#include "semantics.h"

namespace ptxsim {
namespace {

enum Rounding : uint32_t { kNearest, kZero, kDown, kUp, kRoundingMask = 3 };
enum Modifier : uint32_t { kInteger = 4, kSat = 8, kFtz = 16, kRelu = 32 };

// The types as classes: how a register's bits are read and written.
template <class T>
struct Plain {
  using Value = T;
  static T read(uint64_t bits) {
    if constexpr (std::is_same_v<T, double>) {
      return bit_cast<double>(bits);
    } else if constexpr (std::is_same_v<T, float>) {
      return bit_cast<float>(static_cast<uint32_t>(bits));
    } else {
      return static_cast<T>(bits);
    }
  }
};
struct HalfBits {
  using Value = float;
  using Format = Half;
  static float read(uint64_t bits) { return half_to_float(static_cast<uint32_t>(bits) & 0xffffu); }
};
struct BfloatBits {
  using Value = float;
  using Format = Bfloat;
  static float read(uint64_t bits) {
    return bfloat_to_float(static_cast<uint32_t>(bits) & 0xffffu);
  }
};

double round_to_integer(double value, uint32_t mode) {
  switch (mode & kRoundingMask) {
    case kZero:
      return std::trunc(value);
    case kDown:
      return std::floor(value);
    case kUp:
      return std::ceil(value);
    default:
      return std::nearbyint(value);
  }
}

// The neighbour of `rounded` that `mode` asks for, given the exact value.
float directed_float(double exact, uint32_t mode) {
  const float nearest = static_cast<float>(exact);
  const double back = nearest;
  mode &= kRoundingMask;
  if (mode == kNearest || back == exact || std::isnan(exact)) return nearest;
  const bool below = mode == kDown || (mode == kZero && exact > 0);
  if (below != (back > exact)) return nearest;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  return std::nextafter(nearest, below ? -kInfinity : kInfinity);
}

template <class Format>
uint32_t directed_half(double exact, uint32_t mode) {
  mode &= kRoundingMask;
  const uint32_t nearest = Format::from_float(to_odd_float(exact));
  const double back = Format::to_float(nearest);
  if (mode == kNearest || back == exact || std::isnan(exact)) return nearest;
  const bool below = mode == kDown || (mode == kZero && exact > 0);
  if (below != (back > exact)) return nearest;
  // Magnitudes are ordered as their bits are; one step towards or away from zero.
  const bool towards_zero = below == (exact > 0);
  if ((nearest & 0x7fffu) == 0) return exact < 0 ? 0x8001u : 0x0001u;
  return towards_zero ? nearest - 1 : nearest + 1;
}

template <class To>
To to_integer(double value, uint32_t mode) {
  if (std::isnan(value)) return 0;
  const double rounded = round_to_integer(value, mode);
  constexpr To kLowest = std::numeric_limits<To>::min();
  constexpr To kHighest = std::numeric_limits<To>::max();
  if (rounded <= static_cast<double>(kLowest)) return kLowest;
  if (rounded >= static_cast<double>(kHighest)) return kHighest;
  return static_cast<To>(rounded);
}

template <class To, class From>
To saturate_integer(From value) {
  constexpr To kLowest = std::numeric_limits<To>::min();
  constexpr To kHighest = std::numeric_limits<To>::max();
  const auto wide = static_cast<__int128>(value);
  if (wide < kLowest) return kLowest;
  return wide > kHighest ? kHighest : static_cast<To>(value);
}

template <class Destination, class Source>
uint64_t convert(uint64_t bits, uint32_t mode) {
  using To = typename Destination::Value;
  using From = typename Source::Value;
  const From value = Source::read(bits);
  constexpr bool kFromReal = std::is_floating_point_v<From>;
  constexpr bool kToHalf =
      std::is_same_v<Destination, HalfBits> || std::is_same_v<Destination, BfloatBits>;
  if constexpr (!std::is_floating_point_v<To>) {
    if constexpr (kFromReal) {
      const bool flush = (mode & kFtz) && std::fabs(value) < std::numeric_limits<float>::min();
      return static_cast<uint64_t>(to_integer<To>(flush ? 0 : value, mode));
    } else {
      return static_cast<uint64_t>(mode & kSat ? saturate_integer<To>(value)
                                               : static_cast<To>(value));
    }
  } else {
    if constexpr (!kFromReal && sizeof(From) == 8 && !std::is_same_v<To, double>) {
      // 64 bits do not fit a double; nearest is the only mode compilers ask for, checked below.
      if (!kToHalf) return bit_cast<uint32_t>(static_cast<float>(value));
    }
    double real = static_cast<double>(value);
    if (mode & kInteger) real = round_to_integer(real, mode);
    if (mode & kFtz && std::fabs(real) < std::numeric_limits<float>::min()) {
      real = std::copysign(0.0, real);
    }
    if (mode & kSat) real = real > 0 ? std::fmin(real, 1.0) : 0;
    if (mode & kRelu && !(real > 0) && !std::isnan(real)) real = 0;
    if constexpr (kToHalf) {
      return directed_half<typename Destination::Format>(real, mode);
    } else if constexpr (std::is_same_v<To, double>) {
      return bit_cast<uint64_t>(real);
    } else {
      return bit_cast<uint32_t>(directed_float(real, mode));
    }
  }
}

template <class Destination, class Source>
void convert_lanes(Context& context, const Instruction& i, uint32_t mask) {
  for_lanes(mask, [&](int lane) {
    const uint64_t value = convert<Destination, Source>(get_bits(context, i.a, lane), i.immediate);
    put_bits(context, i.d, lane, i.sign_extend ? value : value & (~0ull >> (64 - 8 * i.bytes)));
  });
}

// ---- What compilers emit most, without the detours of the general case

template <class To, class From>
struct Cast {
  static void lanes(Context& context, const Instruction& i, uint32_t mask) {
    const uint32_t* a = context.source(i.a);
    uint32_t* d = context.destination(i.d);
    for_lanes(mask, [&](int lane) { put<To>(d, lane, static_cast<To>(get<From>(a, lane))); });
  }
};

template <class Format>
void widen_half(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) { put<float>(d, lane, Format::to_float(a[lane] & 0xffffu)); });
}

template <class Format>
void narrow_to_half(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) { d[lane] = Format::from_float(get<float>(a, lane)); });
}

template <class Format>
void narrow_to_pair(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* high = context.source(i.a);
  const uint32_t* low = context.source(i.b);
  uint32_t* d = context.destination(i.d);
  const bool relu = i.immediate & kRelu;
  for_lanes(mask, [&](int lane) {
    float x = get<float>(high, lane), y = get<float>(low, lane);
    if (relu) {
      x = x < 0 ? 0 : x;
      y = y < 0 ? 0 : y;
    }
    d[lane] = Format::from_float(x) << 16 | Format::from_float(y);
  });
}

// Nearest with ties away from zero, to ten bits of mantissa.
void narrow_to_tf32(Context& context, const Instruction& i, uint32_t mask) {
  const uint32_t* a = context.source(i.a);
  uint32_t* d = context.destination(i.d);
  for_lanes(mask, [&](int lane) {
    const bool finite = (a[lane] & 0x7f800000u) != 0x7f800000u;
    d[lane] = (finite ? a[lane] + 0x1000u : a[lane]) & ~0x1fffu;
  });
}

template <class Destination>
Handler general_from(Type source) {
  switch (source) {
    case Type::kU8:
      return convert_lanes<Destination, Plain<uint8_t>>;
    case Type::kS8:
      return convert_lanes<Destination, Plain<int8_t>>;
    case Type::kU16:
      return convert_lanes<Destination, Plain<uint16_t>>;
    case Type::kS16:
      return convert_lanes<Destination, Plain<int16_t>>;
    case Type::kU32:
      return convert_lanes<Destination, Plain<uint32_t>>;
    case Type::kS32:
      return convert_lanes<Destination, Plain<int32_t>>;
    case Type::kU64:
      return convert_lanes<Destination, Plain<uint64_t>>;
    case Type::kS64:
      return convert_lanes<Destination, Plain<int64_t>>;
    case Type::kF16:
      return convert_lanes<Destination, HalfBits>;
    case Type::kBf16:
      return convert_lanes<Destination, BfloatBits>;
    case Type::kF32:
      return convert_lanes<Destination, Plain<float>>;
    case Type::kF64:
      return convert_lanes<Destination, Plain<double>>;
    default:
      return nullptr;
  }
}

Handler general(Type destination, Type source) {
  switch (destination) {
    case Type::kU8:
      return general_from<Plain<uint8_t>>(source);
    case Type::kS8:
      return general_from<Plain<int8_t>>(source);
    case Type::kU16:
      return general_from<Plain<uint16_t>>(source);
    case Type::kS16:
      return general_from<Plain<int16_t>>(source);
    case Type::kU32:
      return general_from<Plain<uint32_t>>(source);
    case Type::kS32:
      return general_from<Plain<int32_t>>(source);
    case Type::kU64:
      return general_from<Plain<uint64_t>>(source);
    case Type::kS64:
      return general_from<Plain<int64_t>>(source);
    case Type::kF16:
      return general_from<HalfBits>(source);
    case Type::kBf16:
      return general_from<BfloatBits>(source);
    case Type::kF32:
      return general_from<Plain<float>>(source);
    case Type::kF64:
      return general_from<Plain<double>>(source);
    default:
      return nullptr;
  }
}

struct Fast {
  Type destination, source;
  Handler handler;
};

constexpr Fast kFast[] = {
    {Type::kU64, Type::kU32, Cast<uint64_t, uint32_t>::lanes},
    {Type::kS64, Type::kS32, Cast<int64_t, int32_t>::lanes},
    {Type::kF32, Type::kU32, Cast<float, uint32_t>::lanes},
    {Type::kF32, Type::kS32, Cast<float, int32_t>::lanes},
    {Type::kF32, Type::kU16, Cast<float, uint16_t>::lanes},
    {Type::kF32, Type::kF16, widen_half<Half>},
    {Type::kF32, Type::kBf16, widen_half<Bfloat>},
    {Type::kF16, Type::kF32, narrow_to_half<Half>},
    {Type::kBf16, Type::kF32, narrow_to_half<Bfloat>},
};

void decode_convert(Decoding& x) {
  const Type destination = x.type(0), source = x.type(1);
  uint32_t& mode = x.out.immediate;
  if (x.has("satfinite") || x.has("rs")) x.unsupported();
  if (x.has("rz") || x.has("rzi")) mode |= kZero;
  if (x.has("rm") || x.has("rmi")) mode |= kDown;
  if (x.has("rp") || x.has("rpi")) mode |= kUp;
  if (x.has("rni") || x.has("rzi") || x.has("rmi") || x.has("rpi")) mode |= kInteger;
  if (x.has("sat")) mode |= kSat;
  if (x.has("ftz")) mode |= kFtz;
  if (x.has("relu")) mode |= kRelu;
  x.out.instruction_class = InstructionClass::k_convert;
  x.out.d = x.destination(0);
  x.out.a = x.source(1, source);
  if (destination == Type::kF16x2 || destination == Type::kBf16x2) {
    if (source != Type::kF32 || (mode & ~kRelu) != 0) x.unsupported();
    x.out.b = x.source(2, source);
    x.out.execute = destination == Type::kF16x2 ? narrow_to_pair<Half> : narrow_to_pair<Bfloat>;
    return;
  }
  if (destination == Type::kTf32) {
    if (source != Type::kF32 || !x.has("rna")) x.unsupported();
    x.out.execute = narrow_to_tf32;
    return;
  }
  const bool from_wide_integer = source == Type::kU64 || source == Type::kS64;
  if (from_wide_integer && !x.has("rn") && destination == Type::kF32) x.unsupported();
  x.out.bytes = static_cast<uint8_t>(width_of(destination));
  // A signed result fills a wider register with its sign.
  x.out.sign_extend = is_signed_integer(destination) && width_of(destination) >= 4;
  const bool fits =
      x.out.a.wide == (width_of(source) == 8) && x.out.d.wide == (width_of(destination) == 8);
  for (const Fast& fast : kFast) {
    if (fits && mode == 0 && fast.destination == destination && fast.source == source) {
      x.out.execute = fast.handler;
      return;
    }
  }
  x.out.execute = general(destination, source);
  if (x.out.execute == nullptr) x.unsupported();
}

}  // namespace

void register_conversions(OpcodeTable& table) { table["cvt"] = decode_convert; }

}  // namespace ptxsim
