#include "async.h"

#include <cstring>
#include <string>
#include <vector>

#include "block.h"
#include "shadow.h"

namespace simt {
namespace {

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, valid;
};
struct Queue {
  uint64_t block = 0;
  std::vector<std::vector<Copy>> groups;  // the last is open
};
thread_local std::vector<Queue> queues;

Queue& my_queue() {
  if (queues.empty()) queues.resize(kMaxThreads);
  Queue& queue = queues[size_t(running_lane())];
  if (queue.block != block_serial()) {
    queue.block = block_serial();
    queue.groups.assign(1, {});
  }
  return queue;
}

void do_copy(const Copy& copy) {
  shadow::access(copy.to, size_t(copy.bytes), shadow::Kind::kWrite);
  if (copy.valid > 0) shadow::access(copy.from, size_t(copy.valid), shadow::Kind::kRead);
  std::memcpy(copy.to, copy.from, size_t(copy.valid));
  std::memset(copy.to + copy.valid, 0, size_t(copy.bytes - copy.valid));
}

void finish(std::vector<Copy>& group) {
  for (const Copy& copy : group) do_copy(copy);
  group.clear();
}

}  // namespace

void copy_async(void* to, const void* from, int bytes, int valid) {
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fail("cp.async must copy 4, 8 or 16 bytes, got " + std::to_string(bytes));
  if (!is_shared(to)) fail("cp.async must write to shared memory");
  check_aligned(to, size_t(bytes));
  if (valid > 0) check_aligned(from, size_t(bytes));
  const Copy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, valid};
  const bool at_once = order() == Order::kDescending || (order() == Order::kRandom && draw() % 2 == 0);
  if (at_once) {
    do_copy(copy);
  } else {
    my_queue().groups.back().push_back(copy);
  }
}

void commit_copies() { my_queue().groups.emplace_back(); }

void wait_copies(int groups) {
  auto& queue = my_queue().groups;
  while (int(queue.size()) > groups + 1) {
    finish(queue.front());
    queue.erase(queue.begin());
  }
}

void wait_all_copies() {
  for (auto& group : my_queue().groups) finish(group);
}

}  // namespace simt
