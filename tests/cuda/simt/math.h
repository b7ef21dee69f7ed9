// CUDA's scalar functions on a CPU: bit casts, fast math (exact here, so a bound that holds here may be 2 ulp tighter
// than on a GPU), loads with cache hints, atomics.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

template <typename To, typename From>
inline To simt_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To out;
  std::memcpy(&out, &value, sizeof(To));
  return out;
}

inline unsigned __float_as_uint(float x) { return simt_bits<unsigned>(x); }
inline int __float_as_int(float x) { return simt_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return simt_bits<float>(x); }
inline float __int_as_float(int x) { return simt_bits<float>(x); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __saturatef(float x) { return x > 0.0f ? std::fmin(x, 1.0f) : 0.0f; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)(x)); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = uint64_t{y} << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= unsigned(both >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
  return out;
}

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

template <typename T>
inline T __ldg(const T* p) {
  return *p;
}
template <typename T>
inline T __ldcs(const T* p) {
  return *p;
}
template <typename T>
inline T __ldcg(const T* p) {
  return *p;
}
template <typename T>
inline T __ldlu(const T* p) {
  return *p;
}
template <typename T>
inline void __stcs(T* p, T value) {
  *p = value;
}
template <typename T>
inline void __stcg(T* p, T value) {
  *p = value;
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) {}

// Blocks may run on two OS threads, so these are atomic there too.
template <typename T, typename Combine>
inline T simt_atomic(T* p, Combine combine) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics of 4 or 8 bytes");
  T before, after;
  __atomic_load(p, &before, __ATOMIC_RELAXED);
  do {
    after = combine(before);
  } while (!__atomic_compare_exchange(p, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}
template <typename T>
inline T atomicAdd(T* p, T x) {
  return simt_atomic(p, [=](T old) { return T(old + x); });
}
template <typename T>
inline T atomicSub(T* p, T x) {
  return simt_atomic(p, [=](T old) { return T(old - x); });
}
template <typename T>
inline T atomicMax(T* p, T x) {
  return simt_atomic(p, [=](T old) { return old > x ? old : x; });
}
template <typename T>
inline T atomicMin(T* p, T x) {
  return simt_atomic(p, [=](T old) { return old < x ? old : x; });
}
template <typename T>
inline T atomicOr(T* p, T x) {
  return simt_atomic(p, [=](T old) { return T(old | x); });
}
template <typename T>
inline T atomicAnd(T* p, T x) {
  return simt_atomic(p, [=](T old) { return T(old & x); });
}
template <typename T>
inline T atomicExch(T* p, T x) {
  return simt_atomic(p, [=](T) { return x; });
}
template <typename T>
inline T atomicCAS(T* p, T expected, T x) {
  return simt_atomic(p, [=](T old) { return old == expected ? x : old; });
}
