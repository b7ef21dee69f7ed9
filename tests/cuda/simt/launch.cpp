// Blocks: their order, their memory, their OS threads.
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "state.h"

asm(R"(
  .text
  .hidden simt_switch
  .globl simt_switch
  .type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size simt_switch, .-simt_switch
)");

namespace simt {

thread_local Position* here = nullptr;
thread_local std::unique_ptr<Block> block;

Block::Block() {
  stacks = static_cast<unsigned char*>(
      mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  shared = static_cast<unsigned char*>(
      mmap(nullptr, 256 * 1024, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (stacks == MAP_FAILED || shared == MAP_FAILED) throw std::bad_alloc();
  for (int i = 0; i < kMaxThreads; ++i) mprotect(stacks + i * kStack, 4096, PROT_NONE);  // a stack that overflows
}
Block::~Block() {
  munmap(stacks, kStack * kMaxThreads);
  munmap(shared, 256 * 1024);
}
namespace {

shadow::Range stack_of_thread() {
  thread_local shadow::Range stack;
  if (stack.begin != nullptr) return stack;
  pthread_attr_t attributes;
  void* begin = nullptr;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) pthread_attr_getstack(&attributes, &begin, &stack.bytes);
  pthread_attr_destroy(&attributes);
  stack.begin = static_cast<unsigned char*>(begin);
  return stack;
}

// Thread-local storage of the library that holds the kernel, in this OS thread.
struct Library {
  const void* kernel;
  unsigned char* data = nullptr;
  size_t bytes = 0;
  shadow::Range loaded{};
};
struct ModuleOffset {
  unsigned long module, offset;
};
extern "C" void* __tls_get_addr(ModuleOffset*);
int find_library(dl_phdr_info* info, size_t, void* found) {
  auto& library = *static_cast<Library*>(found);
  const auto address = reinterpret_cast<uintptr_t>(library.kernel);
  bool holds = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_LOAD && address >= begin && address < begin + part.p_memsz) holds = true;
    if (part.p_type == PT_TLS) library.bytes = part.p_memsz;
    if (part.p_type == PT_LOAD)  // parts come in the order of their addresses
      library.loaded = {reinterpret_cast<unsigned char*>(info->dlpi_addr), size_t(part.p_vaddr + part.p_memsz)};
  }
  if (!holds) library.bytes = 0;
  if (holds && library.bytes > 0) {  // dlpi_tls_data is null until this OS thread has touched it, so touch it
    ModuleOffset begin{info->dlpi_tls_modid, 0};
    library.data = static_cast<unsigned char*>(__tls_get_addr(&begin));
  }
  return holds;
}

void begin_block(Block& b, uint64_t number, dim3 grid, dim3 shape) {
  const uint3 at{unsigned(number % grid.x), unsigned(number / grid.x % grid.y), unsigned(number / grid.x / grid.y)};
  const int count = int(shape.x * shape.y * shape.z), warps = (count + kWarp - 1) / kWarp;
  b.random = settings().seed * 0x2545F4914F6CDD1Du + number;
  b.lanes.assign(count, Lane{});
  b.meetings.assign(warps, {});
  b.groups.assign((warps + 3) / 4, GroupMeeting{});
  for (Barrier& barrier : b.barriers) barrier = Barrier{};
  b.ready.assign(warps, 0);
  ++b.serial;
  b.polling.clear();
  b.live = count;
  for (int i = 0; i < count; ++i) {
    const unsigned x = unsigned(i) % shape.x, y = unsigned(i) / shape.x % shape.y,
                   z = unsigned(i) / (shape.x * shape.y);
    b.lanes[i].position = {{x, y, z}, at, shape, grid, i};
    // Tops at different places of a page, or all lanes' hot lines would fall into one set of the cache.
    b.lanes[i].sp = fibre_on(b.stacks + (i + 1) * kStack - 64 * (i % 32), &lane_main);
    make_ready(b, i);
  }
  std::memset(b.shared, kPoison, b.shared_bytes);
  std::memset(b.shared + b.shared_bytes, kGuardByte, kGuard);
  if (b.static_bytes > 0) std::memset(b.statics, kPoison, b.static_bytes);
  shadow::begin_block({b.shared, b.shared_bytes}, {b.statics, b.static_bytes}, b.own, count);
}

void run_block(Block& b, uint64_t number, dim3 grid, dim3 shape) {
  begin_block(b, number, grid, shape);
  b.running = b.order == Order::kDescending ? int(b.lanes.size()) - 1 : 0;
  b.running = pick(b);
  here = &b.lanes[b.running].position;
  shadow::resume();
  simt_switch(&b.main_sp, b.lanes[b.running].sp);
  shadow::suspend();
  here = nullptr;
  if (b.error.empty() && std::any_of(b.shared + b.shared_bytes, b.shared + b.shared_bytes + kGuard,
                                     [](unsigned char byte) { return byte != kGuardByte; }))
    b.error = std::string(b.kernel) + ": a thread has written beyond the " + std::to_string(b.shared_bytes) +
              " bytes of dynamic shared memory (" + name_of(b.lanes[0].position) + " and others)";
}

std::mutex allowed_lock;
std::map<const void*, size_t> allowed;

void check_launch(const char* name, const void* kernel, dim3 grid, dim3 shape, size_t shared_bytes) {
  const auto refuse = [&](const std::string& what) { throw std::runtime_error(std::string(name) + ": " + what); };
  const uint64_t threads = uint64_t{shape.x} * shape.y * shape.z;
  if (threads == 0 || threads > kMaxThreads || shape.z > 64)
    refuse("a block must have 1 to 1024 threads, got " + std::to_string(threads));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535)
    refuse("a grid must be 1 to 2^31 - 1 by 65535 by 65535, got " + std::to_string(grid.x) + " by " +
           std::to_string(grid.y) + " by " + std::to_string(grid.z));
  std::lock_guard<std::mutex> hold(allowed_lock);
  const auto asked = allowed.find(kernel);
  const size_t limit = asked == allowed.end() ? kMaxShared : asked->second;
  if (shared_bytes > limit)
    refuse("dynamic shared memory must be at most " + std::to_string(limit) + " bytes, got " +
           std::to_string(shared_bytes));
}

uint64_t common_divisor(uint64_t a, uint64_t b) { return b == 0 ? a : common_divisor(b, a % b); }

}  // namespace

