#include "memory.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "ptx.h"

namespace ptxsim {

namespace {
unsigned long long shown(uint64_t value) { return value; }
}  // namespace

// ---- GlobalMemory

void GlobalMemory::add(uint64_t begin, uint64_t bytes, Origin origin) {
  if (bytes != 0) regions_.push_front({begin, begin + bytes, origin, {}});
}

bool GlobalMemory::remove(uint64_t begin, Origin origin) {
  const auto found = std::find_if(regions_.begin(), regions_.end(), [&](const Region& region) {
    return region.begin == begin && region.origin == origin;
  });
  if (found == regions_.end()) return false;
  regions_.erase(found);
  return true;
}

void GlobalMemory::clear_user() {
  regions_.remove_if([](const Region& region) { return region.origin == Origin::kUser; });
}

bool GlobalMemory::contains(uint64_t address, Origin origin) const {
  return std::any_of(regions_.begin(), regions_.end(), [&](const Region& region) {
    return region.origin == origin && address >= region.begin && address < region.end;
  });
}

uint64_t GlobalMemory::bytes(Origin origin) const {
  uint64_t sum = 0;
  for (const Region& region : regions_) {
    if (region.origin == origin) sum += region.end - region.begin;
  }
  return sum;
}

GlobalMemory::Region* GlobalMemory::find(uint64_t begin, uint64_t end) {
  for (auto region = regions_.begin(); region != regions_.end(); ++region) {
    if (begin < region->begin || end > region->end) continue;
    if (region != regions_.begin()) regions_.splice(regions_.begin(), regions_, region);
    return &regions_.front();
  }
  return nullptr;
}

void GlobalMemory::report(uint64_t address, uint32_t bytes, int lane, const char* what) const {
  const Region* nearest = nullptr;
  uint64_t best = ~0ull;
  for (const Region& region : regions_) {
    const uint64_t distance = address < region.begin  ? region.begin - address
                              : address >= region.end ? address - region.end
                                                      : 0;
    if (distance < best) {
      best = distance;
      nearest = &region;
    }
  }
  if (nearest == nullptr) {
    fail("out of bounds: %s of %u bytes at 0x%llx, lane %d; there are no regions", what, bytes,
         shown(address), lane);
  }
  const bool before = address < nearest->begin;
  fail(
      "out of bounds: %s of %u bytes at 0x%llx, lane %d; the nearest region is 0x%llx + %llu "
      "bytes, "
      "%llu bytes %s",
      what, bytes, shown(address), lane, shown(nearest->begin),
      shown(nearest->end - nearest->begin), shown(best),
      before ? "before its start" : "past its end");
}

void GlobalMemory::check(const uint64_t* addresses, uint32_t mask, uint32_t bytes,
                         const char* what) {
  uint64_t lowest = ~0ull, highest = 0, bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    lowest = std::min(lowest, addresses[lane]);
    highest = std::max(highest, addresses[lane]);
    bits |= addresses[lane];
  }
  if (bits & (bytes - 1)) {
    for (int lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) && (addresses[lane] & (bytes - 1))) {
        fail("misaligned: %s of %u bytes at 0x%llx, lane %d", what, bytes, shown(addresses[lane]),
             lane);
      }
    }
  }
  if (find(lowest, highest + bytes) != nullptr) return;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) && find(addresses[lane], addresses[lane] + bytes) == nullptr) {
      report(addresses[lane], bytes, lane, what);
    }
  }
}

