// Who has last written and read each place of a block's shared memory, and what orders whom: finds a missing barrier in
// whatever order the lanes run, reads of what nothing has written, and accesses outside of declared global memory.
//
// Kernels are compiled with -fsanitize=thread, which calls a function before each access to memory; shadow.cpp defines
// those functions (the compiler's own run-time library is not linked). Two accesses to one place, one of them a write,
// are a race unless a full barrier lies between them or a chain of __syncwarp, named barriers and mbarriers leads from
// one lane to the other (vector clocks, one entry a lane). Places are pairs of bytes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace simt::shadow {

struct Range {
  unsigned char* begin = nullptr;
  size_t bytes = 0;
  bool holds(const void* p) const { return size_t(static_cast<const unsigned char*>(p) - begin) < bytes; }
};

// `own`: memory that belongs to the running of kernels and not to them, as stacks and constants.
void begin_block(Range dynamic, Range statics, const std::vector<Range>& own, int num_lanes);
void resume();   // lanes run from here on,
void suspend();  // until here
bool is_active();

// What orders lanes. `key`: a named barrier's number or an mbarrier's address.
void sync_block();
void sync_warp(int first_lane, unsigned mask);
void arrive(uintptr_t key);
void acquire(uintptr_t key, int lane);
void forget(uintptr_t key);

// Accesses by the running lane that its compiled code does not show, such as those of asynchronous copies. kBlind: a
// read whose value may be thrown away, as that of a matrix whose last rows do not exist.
enum class Kind { kRead, kBlind, kWrite, kAtomic };
void access(const void* address, size_t bytes, Kind kind);

// A write by the engine that makes bulk copies, begun by the running lane: checked as that lane's, but even after a
// full barrier only who has waited at the mbarrier, or was told by one who has, may read it. Returns its stamp.
uint32_t agent_write(const void* address, size_t bytes);
void agent_done(uintptr_t key, uint32_t stamp);

// Global memory that kernels may touch; with none declared, all of it is.
void declare(const void* address, size_t bytes);
void forget_declared();

}  // namespace simt::shadow
