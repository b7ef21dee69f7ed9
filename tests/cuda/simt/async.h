// Copies that a thread begins and waits for later: cp.async with its groups. When such a copy happens is not known
// before the wait, so here it happens at the wait under Order::kAscending (what is read too early is poison), at once
// under kDescending (what is overwritten too early is seen), and as a draw decides under kRandom.
#pragma once
#include <cstddef>
#include <cstdint>

namespace simt {

// cp.async: `valid` bytes from global memory, zeros up to `bytes` (4, 8 or 16, to which both addresses are aligned).
void copy_async(void* to, const void* from, int bytes, int valid);
// cp.async.commit_group: what this thread has begun since its last commit is a group, which may be empty.
void commit_copies();
// cp.async.wait_group: until at most `groups` of this thread's youngest groups are under way.
void wait_copies(int groups);
// cp.async.wait_all: also what has not been committed.
void wait_all_copies();

}  // namespace simt
