#include "shadow.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>

#include "block.h"

namespace simt::shadow {
namespace {

using Clock = uint32_t;
using Clocks = std::vector<Clock>;

// One access: by whom, at which count of his own, after how many full barriers (of this OS thread, over all blocks).
struct Stamp {
  uint32_t epoch = 0;
  Clock clock = 0;
  uint16_t lane = 0;
  bool atomic = false;
};

// Two readers are kept, of different warps where there were such: enough, as a barrier that is missing is missing for
// all of them.
struct Cell {
  Stamp written, read, other_read;
};

struct Shadow {
  Range dynamic, statics;
  std::vector<Range> own;
  std::vector<Cell> dynamic_cells, static_cells;
  int num_lanes = 0;
  uint32_t epoch = 1, block_epoch = 1;
  std::vector<Clocks> known;  // known[a][b]: the accesses of lane b up to this count come before what a does now
  Clocks counts;
  std::map<uintptr_t, Clocks> kept;  // of barriers
  Clock agent_count = 0;             // bulk copies begun in this block
};

thread_local Shadow shadow_of_thread;
thread_local bool active __attribute__((tls_model("initial-exec"))) = false;
std::vector<Range> declared;

void join(Clocks& into, const Clocks& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

bool is_before(const Shadow& s, const Stamp& a, int lane) {
  if (a.lane == s.num_lanes) return a.clock <= s.known[lane][a.lane];  // the engine of bulk copies
  return a.epoch < s.epoch || a.lane == lane || a.clock <= s.known[lane][a.lane];
}

[[noreturn]] void fail_at(size_t place, bool is_static, const std::string& what) {
  active = false;
  const std::string where = is_static ? "of the static variables" : "of dynamic shared memory";
  fail(what + " byte " + std::to_string(2 * place) + " " + where);
}

void report_race(size_t place, bool is_static, const char* mine, const char* theirs, const Stamp& a) {
  fail_at(place, is_static,
          std::string("race: this thread ") + mine + " what " +
              (a.lane == shadow_of_thread.num_lanes ? "a bulk copy" : "thread " + std::to_string(a.lane)) + " " +
              theirs + " with no barrier between:");
}

void check_cell(Shadow& s, Cell& cell, size_t place, bool is_static, Kind kind, int lane, bool by_agent) {
  const bool written = cell.written.epoch >= s.block_epoch;
  const Stamp now{s.epoch, s.counts[lane], uint16_t(lane), kind == Kind::kAtomic};
  if (kind == Kind::kRead || kind == Kind::kBlind) {
    if (!written) {
      if (kind == Kind::kRead) fail_at(place, is_static, "this thread reads what nothing has written:");
      return;
    }
    if (!is_before(s, cell.written, lane)) report_race(place, is_static, "reads", "has written", cell.written);
    if (cell.read.lane / kWarp != lane / kWarp) cell.other_read = cell.read;
    cell.read = now;
    return;
  }
  const bool both_atomic = kind == Kind::kAtomic && cell.written.atomic;
  if (written && !both_atomic && !is_before(s, cell.written, lane))
    report_race(place, is_static, "writes", "has written", cell.written);
  for (const Stamp& read : {cell.read, cell.other_read})
    if (read.epoch >= s.block_epoch && !is_before(s, read, lane))
      report_race(place, is_static, "writes", "has read", read);
  cell.written = by_agent ? Stamp{s.epoch, s.agent_count, uint16_t(s.num_lanes), false} : now;
}

void check_global(const void* address, size_t bytes, Kind kind) {
  const auto* begin = static_cast<const unsigned char*>(address);
  for (const Range& range : declared)
    if (range.holds(begin) && bytes <= size_t(range.begin + range.bytes - begin)) return;
  active = false;
  const bool reads = kind == Kind::kRead || kind == Kind::kBlind;
  std::string near;
  for (const Range& range : declared)
    if (begin + 4096 >= range.begin && begin < range.begin + range.bytes + 4096)
      near = ", " + std::to_string(begin - range.begin) + " bytes after the begin of one that has " +
             std::to_string(range.bytes);
  fail(std::string("out of bounds: this thread ") + (reads ? "reads " : "writes ") + std::to_string(bytes) +
       " bytes outside of every declared array" + near);
}

}  // namespace

void begin_block(Range dynamic, Range statics, const std::vector<Range>& own, int num_lanes) {
  Shadow& s = shadow_of_thread;
  s.dynamic = dynamic, s.statics = statics, s.own = own, s.num_lanes = num_lanes;
  if (s.dynamic_cells.size() < dynamic.bytes / 2 + 1) s.dynamic_cells.resize(dynamic.bytes / 2 + 1);
  if (s.static_cells.size() < statics.bytes / 2 + 1) s.static_cells.resize(statics.bytes / 2 + 1);
  s.block_epoch = ++s.epoch;
  s.known.assign(num_lanes, {});
  s.counts.assign(num_lanes, 1);
  for (Clocks& clocks : s.known) clocks.assign(num_lanes + 1, 0);
  s.kept.clear();
  s.agent_count = 0;
}

void resume() { active = true; }
void suspend() { active = false; }
bool is_active() { return active; }

void sync_block() {
  Shadow& s = shadow_of_thread;
  ++s.epoch;
  if (s.agent_count == 0) return;
  Clock told = 0;
  for (const Clocks& clocks : s.known) told = std::max(told, clocks.back());
  for (Clocks& clocks : s.known) clocks.back() = told;
}

void sync_warp(int first_lane, unsigned mask) {
  Shadow& s = shadow_of_thread;
  Clocks all(s.num_lanes + 1, 0);
  for (int i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    join(all, s.known[first_lane + i]);
    all[first_lane + i] = s.counts[first_lane + i]++;
  }
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) s.known[first_lane + i] = all;
}

void arrive(uintptr_t key) {
  Shadow& s = shadow_of_thread;
  const int lane = running_lane();
  Clocks& kept = s.kept[key];
  kept.resize(s.num_lanes + 1, 0);
  join(kept, s.known[lane]);
  kept[lane] = s.counts[lane]++;
}

void acquire(uintptr_t key, int lane) {
  Shadow& s = shadow_of_thread;
  const auto kept = s.kept.find(key);
  if (kept != s.kept.end()) join(s.known[lane], kept->second);
}

void forget(uintptr_t key) { shadow_of_thread.kept.erase(key); }

namespace {

void access_as(const void* address, size_t bytes, Kind kind, bool by_agent) {
  Shadow& s = shadow_of_thread;
  if (!active || s.own[0].holds(address)) return;
  const bool is_dynamic = s.dynamic.holds(address), is_static = !is_dynamic && s.statics.holds(address);
  if (!is_dynamic && !is_static) {
    if (declared.empty()) return;
    if (std::any_of(s.own.begin(), s.own.end(), [&](const Range& range) { return range.holds(address); })) return;
    check_global(address, bytes, kind);
    return;
  }
  const Range& range = is_static ? s.statics : s.dynamic;
  std::vector<Cell>& cells = is_static ? s.static_cells : s.dynamic_cells;
  const size_t offset = size_t(static_cast<const unsigned char*>(address) - range.begin);
  if (offset + bytes > range.bytes) {
    active = false;
    fail("out of bounds: an access of " + std::to_string(bytes) + " bytes ends beyond the " +
         std::to_string(range.bytes) + " bytes of shared memory");
  }
  const int lane = running_lane();
  for (size_t place = offset / 2; place <= (offset + bytes - 1) / 2; ++place)
    check_cell(s, cells[place], place, is_static, kind, lane, by_agent);
}

}  // namespace

void access(const void* address, size_t bytes, Kind kind) { access_as(address, bytes, kind, false); }

uint32_t agent_write(const void* address, size_t bytes) {
  const Clock stamp = ++shadow_of_thread.agent_count;
  access_as(address, bytes, Kind::kWrite, true);
  return stamp;
}

void agent_done(uintptr_t key, uint32_t stamp) {
  Shadow& s = shadow_of_thread;
  Clocks& kept = s.kept[key];
  kept.resize(s.num_lanes + 1, 0);
  kept.back() = std::max(kept.back(), stamp);
}

void declare(const void* address, size_t bytes) {
  declared.push_back({const_cast<unsigned char*>(static_cast<const unsigned char*>(address)), bytes});
}
void forget_declared() { declared.clear(); }

}  // namespace simt::shadow

