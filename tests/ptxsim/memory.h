// Memory that kernels touch: global regions of the host, and shared memory that knows its history.
#pragma once

#include <array>
#include <cstdint>
#include <list>
#include <string>
#include <vector>

#include "counters.h"

namespace ptxsim {

// Generic addresses of shared and local memory lie in windows that no host pointer reaches.
constexpr uint64_t kSharedWindow = 1ull << 56;
constexpr uint64_t kLocalWindow = 1ull << 57;
constexpr uint64_t kWindowMask = (1ull << 56) - 1;
constexpr int kSectorShift = 5;  // DRAM and L2 move sectors of 32 bytes

enum class Origin { kUser, kAllocation, kModule };

// Ranges of host memory that kernels may touch; device pointers are host pointers.
class GlobalMemory {
 public:
  void add(uint64_t begin, uint64_t bytes, Origin origin);
  bool remove(uint64_t begin, Origin origin);
  void clear_user();
  bool contains(uint64_t address, Origin origin) const;
  uint64_t bytes(Origin origin) const;

  // Throws unless every active lane's `bytes` lie aligned within a region.
  void check(const uint64_t* addresses, uint32_t mask, uint32_t bytes, const char* what);

  // Distinct sectors of an access; with `trace`, they are remembered over the launch.
  enum class Direction { kRead, kWrite };
  uint32_t count_sectors(const uint64_t* addresses, uint32_t mask, Direction direction, bool trace);
  void begin_launch();
  uint64_t distinct_sectors(Direction direction) const;

 private:
  struct Region {
    uint64_t begin, end;
    Origin origin;
    std::vector<uint64_t> touched[2];  // bitmaps of sectors, by direction
  };
  Region* find(uint64_t begin, uint64_t end);
  [[noreturn]] void report(uint64_t address, uint32_t bytes, int lane, const char* what) const;

  std::list<Region> regions_;  // those used last come first
};

// A block's shared memory. Every word remembers its last writer and its readers since, each with
// the barrier interval ("tick") in which that was; what a barrier has ordered is known for each
// pair of warps. Words accessed in parts are split into bytes.
class SharedMemory {
 public:
  void reset(uint32_t bytes, int warps, int races, Counters* counters);
  uint32_t size() const { return static_cast<uint32_t>(data_.size()); }
  uint8_t* data() { return data_.data(); }

  // Throws unless [address, address + bytes) lies within and is aligned.
  void check(uint64_t address, uint32_t bytes, int lane, const char* what) const;

  void read(uint32_t address, uint32_t bytes, int warp, int lane);
  // `serial` names the instruction: two of its lanes may not write different values to one place.
  void write(uint32_t address, const uint8_t* value, uint32_t bytes, int warp, int lane,
             uint32_t serial);
  void atomic(uint32_t address, uint32_t bytes, int warp, int lane, uint32_t serial);
  void issue_copy(uint32_t address, uint32_t bytes, int warp, int lane);
  void land_copy(uint32_t address, const uint8_t* source, uint32_t from_source, uint32_t bytes,
                 int warp, int lane, uint32_t serial);

  // A wgmma reads from its issue to the wait that covers it, through the asynchronous proxy: what a
  // lane wrote must be behind one of its fences.
  void begin_async_read(uint32_t address, uint32_t bytes, int warp);
  void end_async_read(uint32_t address, uint32_t bytes, int warp);
  void proxy_fence(int warp, uint32_t lanes, uint32_t serial);

  // A barrier orders what `participants` did before it with what they do after it.
  void barrier(uint32_t participants);

 private:
  enum State : uint8_t { kUninitialised, kWritten, kInFlight, kSplit };
  struct Shadow {
    uint32_t write_tick = 0;
    uint32_t read_tick = 0;
    uint32_t readers = 0;  // kSplit: the index in split_
    uint32_t serial = 0;   // of the write
    uint8_t writer = 0;
    uint8_t lane = 0;  // of the writer
    bool atomic = false;
    State state = kUninitialised;
  };
  static constexpr uint8_t kSeveral = 0xff;  // writers, of atomics

  template <class Visit>
  void visit(uint32_t address, uint32_t bytes, Visit visit);
  bool ordered(int warp, int other, uint32_t tick) const {
    return other == warp || tick < synced_[warp][other];
  }
  bool writer_ordered(const Shadow& shadow, int warp) const;
  void check_write(const Shadow& shadow, uint32_t address, int warp, int lane, const char* what);
  void race(const char* format, ...) __attribute__((format(printf, 2, 3)));

  std::vector<uint8_t> data_;
  std::vector<Shadow> words_;
  std::vector<std::array<Shadow, 4>> split_;
  std::array<std::array<uint32_t, 32>, 32> synced_{};
  std::vector<uint16_t> async_reads_;                  // under way, by word; empty before the first
  std::array<std::array<uint32_t, 32>, 32> fenced_{};  // serial of a lane's last proxy fence
  uint32_t tick_ = 1;
  int warps_ = 0;
  int races_ = 1;
  Counters* counters_ = nullptr;
};

// Bank conflicts: 32 banks of 4 bytes; accesses of 8 bytes a lane go in halves, of 16 in quarters.
struct Wavefronts {
  uint32_t actual = 0;
  uint32_t ideal = 0;
};
Wavefronts count_wavefronts(const uint32_t* addresses, uint32_t mask, uint32_t bytes);

}  // namespace ptxsim