uint32_t GlobalMemory::count_sectors(const uint64_t* addresses, uint32_t mask, Direction direction,
                                     bool trace) {
  // An aligned access of up to 16 bytes lies in one sector. Most warps go upwards.
  uint64_t sectors[32];
  uint32_t count = 0;
  bool ascending = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint64_t sector = addresses[lane] >> kSectorShift;
    if (count != 0 && sectors[count - 1] == sector) continue;
    ascending &= count == 0 || sectors[count - 1] < sector;
    sectors[count++] = sector;
  }
  if (!ascending) {
    std::sort(sectors, sectors + count);
    count = static_cast<uint32_t>(std::unique(sectors, sectors + count) - sectors);
  }
  if (trace) {
    for (uint32_t k = 0; k < count; ++k) {
      const uint64_t begin = sectors[k] << kSectorShift;
      Region* region = &regions_.front();
      if (begin < region->begin || begin >= region->end) {
        // A sector may begin before its region; one of its bytes was found to lie within.
        for (int lane = 0; lane < 32; ++lane) {
          if ((mask >> lane & 1) && addresses[lane] >> kSectorShift == sectors[k]) {
            region = find(addresses[lane], addresses[lane] + 1);
            break;
          }
        }
      }
      std::vector<uint64_t>& bits = region->touched[static_cast<int>(direction)];
      const uint64_t first = region->begin >> kSectorShift;
      if (bits.empty()) bits.assign(((region->end >> kSectorShift) - first) / 64 + 1, 0);
      const uint64_t index = sectors[k] - first;
      bits[index / 64] |= 1ull << (index % 64);
    }
  }
  return count;
}

void GlobalMemory::begin_launch() {
  for (Region& region : regions_) {
    for (std::vector<uint64_t>& bits : region.touched) bits.clear();
  }
}

uint64_t GlobalMemory::distinct_sectors(Direction direction) const {
  uint64_t total = 0;
  for (const Region& region : regions_) {
    for (const uint64_t bits : region.touched[static_cast<int>(direction)]) {
      total += static_cast<uint64_t>(__builtin_popcountll(bits));
    }
  }
  return total;
}

// ---- SharedMemory

void SharedMemory::reset(uint32_t bytes, int warps, int races, Counters* counters) {
  data_.assign(bytes, 0xff);
  words_.assign((bytes + 3) / 4, Shadow());
  split_.clear();
  for (auto& row : synced_) row.fill(1);
  async_reads_.clear();
  for (auto& row : fenced_) row.fill(0);
  tick_ = 1;
  warps_ = warps;
  races_ = races;
  counters_ = counters;
}

void SharedMemory::check(uint64_t address, uint32_t bytes, int lane, const char* what) const {
  if (address + bytes > data_.size() || address >= data_.size()) {
    fail(
        "out of bounds: %s of %u bytes at shared address 0x%llx, lane %d; the block has %zu bytes "
        "of "
        "shared memory",
        what, bytes, shown(address), lane, data_.size());
  }
  if (address & (bytes - 1)) {
    fail("misaligned: %s of %u bytes at shared address 0x%llx, lane %d", what, bytes,
         shown(address), lane);
  }
}

void SharedMemory::race(const char* format, ...) {
  if (races_ == 2) {
    ++counters_->races;
    return;
  }
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw Error(message);
}

template <class Visit>
void SharedMemory::visit(uint32_t address, uint32_t bytes, Visit visit) {
  if (bytes >= 4) {
    for (uint32_t at = address; at < address + bytes; at += 4) {
      Shadow& word = words_[at / 4];
      if (word.state != kSplit) {
        visit(word, at, 4u);
      } else {
        for (uint32_t byte = 0; byte < 4; ++byte) visit(split_[word.readers][byte], at + byte, 1u);
      }
    }
    return;
  }
  Shadow& word = words_[address / 4];
  if (word.state != kSplit) {
    split_.push_back({word, word, word, word});
    word.state = kSplit;
    word.readers = static_cast<uint32_t>(split_.size() - 1);
  }
  for (uint32_t at = address; at < address + bytes; ++at) {
    visit(split_[word.readers][at % 4], at, 1u);
  }
}

bool SharedMemory::writer_ordered(const Shadow& shadow, int warp) const {
  if (shadow.writer != kSeveral) return ordered(warp, shadow.writer, shadow.write_tick);
  for (int other = 0; other < warps_; ++other) {
    if (!ordered(warp, other, shadow.write_tick)) return false;
  }
  return true;
}