// What -fsanitize=thread calls. An access whose type is wide is one that the kernel wrote as a vector, so it must be
// aligned: a GPU faults where the CPU does not.
namespace {
using simt::shadow::Kind;

void aligned_access(const void* address, size_t bytes, Kind kind) {
  if (!simt::shadow::is_active()) return;
  if (bytes >= 8 && reinterpret_cast<uintptr_t>(address) % bytes != 0) simt::check_aligned(address, bytes);
  simt::shadow::access(address, bytes, kind);
}

template <typename T>
void atomic_access(volatile T* address) {
  simt::shadow::access(const_cast<T*>(address), sizeof(T), Kind::kAtomic);
}
}  // namespace

#define HK_VISIBLE __attribute__((visibility("default")))
#define HK_ACCESS(bytes)                                                                                 \
  HK_VISIBLE void __tsan_read##bytes(void* p) { aligned_access(p, bytes, Kind::kRead); }                 \
  HK_VISIBLE void __tsan_write##bytes(void* p) { aligned_access(p, bytes, Kind::kWrite); }               \
  HK_VISIBLE void __tsan_unaligned_read##bytes(void* p) { simt::shadow::access(p, bytes, Kind::kRead); } \
  HK_VISIBLE void __tsan_unaligned_write##bytes(void* p) { simt::shadow::access(p, bytes, Kind::kWrite); }
#define HK_ATOMIC(bits)                                                                                              \
  HK_VISIBLE uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {                      \
    atomic_access(const_cast<volatile uint##bits##_t*>(p));                                                          \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                                     \
  }                                                                                                                  \
  HK_VISIBLE int __tsan_atomic##bits##_compare_exchange_strong(volatile uint##bits##_t* p, uint##bits##_t* expected, \
                                                               uint##bits##_t value, int, int) {                     \
    atomic_access(p);                                                                                                \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);               \
  }

extern "C" {
HK_VISIBLE void __tsan_init() {}
HK_VISIBLE void __tsan_func_entry(void*) {}
HK_VISIBLE void __tsan_func_exit() {}
HK_VISIBLE void __tsan_vptr_update(void**, void*) {}
HK_VISIBLE void __tsan_vptr_read(void**) {}
HK_VISIBLE void __tsan_read_range(void* p, size_t bytes) { simt::shadow::access(p, bytes, Kind::kRead); }
HK_VISIBLE void __tsan_write_range(void* p, size_t bytes) { simt::shadow::access(p, bytes, Kind::kWrite); }
HK_VISIBLE void __tsan_atomic_thread_fence(int) {}
HK_ACCESS(1)
HK_ACCESS(2)
HK_ACCESS(4)
HK_ACCESS(8)
HK_ACCESS(16)
HK_ATOMIC(32)
HK_ATOMIC(64)

HK_VISIBLE void simt_declare(const void* address, size_t bytes) { simt::shadow::declare(address, bytes); }
HK_VISIBLE void simt_forget_declared() { simt::shadow::forget_declared(); }
}
