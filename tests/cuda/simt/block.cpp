// Who runs and who waits: lanes that meet, barriers, and what is said where none can go on.
#include <algorithm>
#include <cstring>
#include <map>

#include "state.h"

namespace simt {

std::string name_of(const Position& p) {
  const auto triple = [](unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
  };
  return "block " + triple(p.block.x, p.block.y, p.block.z) + " thread " + triple(p.thread.x, p.thread.y, p.thread.z);
}

namespace {

std::string place_of(const Lane& lane) {
  std::string place = lane.waits;
  if (std::strncmp(lane.waits, "named", 5) == 0) place += " " + std::to_string(lane.detail);
  if (lane.site.file != nullptr) {
    const char* slash = std::strrchr(lane.site.file, '/');
    place += std::string(" at ") + (slash ? slash + 1 : lane.site.file) + ":" + std::to_string(lane.site.line);
  }
  return place;
}

// The lanes that wait, by place, where none can go on.
std::string deadlock(const Block& b) {
  std::map<std::string, std::pair<int, int>> places;  // number of lanes, first of them
  int ended = 0;
  for (int i = 0; i < int(b.lanes.size()); ++i) {
    if (b.lanes[i].ended) {
      ++ended;
    } else {
      ++places.emplace(place_of(b.lanes[i]), std::make_pair(0, i)).first->second.first;
    }
  }
  std::string text = "deadlock:";
  for (const auto& [place, lanes] : places)
    text += " " + std::to_string(lanes.first) + " threads (the first is " + std::to_string(lanes.second) +
            ") wait at " + place + ";";
  return text + " " + std::to_string(ended) + " have ended";
}

}  // namespace

void make_ready(Block& b, int lane) {
  b.lanes[lane].waits = nullptr;
  b.ready[lane / kWarp] |= 1u << lane % kWarp;
}

namespace {

bool poll(Block& b) {
  bool any = false;
  for (size_t i = 0; i < b.polling.size();) {
    const int lane = b.polling[i];
    if ((*b.lanes[lane].done)()) {
      b.polling.erase(b.polling.begin() + long(i));
      make_ready(b, lane);
      any = true;
    } else {
      ++i;
    }
  }
  return any;
}

int pick_warp(Block& b) {
  const int count = int(b.ready.size()), current = b.running / kWarp;
  const bool stay = b.order != Order::kRandom || next_random(b.random) % 8 != 0;
  if (stay && b.ready[current] != 0) return current;  // a warp runs as far ahead of the others as it can
  const int begin = b.order == Order::kRandom ? int(next_random(b.random) % count) : 0;
  for (int i = 0; i < count; ++i) {
    const int warp = b.order == Order::kDescending ? count - 1 - i : (begin + i) % count;
    if (b.ready[warp] != 0) return warp;
  }
  return -1;
}

}  // namespace

int pick(Block& b) {
  int warp = pick_warp(b);
  if (warp < 0 && poll(b)) warp = pick_warp(b);
  if (warp < 0) return -1;
  const unsigned ready = b.ready[warp];
  int lane = __builtin_ctz(ready);
  if (b.order == Order::kDescending) lane = 31 - __builtin_clz(ready);
  if (b.order == Order::kRandom) {
    unsigned rest = ready;
    for (uint64_t skip = next_random(b.random) % __builtin_popcount(ready); skip > 0; --skip) rest &= rest - 1;
    lane = __builtin_ctz(rest);
  }
  b.ready[warp] &= ~(1u << lane);
  return warp * kWarp + lane;
}

namespace {

void to_main(Block& b) {
  void* unused;  // no lane goes on after this
  simt_switch(&unused, b.main_sp);
}

// Runs another lane; returns when this one has been made ready and picked again.
void yield_lane(Block& b) {
  const int before = b.running, next = pick(b);
  if (next < 0) {
    if (b.live == 0) to_main(b);
    b.error = std::string(b.kernel) + ": " + deadlock(b) + " (" + name_of(b.lanes[before].position) + ")";
    to_main(b);
  }
  if (next == before) return;
  b.running = next;
  here = &b.lanes[next].position;
  simt_switch(&b.lanes[before].sp, b.lanes[next].sp);
}

void wait_here(Block& b, const char* what, Site site, int detail) {
  Lane& lane = b.lanes[b.running];
  lane.waits = what, lane.site = site, lane.detail = detail;
  yield_lane(b);
}

void release(Block& b, Barrier& barrier) {
  for (const int lane : barrier.waiting) {
    b.lanes[lane].result = barrier.held;
    make_ready(b, lane);
  }
  barrier.waiting.clear();
  barrier.arrived = barrier.held = 0;
}

void end_lane() {
  Block& b = the_block();
  Lane& lane = b.lanes[b.running];
  const int warp = b.running / kWarp;
  for (const Meeting& m : b.meetings[warp])
    if (m.mask >> b.running % kWarp & 1)
      fail(std::string(m.what) + ": this thread has ended, but other lanes' mask names it");
  lane.ended = true;
  --b.live;
  Barrier& all = b.barriers[0];
  if (b.live > 0 && all.arrived == b.live && all.count == 0) {
    shadow::sync_block();
    release(b, all);
  }
  yield_lane(b);
}

}  // namespace

void lane_main() {
  (*the_block().body)();
  end_lane();
}

void fail(const std::string& what) {
  Block& b = the_block();
  b.error = std::string(b.kernel) + ": " + what + " (" + name_of(b.lanes[b.running].position) + ")";
  to_main(b);
  std::abort();  // never switched back to
}

int sync_block(bool predicate, Site site) {
  Block& b = the_block();
  Barrier& all = b.barriers[0];
  if (all.arrived == 0) all.site = site;
  if (all.arrived > 0 && (site.line != all.site.line || std::strcmp(site.file, all.site.file) != 0)) {
    Lane other;
    other.waits = "__syncthreads", other.site = all.site;
    const std::string before = place_of(other);
    other.site = site;
    fail("divergent barrier: this thread is at " + place_of(other) + ", others wait at " + before);
  }
  ++all.arrived;
  all.held += predicate;
  if (all.arrived < b.live) {
    all.waiting.push_back(b.running);
    wait_here(b, "__syncthreads", site, 0);
    return b.lanes[b.running].result;
  }
  const int held = all.held;
  shadow::sync_block();
  release(b, all);
  // The last to come waits for its turn like the others.
  make_ready(b, b.running);
  yield_lane(b);
  return held;
}

namespace {

// Counts this lane at barrier `id`; true if it was the last.
bool arrive_at(int id, int count, bool waits) {
  Block& b = the_block();
  if (id < 1 || id >= kNamed) fail("a named barrier must have a number from 1 to 15, got " + std::to_string(id));
  if (count <= 0 || count % kWarp != 0)
    fail("a named barrier must count whole warps, got " + std::to_string(count) + " threads");
  Barrier& barrier = b.barriers[id];
  if (barrier.arrived > 0 && barrier.count != count)
    fail("named barrier " + std::to_string(id) + " counts " + std::to_string(barrier.count) + " threads for some and " +
         std::to_string(count) + " for this one");
  barrier.count = count;
  ++barrier.arrived;
  shadow::arrive(uintptr_t(id));
  if (waits) barrier.waiting.push_back(b.running);
  if (barrier.arrived < count) return false;
  for (const int lane : barrier.waiting) shadow::acquire(uintptr_t(id), lane);
  shadow::forget(uintptr_t(id));
  release(b, barrier);
  return true;
}

}  // namespace

void sync_named(int id, int count, Site site) {
  Block& b = the_block();
  if (arrive_at(id, count, true)) {
    yield_lane(b);  // release has made this lane ready too
  } else {
    wait_here(b, "named barrier", site, id);
  }
}

void arrive_named(int id, int count, Site) { arrive_at(id, count, false); }

void meet_warp(unsigned mask, const char* what, Act act, void* mine) {
  Block& b = the_block();
  const int warp = b.running / kWarp, lane = b.running % kWarp, first = warp * kWarp;
  const int present = std::min<int>(kWarp, int(b.lanes.size()) - first);
  if (present < kWarp) mask &= (1u << present) - 1;
  if (!(mask >> lane & 1)) fail(std::string(what) + ": the mask must name the lane that calls it");
  auto& open = b.meetings[warp];
  size_t at = 0;
  while (at < open.size() && (open[at].mask & mask) == 0) ++at;
  if (at == open.size()) {
    for (int i = 0; i < present; ++i)
      if ((mask >> i & 1) && b.lanes[first + i].ended)
        fail(std::string(what) + ": the mask names lane " + std::to_string(i) + ", which has ended");
    open.push_back({});
    open[at].mask = mask, open[at].what = what, open[at].act = act;
  }
  Meeting& meeting = open[at];
  if (meeting.mask != mask || meeting.act != act || std::strcmp(meeting.what, what) != 0)
    fail(std::string("divergent warp: this lane is at ") + what + ", others wait at " + meeting.what +
         (meeting.mask != mask ? " with another mask" : ""));
  meeting.arrived |= 1u << lane;
  meeting.brought[lane] = mine;
  if (meeting.arrived != mask) {
    wait_here(b, what, {}, int(mask));
    return;
  }
  const Meeting complete = meeting;
  open.erase(open.begin() + long(at));
  complete.act(complete.brought, mask);
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) make_ready(b, first + i);
  yield_lane(b);
}

