// What block.cpp (who waits for whom) and launch.cpp (blocks, their memory) share: one block under way.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "block.h"
#include "fibre.h"
#include "shadow.h"

namespace simt {

constexpr size_t kStack = 64 * 1024, kGuard = 1024;
constexpr unsigned char kPoison = 0xFF, kGuardByte = 0xA5;
constexpr int kNamed = 16;
constexpr uint32_t kStaticOffset = 1 << 20;  // numbers of static variables in shared space begin here

struct Lane {
  void* sp = nullptr;
  Position position{};
  bool ended = false;
  const char* waits = nullptr;  // null: it may run
  Site site{};
  int detail = 0;  // number of a named barrier, or the mask of a meeting
  int result = 0;
  const std::function<bool()>* done = nullptr;
};

struct Meeting {
  unsigned mask = 0, arrived = 0;
  const char* what = nullptr;
  Act act = nullptr;
  void* brought[kWarp] = {};
};

struct GroupMeeting {
  int arrived = 0;
  const char* what = nullptr;
  GroupAct act = nullptr;
  void* brought[4 * kWarp] = {};
};

struct Barrier {
  int arrived = 0, count = 0, held = 0;
  Site site{};
  std::vector<int> waiting;
};

struct Block {
  unsigned char *stacks, *shared;
  void* main_sp = nullptr;
  std::vector<Lane> lanes;
  std::vector<std::vector<Meeting>> meetings;  // of each warp
  std::vector<GroupMeeting> groups;
  uint64_t serial = 0;
  Barrier barriers[kNamed];
  std::vector<unsigned> ready;  // lanes of each warp that may run
  std::vector<int> polling;
  uint64_t random = 0;
  int running = 0, live = 0;
  Order order = Order::kAscending;
  const char* kernel = "";
  const std::function<void()>* body = nullptr;
  std::string error;
  size_t shared_bytes = 0;
  unsigned char* statics = nullptr;  // thread-local storage of the kernel's library: its static shared variables
  size_t static_bytes = 0;
  std::vector<shadow::Range> own;  // stacks, the kernel's library

  Block();
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
};

extern thread_local std::unique_ptr<Block> block;
inline Block& the_block() { return *block; }

inline uint64_t next_random(uint64_t& state) {  // splitmix64
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

std::string name_of(const Position& p);
void make_ready(Block& b, int lane);
int pick(Block& b);  // the next lane to run, which is no longer marked as ready; -1: none can go on
void lane_main();    // what a lane's stack begins with

}  // namespace simt