void SharedMemory::read(uint32_t address, uint32_t bytes, int warp, int lane) {
  visit(address, bytes, [&](Shadow& shadow, uint32_t at, uint32_t) {
    if (shadow.state == kUninitialised) {
      fail("uninitialised shared memory: a read at 0x%x, lane %d, of bytes that nobody wrote", at,
           lane);
    }
    if (shadow.state == kInFlight) {
      fail(
          "in flight: a read at shared address 0x%x, lane %d, of bytes that a cp.async of warp %d "
          "is still copying",
          at, lane, shadow.writer);
    }
    if (!writer_ordered(shadow, warp)) {
      race(
          "race: warp %d, lane %d reads shared address 0x%x, which warp %d wrote with no barrier "
          "in "
          "between",
          warp, lane, at, shadow.writer == kSeveral ? -1 : shadow.writer);
    }
    if (shadow.read_tick != tick_) {
      // Readers that a barrier has ordered before this one are known to be done.
      uint32_t unordered = 0;
      for (uint32_t rest = shadow.readers; rest != 0; rest &= rest - 1) {
        const int reader = __builtin_ctz(rest);
        if (!ordered(warp, reader, shadow.read_tick)) unordered |= 1u << reader;
      }
      shadow.readers = unordered;
      shadow.read_tick = tick_;
    }
    shadow.readers |= 1u << warp;
  });
}

void SharedMemory::check_write(const Shadow& shadow, uint32_t at, int warp, int lane,
                               const char* what) {
  if (!async_reads_.empty() && async_reads_[at / 4] != 0) {
    fail("in flight: %s at shared address 0x%x, lane %d, to bytes that a wgmma is still reading",
         what, at, lane);
  }
  if (shadow.state == kInFlight) {
    fail(
        "in flight: %s at shared address 0x%x, lane %d, to bytes that a cp.async of warp %d is "
        "still "
        "copying",
        what, at, lane, shadow.writer);
  }
  if (shadow.write_tick != 0 && !writer_ordered(shadow, warp)) {
    race(
        "race: %s at shared address 0x%x by warp %d, lane %d, which warp %d wrote with no barrier "
        "in "
        "between",
        what, at, warp, lane, shadow.writer == kSeveral ? -1 : shadow.writer);
  }
  for (uint32_t rest = shadow.readers; rest != 0; rest &= rest - 1) {
    const int reader = __builtin_ctz(rest);
    if (!ordered(warp, reader, shadow.read_tick)) {
      race(
          "race: %s at shared address 0x%x by warp %d, lane %d, which warp %d read with no barrier "
          "in between",
          what, at, warp, lane, reader);
      return;
    }
  }
}

void SharedMemory::write(uint32_t address, const uint8_t* value, uint32_t bytes, int warp, int lane,
                         uint32_t serial) {
  visit(address, bytes, [&](Shadow& shadow, uint32_t at, uint32_t count) {
    const uint8_t* part = value + (at - address);
    if (shadow.serial == serial && shadow.writer == warp &&
        std::memcmp(&data_[at], part, count) != 0) {
      race(
          "race: lane %d and another lane of warp %d write different values to shared address 0x%x "
          "in one instruction",
          lane, warp, at);
    }
    check_write(shadow, at, warp, lane, "a write");
    shadow.write_tick = tick_;
    shadow.readers = 0;
    shadow.serial = serial;
    shadow.writer = static_cast<uint8_t>(warp);
    shadow.lane = static_cast<uint8_t>(lane);
    shadow.atomic = false;
    shadow.state = kWritten;
  });
  std::memcpy(&data_[address], value, bytes);
}

void SharedMemory::atomic(uint32_t address, uint32_t bytes, int warp, int lane, uint32_t serial) {
  visit(address, bytes, [&](Shadow& shadow, uint32_t at, uint32_t) {
    if (shadow.state == kUninitialised) {
      fail("uninitialised shared memory: an atomic at 0x%x, lane %d, on bytes that nobody wrote",
           at, lane);
    }
    const bool concurrent = shadow.atomic && !writer_ordered(shadow, warp);
    if (!concurrent) check_write(shadow, at, warp, lane, "an atomic");
    shadow.writer = concurrent ? kSeveral : static_cast<uint8_t>(warp);
    shadow.lane = static_cast<uint8_t>(lane);
    shadow.serial = serial;
    shadow.write_tick = tick_;
    shadow.readers = 0;
    shadow.atomic = true;
  });
}

