#include "hopper.h"

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "block.h"
#include "shadow.h"
#include "types.h"

namespace simt {
namespace {

struct Mbarrier {
  int count = 0, missing = 0, phase = 0;
  int64_t bytes = 0;  // expected and not yet come
};
struct Bulk {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
  uint64_t* barrier;
  uint32_t stamp;
};
// One product of a warpgroup, with what each of its threads has brought.
struct Product {
  Wgmma shape;
  uint64_t a = 0, b = 0;
  bool a_in_registers = false;
  std::vector<float*> d;
  std::vector<uint32_t> registers;  // four of each thread
};
struct Group {
  std::vector<std::vector<Product>> batches{1};  // the last is open
};
struct Hopper {
  uint64_t block = 0;
  std::map<uint64_t*, Mbarrier> barriers;
  std::vector<Bulk> bulks;
  std::map<int, Group> groups;
};
thread_local Hopper hopper_of_thread;

Hopper& hopper() {
  Hopper& h = hopper_of_thread;
  if (h.block != block_serial()) {
    h = Hopper{};
    h.block = block_serial();
  }
  return h;
}

bool comes_at_once() { return order() == Order::kDescending || (order() == Order::kRandom && draw() % 2 == 0); }

Mbarrier& barrier_at(uint64_t* barrier) {
  const auto found = hopper().barriers.find(barrier);
  if (found == hopper().barriers.end()) fail("an mbarrier must have been initialised");
  return found->second;
}

uintptr_t key_of(uint64_t* barrier, int phase) { return reinterpret_cast<uintptr_t>(barrier) + uintptr_t(phase % 2); }

void end_phase_if_complete(uint64_t* barrier, Mbarrier& b) {
  if (b.missing > 0 || b.bytes != 0) return;
  ++b.phase;
  b.missing = b.count;
  shadow::forget(key_of(barrier, b.phase));  // of two phases ago
}

void come(const Bulk& bulk) {
  std::memcpy(bulk.to, bulk.from, size_t(bulk.bytes));
  Mbarrier& b = barrier_at(bulk.barrier);
  shadow::agent_done(key_of(bulk.barrier, b.phase), bulk.stamp);
  b.bytes -= bulk.bytes;
  end_phase_if_complete(bulk.barrier, b);
}

void all_come() {
  std::vector<Bulk> bulks;
  bulks.swap(hopper().bulks);
  for (const Bulk& bulk : bulks) come(bulk);
}

void arrive(uint64_t* barrier, int bytes) {
  Mbarrier& b = barrier_at(barrier);
  if (b.missing == 0) fail("an mbarrier: more threads have arrived than it counts");
  shadow::arrive(key_of(barrier, b.phase));
  --b.missing;
  b.bytes += bytes;
  end_phase_if_complete(barrier, b);
}

}  // namespace

void mbarrier_init(uint64_t* barrier, int count) {
  if (!is_shared(barrier)) fail("an mbarrier must lie in shared memory");
  check_aligned(barrier, 8);
  shadow::access(barrier, 8, shadow::Kind::kAtomic);
  hopper().barriers[barrier] = {count, count, 0, 0};
}
void mbarrier_arrive(uint64_t* barrier) { arrive(barrier, 0); }
void mbarrier_arrive_expect(uint64_t* barrier, int bytes) { arrive(barrier, bytes); }

void mbarrier_wait(uint64_t* barrier, int parity) {
  const int now = barrier_at(barrier).phase, phase = now % 2 == parity ? now : now - 1;  // -1: none has to end
  const auto has_ended = [&] { return (barrier_at(barrier).phase & 1) != parity; };
  wait_until("mbarrier", [&] {
    if (!has_ended()) all_come();
    return has_ended();
  });
  if (phase >= 0) shadow::acquire(key_of(barrier, phase), running_lane());
}

void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
  if (bytes <= 0 || bytes % 16 != 0) fail("a bulk copy must have a multiple of 16 bytes, got " + std::to_string(bytes));
  if (!is_shared(to)) fail("a bulk copy must write to shared memory");
  check_aligned(to, 16);
  check_aligned(from, 16);
  barrier_at(barrier);
  shadow::access(from, size_t(bytes), shadow::Kind::kRead);
  const uint32_t stamp = shadow::agent_write(to, size_t(bytes));
  const Bulk bulk{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, barrier, stamp};
  if (comes_at_once()) {
    come(bulk);
  } else {
    hopper().bulks.push_back(bulk);
  }
}

uint64_t matrix_descriptor(const void* start, int leading, int stride, Swizzle swizzle) {
  const uint64_t address = shared_offset(start);
  if (address % 16 != 0 || leading % 16 != 0 || stride % 16 != 0)
    fail("a matrix descriptor's address and offsets must be multiples of 16");
  return (address >> 4 & 0x3FFF) | uint64_t(leading >> 4 & 0x3FFF) << 16 | uint64_t(stride >> 4 & 0x3FFF) << 32 |
         uint64_t(swizzle) << 62;
}

