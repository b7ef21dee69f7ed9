// Pair<T>: 32 consecutive elements of type T as fp32, for kernels that live on memory bandwidth. A whole cache line of
// 16-bit elements is one load and one store, which may go past the caches (stream). Lanes lie in the order that T
// unpacks into at least cost: bf16 has its even elements in `a` and its odd ones in `b` (a shift and a mask, where two
// widening loads take four instructions); fp32 and fp16 lie as stored. Pairs of one T may be combined lane by lane.
#pragma once
#include "common/simd.h"

namespace herdkern::cpu::HK_ISA {

template <typename T>
constexpr bool kEvenOdd = false;
#if defined(HK_VEC_AVX512) || defined(HK_VEC_AVX2)
template <>
constexpr bool kEvenOdd<bf16> = true;
#endif

template <typename T>
struct Pair {
  static constexpr int kSize = 32;
  Vec a, b;
  Pair() = default;
  HK_INLINE explicit Pair(float x) : a(x), b(x) {}
  HK_INLINE Pair(const Vec& first, const Vec& second) : a(first), b(second) {}
  HK_INLINE Pair& operator+=(const Pair& other) { return *this = {a + other.a, b + other.b}; }

  // 32 floats that lie in memory in the order of the lanes.
  static HK_INLINE Pair load_lanes(const float* p) { return {Vec::load(p), Vec::load(p + 16)}; }
  HK_INLINE void store_lanes(float* p) const {
    a.store(p);
    b.store(p + 16);
  }
  // The same in the order of the elements; element i lies in lane_of(i).
  static constexpr int lane_of(int i) { return kEvenOdd<T> ? i / 2 + 16 * (i % 2) : i; }
  HK_INLINE void store_in_order(float* p) const {
    float lanes[32];
    store_lanes(lanes);
    for (int i = 0; i < kSize; ++i) p[i] = lanes[lane_of(i)];
  }

  static HK_INLINE Pair load(const T* p);
  HK_INLINE void store(T* p) const;
  HK_INLINE void stream(T* p) const;  // p is 64-byte aligned; end_of_streams() before another thread reads it
  HK_INLINE Pair rounded() const;     // to T and back
  static HK_INLINE Pair load_partial(const T* p, int n) {  // elements from n on are zero
    T some[kSize] = {};
    std::memcpy(some, p, static_cast<size_t>(n) * sizeof(T));
    return load(some);
  }
  HK_INLINE void store_partial(T* p, int n) const {
    T all[kSize];
    store(all);
    std::memcpy(p, all, static_cast<size_t>(n) * sizeof(T));
  }
};

template <typename T>
HK_INLINE Pair<T> operator+(const Pair<T>& x, const Pair<T>& y) {
  return {x.a + y.a, x.b + y.b};
}
template <typename T>
HK_INLINE Pair<T> operator-(const Pair<T>& x, const Pair<T>& y) {
  return {x.a - y.a, x.b - y.b};
}
template <typename T>
HK_INLINE Pair<T> operator*(const Pair<T>& x, const Pair<T>& y) {
  return {x.a * y.a, x.b * y.b};
}
template <typename T>
HK_INLINE Pair<T> fma(const Pair<T>& x, const Pair<T>& y, const Pair<T>& z) {
  return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)};
}

// Rounding to bf16 here is for numbers that came from bf16 inputs: a NaN among them has a low half of zeros (or is the
// processor's own), and adding 0x7fff cannot carry it into an infinity.
#if defined(HK_VEC_AVX512)

HK_INLINE __m512i bf16_in_high_half(const Vec& x) {  // the low half is what was cut off
  const __m512i bits = _mm512_castps_si512(x.v), one = _mm512_set1_epi32(1);
  const __m512i up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(up, _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000)), up, one);
}
HK_INLINE __m512i high_halves() { return _mm512_set1_epi32(static_cast<int>(0xffff0000u)); }
HK_INLINE __m512i packed(const Pair<bf16>& x) {
  const __m512i even = _mm512_srli_epi32(bf16_in_high_half(x.a), 16), odd = bf16_in_high_half(x.b);
  return _mm512_ternarylogic_epi32(high_halves(), odd, even, 0xca);  // odd where the mask is set, else even
}
HK_INLINE __m512i packed(const Pair<fp16>& x) {
  const __m256i first = _mm512_cvtps_ph(x.a.v, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), _mm512_cvtps_ph(x.b.v, _MM_FROUND_TO_NEAREST_INT), 1);
}
HK_INLINE Pair<bf16> unpacked(__m512i v, bf16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), _mm512_castsi512_ps(_mm512_and_si512(v, high_halves()))};
}
HK_INLINE Pair<fp16> unpacked(__m512i v, fp16) {
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(v)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1))};
}