void SharedMemory::issue_copy(uint32_t address, uint32_t bytes, int warp, int lane) {
  visit(address, bytes, [&](Shadow& shadow, uint32_t at, uint32_t) {
    check_write(shadow, at, warp, lane, "a cp.async");
    shadow.write_tick = tick_;
    shadow.readers = 0;
    shadow.writer = static_cast<uint8_t>(warp);
    shadow.atomic = false;
    shadow.state = kInFlight;
  });
  std::memset(&data_[address], 0xff, bytes);  // the old bytes are gone, the new ones not yet there
}

void SharedMemory::land_copy(uint32_t address, const uint8_t* source, uint32_t from_source,
                             uint32_t bytes, int warp, int lane, uint32_t serial) {
  std::memset(&data_[address], 0, bytes);
  std::memcpy(&data_[address], source, from_source);
  visit(address, bytes, [&](Shadow& shadow, uint32_t, uint32_t) {
    shadow.write_tick = tick_;
    shadow.writer = static_cast<uint8_t>(warp);
    shadow.lane = static_cast<uint8_t>(lane);
    shadow.serial = serial;
    shadow.state = kWritten;
  });
}

void SharedMemory::begin_async_read(uint32_t address, uint32_t bytes, int warp) {
  read(address, bytes, warp, 0);
  if (async_reads_.empty()) async_reads_.assign(words_.size(), 0);
  visit(address, bytes, [&](const Shadow& shadow, uint32_t at, uint32_t) {
    // Atomics of several warps keep no record of their lanes.
    if (shadow.writer != kSeveral && fenced_[shadow.writer][shadow.lane] < shadow.serial) {
      fail(
          "no proxy fence: a wgmma of warp %d reads shared address 0x%x, which lane %d of warp %d "
          "wrote with no fence.proxy.async since",
          warp, at, shadow.lane, shadow.writer);
    }
    ++async_reads_[at / 4];
  });
}

void SharedMemory::end_async_read(uint32_t address, uint32_t bytes, int warp) {
  read(address, bytes, warp, 0);
  visit(address, bytes, [&](const Shadow&, uint32_t at, uint32_t) { --async_reads_[at / 4]; });
}

void SharedMemory::proxy_fence(int warp, uint32_t lanes, uint32_t serial) {
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) fenced_[warp][lane] = serial;
  }
}

void SharedMemory::barrier(uint32_t participants) {
  ++tick_;
  std::array<uint32_t, 32> joined{};
  for (int warp = 0; warp < warps_; ++warp) {
    if (!(participants >> warp & 1)) continue;
    for (int other = 0; other < warps_; ++other) {
      joined[other] = std::max(joined[other], synced_[warp][other]);
    }
  }
  for (int warp = 0; warp < warps_; ++warp) {
    if (participants >> warp & 1) joined[warp] = tick_;
  }
  for (int warp = 0; warp < warps_; ++warp) {
    if (participants >> warp & 1) synced_[warp] = joined;
  }
}

// ---- Bank conflicts

Wavefronts count_wavefronts(const uint32_t* addresses, uint32_t mask, uint32_t bytes) {
  const uint32_t unit = std::max(bytes, 4u);  // what a lane moves at once
  const int lanes = static_cast<int>(std::min(32u, 128 / unit));
  const uint32_t slots = 128 / unit;
  const int shift = __builtin_ctz(unit);
  Wavefronts total;
  for (int first = 0; first < 32; first += lanes) {
    uint32_t units[32];  // distinct ones, chained by slot
    int8_t next[32];
    int8_t head[32];
    uint8_t depth[32] = {};
    std::memset(head, -1, sizeof head);
    int count = 0;
    uint32_t deepest = 0;
    for (int lane = first; lane < first + lanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const uint32_t which = addresses[lane] >> shift;
      const uint32_t slot = which & (slots - 1);
      int8_t link = head[slot];
      while (link >= 0 && units[link] != which) link = next[link];
      if (link >= 0) continue;  // broadcast
      units[count] = which;
      next[count] = head[slot];
      head[slot] = static_cast<int8_t>(count++);
      deepest = std::max<uint32_t>(deepest, ++depth[slot]);
    }
    total.actual += deepest;
    total.ideal += (static_cast<uint32_t>(count) * unit / 4 + 31) / 32;
  }
  return total;
}

}  // namespace ptxsim