void meet_warpgroup(const char* what, GroupAct act, void* mine) {
  Block& b = the_block();
  const int size = 4 * kWarp, first = b.running / size * size;
  if (first + size > int(b.lanes.size())) fail(std::string(what) + ": needs four whole warps");
  GroupMeeting& meeting = b.groups[b.running / size];
  if (meeting.arrived > 0 && (meeting.act != act || std::strcmp(meeting.what, what) != 0))
    fail(std::string("divergent warpgroup: this lane is at ") + what + ", others wait at " + meeting.what);
  meeting.what = what, meeting.act = act;
  meeting.brought[b.running - first] = mine;
  if (++meeting.arrived < size) {
    wait_here(b, what, {}, 0);
    return;
  }
  meeting.arrived = 0;
  act(meeting.brought);
  for (int i = 0; i < size; ++i) make_ready(b, first + i);
  yield_lane(b);
}

void sync_warp(unsigned mask) {
  meet_warp(
      mask, "__syncwarp", [](void* const*, unsigned met) { shadow::sync_warp(running_lane() / kWarp * kWarp, met); },
      nullptr);
}

void wait_until(const char* what, const std::function<bool()>& done) {
  Block& b = the_block();
  if (done()) return;
  b.lanes[b.running].done = &done;
  b.polling.push_back(b.running);
  wait_here(b, what, {}, 0);
}

