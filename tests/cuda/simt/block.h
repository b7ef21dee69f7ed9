// One thread block on one CPU thread: every CUDA thread ("lane") is a fibre that runs until it has to wait. What waits,
// where, and in which order lanes run is decided in block.cpp; this is what the emulated CUDA names are made of.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;          // of a block
constexpr size_t kMaxShared = 227 * 1024;  // bytes of a block on sm_90 (sm_80: 163 KiB)

// What a lane knows of itself; `here` is that of the running lane.
struct Position {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  int index;  // of the thread in its block
};
extern thread_local Position* here __attribute__((tls_model("initial-exec")));

// Where in a kernel a lane waits: two lanes at different places of one __syncthreads are an error.
struct Site {
  const char* file;
  int line;
};

// Order in which lanes and warps run. Asynchronous copies come as late as they may under kAscending, at once under
// kDescending, and as a draw decides under kRandom.
enum class Order { kAscending, kDescending, kRandom };
struct Settings {
  Order order = Order::kAscending;
  uint64_t seed = 0;
  int num_threads = 1;  // OS threads that share the blocks
};
Settings& settings();

// Runs `body` once for every thread of every block. Throws std::runtime_error that names kernel, block and thread for
// what a lane did wrong. `kernel` is its address, for the bound of cudaFuncSetAttribute.
void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& body);
void allow_shared(const void* kernel, size_t bytes);

// Ends the launch with this message, from inside a lane.
[[noreturn]] void fail(const std::string& what);

// All live threads of the block. Returns the number of lanes whose `predicate` held.
int sync_block(bool predicate, Site site);
// bar.sync / bar.arrive id, count: `count` threads of the block, counted as they come.
void sync_named(int id, int count, Site site);
void arrive_named(int id, int count, Site site);

// The lanes of `mask` in this lane's warp meet; the last to come runs `act` on what all have brought (null for lanes
// outside), then all go on. `what` and `act` must be the same for all.
using Act = void (*)(void* const* brought, unsigned mask);
void meet_warp(unsigned mask, const char* what, Act act, void* mine);
// The same for the 128 lanes of an aligned group of four warps.
using GroupAct = void (*)(void* const* brought);
void meet_warpgroup(const char* what, GroupAct act, void* mine);
// Orders the memory of the lanes of `mask`, as __syncwarp does and a shuffle does not.
void sync_warp(unsigned mask);

// Lets others run until `done()`; `what` and `object` say in a report of a deadlock what is waited for.
void wait_until(const char* what, const std::function<bool()>& done);

// Shared memory of the block, poisoned with 0xFF bytes (NaN in every float type, -1) before the block begins. Static
// variables are thread-local ones (simt.h) of the library that the kernel lies in: that library has no others.
unsigned char* dynamic_shared();
bool is_shared(const void* address);
// Number of an address in shared space, and back; fails for an address outside.
uint32_t shared_offset(const void* address);
void* shared_pointer(uint32_t offset);

// Fails where `address` is no multiple of `bytes`.
void check_aligned(const void* address, size_t bytes);
// Fails where an access that begins in dynamic shared memory ends beyond it.
void check_range(const void* address, size_t bytes);

int running_lane();       // index of the running thread in its block
uint64_t block_serial();  // counts the blocks of this OS thread from 1 on
Order order();
uint64_t draw();  // the next number of this block's own random stream

}  // namespace simt