int64_t offset_in(int mn, int k, int leading, int stride, Swizzle swizzle, bool mn_major) {
  const int row_bytes[] = {16, 128, 64, 32}, bytes = row_bytes[int(swizzle)], wide = bytes / 2;
  if (swizzle == Swizzle::kNone) {
    const int64_t inner = mn_major ? 2 * (mn % 8) + 16 * (k % 8) : 2 * (k % 8) + 16 * (mn % 8);
    return inner + int64_t{mn / 8} * stride + int64_t{k / 8} * leading;
  }
  if (!mn_major) return 2 * k + int64_t{mn % 8} * bytes + int64_t{mn / 8} * stride;
  return 2 * (mn % wide) + int64_t{mn / wide} * leading + int64_t{k % 8} * bytes + int64_t{k / 8} * stride;
}

int64_t swizzled(int64_t offset, Swizzle swizzle) {
  const int64_t bits[] = {0, 7, 3, 1};
  return offset ^ (offset >> 7 & bits[int(swizzle)]) << 4;
}

namespace {

float value_at(uint64_t descriptor, int mn, int k, bool mn_major, Half type) {
  const auto field = [&](int shift) { return int(descriptor >> shift & 0x3FFF) << 4; };
  const auto swizzle = Swizzle(descriptor >> 62);
  const int64_t offset = field(0) + offset_in(mn, k, field(16), field(32), swizzle, mn_major);
  const void* at = shared_pointer(uint32_t(swizzled(offset, swizzle)));
  shadow::access(at, 2, shadow::Kind::kBlind);
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return type == Half::kBfloat16 ? bf16_value(bits) : half_value(bits);
}

void multiply(const Product& p) {
  const int n = p.shape.n;
  std::vector<float> a(64 * 16), b(size_t(n) * 16);
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 16 && !p.a_in_registers; ++k)
      a[m * 16 + k] = value_at(p.a, m, k, p.shape.a_mn_major, p.shape.type);
  for (int l = 0; l < 4 * kWarp && p.a_in_registers; ++l)
    for (int r = 0; r < 4; ++r)
      for (int i = 0; i < 2; ++i) {
        const Place place = place_in_a(l % kWarp, r, i);
        const auto bits = uint16_t(p.registers[4 * l + r] >> (16 * i));
        a[(16 * (l / kWarp) + place.row) * 16 + place.column] =
            p.shape.type == Half::kBfloat16 ? bf16_value(bits) : half_value(bits);
      }
  for (int column = 0; column < n; ++column)
    for (int k = 0; k < 16; ++k) b[column * 16 + k] = value_at(p.b, column, k, p.shape.b_mn_major, p.shape.type);
  for (int l = 0; l < 4 * kWarp; ++l) {
    for (int i = 0; i < n / 2; ++i) {
      const Place place = place_in_c(l % kWarp, i % 4);
      float sum = p.shape.keeps ? p.d[l][i] : 0.0f;
      for (int k = 0; k < 16; ++k)
        sum += a[(16 * (l / kWarp) + place.row) * 16 + k] * b[(8 * (i / 4) + place.column) * 16 + k];
      p.d[l][i] = sum;
    }
  }
}

struct Brought {
  float* d;
  uint64_t a, b;
  const uint32_t* registers;
  Wgmma shape;
};

Group& my_group() { return hopper().groups[running_lane() / (4 * kWarp)]; }

void begin_product(void* const* brought) {
  const auto& first = *static_cast<const Brought*>(brought[0]);
  if (first.shape.n % 8 != 0 || first.shape.n < 8 || first.shape.n > 256) fail("wgmma: n must be 8 to 256 by 8");
  Product p{first.shape, first.a, first.b, first.registers != nullptr, {}, {}};
  for (int l = 0; l < 4 * kWarp; ++l) {
    const auto& mine = *static_cast<const Brought*>(brought[l]);
    if (mine.a != first.a || mine.b != first.b || mine.shape.n != first.shape.n)
      fail("wgmma: descriptors and shape must be those of all threads of the warpgroup");
    p.d.push_back(mine.d);
    for (int r = 0; r < 4 && mine.registers != nullptr; ++r) p.registers.push_back(mine.registers[r]);
  }
  // Products of one accumulator keep their order: one may only come at once if none before it waits.
  std::vector<Product>& open = my_group().batches.back();
  bool waits = false;
  for (const auto& batch : my_group().batches) waits = waits || !batch.empty();
  if (!waits && comes_at_once()) {
    multiply(p);
  } else {
    open.push_back(std::move(p));
  }
}

}  // namespace

void wgmma(float* d, uint64_t a, uint64_t b, const Wgmma& shape) {
  Brought mine{d, a, b, nullptr, shape};
  meet_warpgroup("wgmma", &begin_product, &mine);
}
void wgmma_registers(float* d, const uint32_t (&a)[4], uint64_t b, const Wgmma& shape) {
  Brought mine{d, 0, b, a, shape};
  meet_warpgroup("wgmma", &begin_product, &mine);
}
void wgmma_commit() {
  meet_warpgroup("wgmma.commit_group", [](void* const*) { my_group().batches.emplace_back(); }, nullptr);
}
void wgmma_wait(int groups) {
  meet_warpgroup(
      "wgmma.wait_group",
      [](void* const* brought) {
        auto& batches = my_group().batches;
        while (int(batches.size()) > *static_cast<int*>(brought[0]) + 1) {
          for (const Product& p : batches.front()) multiply(p);
          batches.erase(batches.begin());
        }
      },
      &groups);
}

}  // namespace simt
