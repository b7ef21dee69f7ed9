// The tensor-core instructions of sm_80 and later as small functions, and with -DHK_SIMT their twins on a CPU, which do
// the same lane by lane. All PTX of the attention kernels stands here.
//
// Fragments of mma.m16n8k16, for lane l with g = l / 4 and t = l % 4; each register holds two 16-bit numbers, the lower
// column first:
//   a[0] (row g, columns 2t 2t+1)   a[1] (row g + 8, same)   a[2] (row g, columns 2t+8 2t+9)   a[3] (row g + 8, same)
//   b[0] (rows 2t 2t+1, column g)   b[1] (rows 2t+8 2t+9, column g)
//   c[0] c[1] (row g, columns 2t 2t+1)   c[2] c[3] (row g + 8, same)
// So two neighbouring 16 x 8 results, rounded to 16 bits, are the left operand of a product that follows.
// Source: PTX ISA 8.0, sections 9.7.13 (mma, ldmatrix) and 9.7.8 (cp.async).
#pragma once
#include "cuda/device.cuh"

namespace herdkern::cuda {

#ifdef HK_SIMT

// An address in shared memory.
using Shared = unsigned char*;
HK_DEVICE Shared shared_address(void* p) { return static_cast<Shared>(p); }

HK_DEVICE void copy_16_bytes(Shared to, const void* from, bool valid) {
  ::simt::copy_async(to, from, 16, valid ? 16 : 0);
}
HK_DEVICE void copy_4_bytes(Shared to, const void* from, bool valid) { ::simt::copy_async(to, from, 4, valid ? 4 : 0); }
HK_DEVICE void commit_copies() { ::simt::commit_copies(); }
template <int kGroups>
HK_DEVICE void wait_copies() {
  ::simt::wait_copies(kGroups);
}

HK_DEVICE void load_matrices(Shared row, uint32_t (&m)[4]) { ::simt::load_matrices(row, m, false); }
HK_DEVICE void load_matrices_transposed(Shared row, uint32_t (&m)[4]) { ::simt::load_matrices(row, m, true); }

template <typename T>
HK_DEVICE uint32_t pack_pair(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  std::memcpy(&bits, pair, 4);
  return bits;
}

template <typename T>
constexpr bool kIsBfloat16 = false;
template <>
constexpr bool kIsBfloat16<bf16> = true;
template <typename T>
HK_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  ::simt::multiply_add(c, a, b, kIsBfloat16<T> ? ::simt::Half::kBfloat16 : ::simt::Half::kFloat16);
}

HK_DEVICE float reciprocal_approx(float x) { return 1.0f / x; }
HK_DEVICE int not_hoisted(int x) { return x; }

#else

using Shared = uint32_t;
HK_DEVICE Shared shared_address(void* p) { return static_cast<Shared>(__cvta_generic_to_shared(p)); }

// Begins to copy 16 (4) bytes from global to shared memory; zeros where not `valid`, then `from` is not read.
HK_DEVICE void copy_16_bytes(Shared to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
HK_DEVICE void copy_4_bytes(Shared to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
// What this thread has begun since the last commit is a group, which may be empty.
HK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the kGroups youngest groups of this thread are under way.
template <int kGroups>
HK_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers. Lane l names row l % 8 of matrix l / 8, 16 bytes; each lane gets columns 2t
// and 2t + 1 of row g of each matrix, or of its transpose.
HK_DEVICE void load_matrices(Shared row, uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}
HK_DEVICE void load_matrices_transposed(Shared row, uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

template <typename T>
HK_DEVICE uint32_t pack_pair(float low, float high);
template <>
HK_DEVICE uint32_t pack_pair<bf16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
HK_DEVICE uint32_t pack_pair<fp16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// c += a b, 16 x 8 += 16 x 16 times 16 x 8.
template <typename T>
HK_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
HK_DEVICE void multiply_add<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
HK_DEVICE void multiply_add<fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 1 / x by the special function unit, 1 ulp; 0 for infinity.
HK_DEVICE float reciprocal_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// x, but what is computed from it stays in the loop: addresses kept over a loop would take registers that spill.
HK_DEVICE int not_hoisted(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

#endif

}  // namespace herdkern::cuda
