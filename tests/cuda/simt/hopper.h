// What sm_90 adds: mbarriers, bulk copies that count their bytes there, and wgmma on shared-memory descriptors. Copies
// and products happen as late as they may, at once, or as a draw decides, by the order of lanes (async.h). Not
// modelled: tensor maps (cp.async.bulk.tensor), clusters, and the proxy fences that a GPU needs between ordinary writes
// and what wgmma or a bulk store reads. Source: PTX ISA 8.0, 9.7.12.15 (mbarrier), 9.7.8.24 (bulk copies), 9.7.14
// (wgmma).
#pragma once
#include <cstdint>

#include "matrix.h"

namespace simt {

// mbarrier: a phase ends when `count` threads have arrived and all expected bytes have come.
void mbarrier_init(uint64_t* barrier, int count);
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_arrive_expect(uint64_t* barrier, int bytes);
// Waits until the phase of this parity (0 for the first) has ended: mbarrier.try_wait.parity until it holds.
void mbarrier_wait(uint64_t* barrier, int parity);

// cp.async.bulk global to shared: 16-byte aligned, a multiple of 16 bytes; one thread, for the whole block.
void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier);

enum class Swizzle { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };  // as in bits 62 and 63 of a descriptor

// A matrix in shared memory as wgmma takes it. `leading`, `stride`: bytes, see address_in.
uint64_t matrix_descriptor(const void* start, int leading, int stride, Swizzle swizzle);

// Byte offset from a descriptor's start, before the swizzle, of number (mn, k) of a 16-bit operand; with W = 64, 32, 16
// numbers of 16 bits in a row of the 128-, 64-, 32-byte swizzle:
//   K-major   rows of W numbers along k; 8 rows W apart, then `stride` to the next 8. None: rows of 8, 16 bytes apart,
//             `leading` to the next 8 numbers of k.
//   MN-major  rows of W numbers along mn, `leading` to the next W; 8 rows (of k) W apart, then `stride` to the next 8.
//             None: rows of 8, 16 bytes apart, `leading` to the next 8 of k and `stride` to the next 8 of mn.
int64_t offset_in(int mn, int k, int leading, int stride, Swizzle swizzle, bool mn_major);
// The swizzle of a shared-memory offset: bits 4 to 6 (5, 4) are turned by bits 7 to 9 (8, 7).
int64_t swizzled(int64_t offset, Swizzle swizzle);

// wgmma.mma_async m64 n k16, fp32 += 16-bit: d (n / 2 numbers of each of 128 threads) = d * keeps + a b. Thread l of
// warp w has in d[4 j + e] what place_in_c(l, e) says of rows 16 w to 16 w + 15 and columns 8 j to 8 j + 7. The left
// operand is a descriptor or (wgmma_registers) four registers of each thread, as place_in_a of those 16 rows.
struct Wgmma {
  int n;  // a multiple of 8, at most 256
  Half type;
  bool keeps, a_mn_major, b_mn_major;
};
void wgmma(float* d, uint64_t a, uint64_t b, const Wgmma& shape);
void wgmma_registers(float* d, const uint32_t (&a)[4], uint64_t b, const Wgmma& shape);
// wgmma.commit_group and wait_group; d may be read after the wait alone.
void wgmma_commit();
void wgmma_wait(int groups);

}  // namespace simt