template <typename T>
HK_INLINE Pair<T> Pair<T>::load(const T* p) {
  if constexpr (sizeof(T) == 4)
    return {Vec::load(p), Vec::load(p + 16)};
  else
    return unpacked(_mm512_loadu_si512(p), T{});
}
template <typename T>
HK_INLINE void Pair<T>::store(T* p) const {
  if constexpr (sizeof(T) == 4)
    store_lanes(p);
  else
    _mm512_storeu_si512(p, packed(*this));
}
template <typename T>
HK_INLINE void Pair<T>::stream(T* p) const {
  if constexpr (sizeof(T) == 4) {
    _mm512_stream_ps(p, a.v);
    _mm512_stream_ps(p + 16, b.v);
  } else {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), packed(*this));
  }
}
template <typename T>
HK_INLINE Pair<T> Pair<T>::rounded() const {
  if constexpr (sizeof(T) == 4) {
    return *this;
  } else if constexpr (kEvenOdd<T>) {
    const auto round = [](const Vec& x) {
      return Vec(_mm512_castsi512_ps(_mm512_and_si512(bf16_in_high_half(x), high_halves())));
    };
    return {round(a), round(b)};
  } else {
    return unpacked(packed(*this), T{});
  }
}
HK_INLINE void end_of_streams() { _mm_sfence(); }

#elif defined(HK_VEC_AVX2)

HK_INLINE __m256i bf16_in_high_half(__m256 x) {  // the low half is what was cut off
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
HK_INLINE __m256i packed(__m256 even, __m256 odd, bf16) {
  return _mm256_blend_epi16(_mm256_srli_epi32(bf16_in_high_half(even), 16), bf16_in_high_half(odd), 0xaa);
}
HK_INLINE __m256i packed(__m256 first, __m256 second, fp16) {
  const __m128i low = _mm256_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT);
  return _mm256_set_m128i(_mm256_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT), low);
}
HK_INLINE __m256 cut_to_bf16(__m256i x) {
  return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// The 256 bits of half `i` are elements 16 i to 16 i + 15: of bf16 they fill half i of both vectors, of fp16 vector i.
template <typename T>
HK_INLINE Pair<T> Pair<T>::load(const T* p) {
  if constexpr (kEvenOdd<T>) {
    const __m256i v0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                  v1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
    return {Vec(_mm256_castsi256_ps(_mm256_slli_epi32(v0, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(v1, 16))),
            Vec(cut_to_bf16(v0), cut_to_bf16(v1))};
  } else {
    return {Vec::load(p), Vec::load(p + 16)};
  }
}
template <typename T>
HK_INLINE void Pair<T>::store(T* p) const {
  if constexpr (kEvenOdd<T>) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed(a.lo, b.lo, T{}));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), packed(a.hi, b.hi, T{}));
  } else {
    a.store(p);
    b.store(p + 16);
  }
}
template <typename T>
HK_INLINE void Pair<T>::stream(T* p) const {
  if constexpr (sizeof(T) == 4) {
    _mm256_stream_ps(p, a.lo);
    _mm256_stream_ps(p + 8, a.hi);
    _mm256_stream_ps(p + 16, b.lo);
    _mm256_stream_ps(p + 24, b.hi);
  } else if constexpr (kEvenOdd<T>) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), packed(a.lo, b.lo, T{}));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p + 16), packed(a.hi, b.hi, T{}));
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), packed(a.lo, a.hi, T{}));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p + 16), packed(b.lo, b.hi, T{}));
  }
}
template <typename T>
HK_INLINE Pair<T> Pair<T>::rounded() const {
  if constexpr (sizeof(T) == 4) {
    return *this;
  } else if constexpr (kEvenOdd<T>) {
    const auto round = [](const Vec& x) {
      return Vec(cut_to_bf16(bf16_in_high_half(x.lo)), cut_to_bf16(bf16_in_high_half(x.hi)));
    };
    return {round(a), round(b)};
  } else {
    T some[kSize];
    store(some);
    return load(some);
  }
}
HK_INLINE void end_of_streams() { _mm_sfence(); }

#else

template <typename T>
HK_INLINE Pair<T> Pair<T>::load(const T* p) {
  return {Vec::load(p), Vec::load(p + 16)};
}
template <typename T>
HK_INLINE void Pair<T>::store(T* p) const {
  a.store(p);
  b.store(p + 16);
}
template <typename T>
HK_INLINE void Pair<T>::stream(T* p) const {
  store(p);
}
template <typename T>
HK_INLINE Pair<T> Pair<T>::rounded() const {
  if constexpr (sizeof(T) == 4) {
    return *this;
  } else {
    T some[kSize];
    store(some);
    return load(some);
  }
}
HK_INLINE void end_of_streams() {}

#endif

// Calls full(i) for each whole Pair of [0, count) and tail(i, n) for what is left.
template <typename Full, typename Tail>
HK_INLINE void for_each_pair(int64_t count, const Full& full, const Tail& tail) {
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) full(i);
  if (i < count) tail(i, static_cast<int>(count - i));
}

// Asks for the cache lines of one Pair at p, which is read soon, in the second cache (tried the first: half as fast,
// rows push each other out). The processor looks ahead on its own, but not far enough while results stream out.
template <typename T>
HK_INLINE void prefetch_pair(const T* p) {
  __builtin_prefetch(p, 0, 2);
  if constexpr (sizeof(T) == 4) __builtin_prefetch(p + 16, 0, 2);
}

// Should results of so many bytes go past the caches? Above this size nobody finds them there anyway, and a store into
// a cache first reads the line from memory.
constexpr int64_t kStreamBytes = int64_t{16} << 20;
HK_INLINE bool is_line_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

}  // namespace herdkern::cpu::HK_ISA