Settings& settings() {
  static Settings s;
  return s;
}

void allow_shared(const void* kernel, size_t bytes) {
  std::lock_guard<std::mutex> hold(allowed_lock);
  allowed[kernel] = bytes;
}

void launch(const char* name, const void* kernel, dim3 grid, dim3 shape, size_t shared_bytes,
            const std::function<void()>& body) {
  check_launch(name, kernel, grid, shape, shared_bytes);
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
  const Settings chosen = settings();
  uint64_t step = 1, first = 0;  // blocks are independent: any order must do
  if (chosen.order == Order::kDescending) step = count - 1, first = count - 1;
  if (chosen.order == Order::kRandom) {
    uint64_t state = chosen.seed;
    first = next_random(state) % count, step = next_random(state) % count | 1;
    while (common_divisor(step, count) != 1) ++step;
  }
  std::atomic<uint64_t> next{0};
  std::atomic<bool> stop{false};
  std::mutex lock;
  std::string error;
  const shadow::Range arguments = stack_of_thread();  // they lie on the stack of whoever launches
  const auto work = [&] {
    if (block == nullptr) block = std::make_unique<Block>();
    Block& b = *block;
    Library library{kernel};
    dl_iterate_phdr(&find_library, &library);
    b.statics = library.data, b.static_bytes = library.data == nullptr ? 0 : library.bytes;
    b.own = {{b.stacks, kStack * kMaxThreads}, arguments, library.loaded};
    b.order = chosen.order, b.kernel = name, b.body = &body, b.shared_bytes = shared_bytes, b.error.clear();
    for (uint64_t i; !stop && (i = next++) < count;) {
      run_block(b, uint64_t((first + static_cast<unsigned __int128>(i) * step) % count), grid, shape);
      if (b.error.empty()) continue;
      stop = true;
      std::lock_guard<std::mutex> hold(lock);
      error = b.error;
    }
  };
  if (here != nullptr) throw std::runtime_error(std::string(name) + ": a kernel cannot launch a kernel here");
  const int threads = int(std::min<uint64_t>(count, uint64_t(chosen.num_threads)));
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace simt

extern "C" {
__attribute__((visibility("default"))) void simt_set(int order, uint64_t seed, int num_threads) {
  simt::settings() = {simt::Order(order), seed, num_threads};
}
}