unsigned char* dynamic_shared() { return the_block().shared; }

bool is_shared(const void* address) {
  const Block& b = the_block();
  const auto* byte = static_cast<const unsigned char*>(address);
  return (byte >= b.shared && byte < b.shared + b.shared_bytes) ||
         (byte >= b.statics && byte < b.statics + b.static_bytes);
}

uint32_t shared_offset(const void* address) {
  const Block& b = the_block();
  if (!is_shared(address)) fail("an address in shared memory is needed, got one outside");
  const auto* byte = static_cast<const unsigned char*>(address);
  const bool is_static = byte >= b.statics && byte < b.statics + b.static_bytes;
  return uint32_t(is_static ? byte - b.statics + kStaticOffset : byte - b.shared);
}

void* shared_pointer(uint32_t offset) {
  const Block& b = the_block();
  if (offset >= kStaticOffset ? offset - kStaticOffset >= b.static_bytes : offset >= b.shared_bytes)
    fail("a number in shared space must be below " + std::to_string(b.shared_bytes) + ", got " +
         std::to_string(offset));
  return offset >= kStaticOffset ? b.statics + (offset - kStaticOffset) : b.shared + offset;
}

void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail("an access of " + std::to_string(bytes) + " bytes must be aligned to them, got an address that is " +
         std::to_string(reinterpret_cast<uintptr_t>(address) % bytes) + " beyond");
}

void check_range(const void* address, size_t bytes) {
  const Block& b = the_block();
  const auto* byte = static_cast<const unsigned char*>(address);
  if (byte >= b.shared && byte < b.shared + 256 * 1024 && byte + bytes > b.shared + b.shared_bytes)
    fail("an access of " + std::to_string(bytes) + " bytes ends beyond the " + std::to_string(b.shared_bytes) +
         " bytes of dynamic shared memory");
}

int running_lane() { return the_block().running; }
uint64_t block_serial() { return the_block().serial; }
uint64_t draw() { return next_random(the_block().random); }
Order order() { return the_block().order; }

}  // namespace simt
