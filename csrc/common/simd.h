// Vec: 16 floats at once, the one vector type of the CPU kernels, and bf16 and fp16, the 16-bit storage types.
// One register at AVX-512, two at AVX2, four 4-float vectors of the compiler anywhere else. The kernels are written
// once against it; setup.py compiles them per level with HK_ISA and HK_ISA_<LEVEL>. Loads and stores are unaligned; the
// _partial ones touch only the first n lanes (0 <= n <= 16, other lanes read as zero). Both round to nearest even.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(HK_ISA_AVX512) || defined(HK_ISA_AMX)
#define HK_VEC_AVX512 1
#elif defined(HK_ISA_AVX2)
#define HK_VEC_AVX2 1
#endif
#if defined(HK_VEC_AVX512) || defined(HK_VEC_AVX2)
#include <immintrin.h>
#endif

#ifndef HK_ISA
#error "simd.h belongs in a kernel source, which setup.py compiles once per level"
#endif
#define HK_INLINE inline __attribute__((always_inline))
#define HK_RESTRICT __restrict__

namespace herdkern::cpu {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

namespace HK_ISA {

HK_INLINE float to_float(float x) { return x; }
HK_INLINE float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

HK_INLINE float to_float(fp16 x) {  // by an exact product: the exponent moves from bias 15 to 127, subnormals included
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13,
                 sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  float value;
  std::memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((x.bits & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;  // infinity or NaN
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// NaN keeps its sign and top bits and stays a NaN; everything else rounds to nearest, ties to even.
template <typename T>
HK_INLINE T from_float(float x);
template <>
HK_INLINE float from_float<float>(float x) {
  return x;
}
template <>
HK_INLINE bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
HK_INLINE fp16 from_float<fp16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu))};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above round to infinity
  uint32_t half;
  if (magnitude <
      0x38800000u) {  // below 2^-14, subnormal: adding 0.5 rounds at 2^-24 and leaves the bits at the bottom
    float value;
    std::memcpy(&value, &magnitude, sizeof value);
    value += 0.5f;
    std::memcpy(&half, &value, sizeof half);
    half -= 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

#if defined(HK_VEC_AVX512)

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
  Vec() = default;
  HK_INLINE Vec(__m512 x) : v(x) {}
  HK_INLINE explicit Vec(float x) : v(_mm512_set1_ps(x)) {}

  static HK_INLINE __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static HK_INLINE __m512 widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static HK_INLINE __m256i narrow(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i nan = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), is_nan, nan));
  }

  static HK_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static HK_INLINE Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static HK_INLINE Vec load(const fp16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static HK_INLINE Vec load_partial(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static HK_INLINE Vec load_partial(const fp16* p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p));
  }
  static HK_INLINE Vec load_partial(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(mask(n), p)); }
  HK_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  HK_INLINE void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
  HK_INLINE void store(fp16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  HK_INLINE void store_partial(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  HK_INLINE void store_partial(fp16* p, int n) const {
    _mm256_mask_storeu_epi16(p, mask(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  HK_INLINE void store_partial(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, mask(n), narrow(v)); }
};

HK_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
HK_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
HK_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
HK_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
HK_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
HK_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
HK_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
HK_INLINE Vec round(Vec a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
HK_INLINE Vec ldexp(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }
HK_INLINE Vec times_power(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }
HK_INLINE Vec swap_pairs(Vec a) { return _mm512_permute_ps(a.v, 0xb1); }
HK_INLINE Vec select_less(Vec a, Vec b, Vec less, Vec other) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), other.v, less.v);
}

#elif defined(HK_VEC_AVX2)

struct Vec {
  static constexpr int kLanes = 16;
  __m256 lo, hi;
  Vec() = default;
  HK_INLINE Vec(__m256 low, __m256 high) : lo(low), hi(high) {}
  HK_INLINE explicit Vec(float x) : lo(_mm256_set1_ps(x)), hi(lo) {}

  static HK_INLINE __m256i mask(int n) {  // lanes below n are all ones; n may lie outside 0..8
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static HK_INLINE __m256 widen(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static HK_INLINE __m256i round_bits(__m256 x) {  // bf16 bits in the low half of each lane
    const __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), nan, is_nan);
  }

  static HK_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static HK_INLINE Vec load(const bf16* p) {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    return {widen(_mm_loadu_si128(q)), widen(_mm_loadu_si128(q + 1))};
  }
  static HK_INLINE Vec load_partial(const float* p, int n) {
    return {_mm256_maskload_ps(p, mask(n)), _mm256_maskload_ps(p + 8, mask(n - 8))};
  }
  static HK_INLINE Vec load(const fp16* p) {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
  }
  template <typename T>
  static HK_INLINE Vec load_partial(const T* p, int n) {  // bf16 and fp16
    T lanes[16] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
    return load(lanes);
  }
  HK_INLINE void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  HK_INLINE void store(bf16* p) const {
    const __m256i packed = _mm256_packus_epi32(round_bits(lo), round_bits(hi));  // per 128-bit half: lo hi lo hi
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }
  HK_INLINE void store(fp16* p) const {
    auto* q = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(q, _mm256_cvtps_ph(lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(q + 1, _mm256_cvtps_ph(hi, _MM_FROUND_TO_NEAREST_INT));
  }
  HK_INLINE void store_partial(float* p, int n) const {
    _mm256_maskstore_ps(p, mask(n), lo);
    _mm256_maskstore_ps(p + 8, mask(n - 8), hi);
  }
  template <typename T>
  HK_INLINE void store_partial(T* p, int n) const {
    T lanes[16];
    store(lanes);
    std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
  }
};

HK_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
HK_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
HK_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
HK_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
HK_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
HK_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
HK_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
HK_INLINE Vec round(Vec a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}
HK_INLINE __m256 power_of_two(__m256i n) {  // 2^n for -127 < n < 128, 0 for n = -127
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
HK_INLINE __m256 ldexp(__m256 a, __m256 n) {  // in two halves, so that denormal results and overflow come out right
  const __m256i exponent = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(exponent, 1);
  return _mm256_mul_ps(_mm256_mul_ps(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(exponent, half)));
}
HK_INLINE Vec ldexp(Vec a, Vec n) { return {ldexp(a.lo, n.lo), ldexp(a.hi, n.hi)}; }
HK_INLINE Vec times_power(Vec a, Vec n) {
  return {_mm256_mul_ps(a.lo, power_of_two(_mm256_cvtps_epi32(n.lo))),
          _mm256_mul_ps(a.hi, power_of_two(_mm256_cvtps_epi32(n.hi)))};
}
HK_INLINE Vec swap_pairs(Vec a) { return {_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1)}; }
HK_INLINE Vec select_less(Vec a, Vec b, Vec less, Vec other) {
  return {_mm256_blendv_ps(other.lo, less.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(other.hi, less.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}

#else  // four 4-float vectors of the compiler: SSE2, NEON or whatever the target has

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

HK_INLINE Float4 splat4(float x) { return Float4{x, x, x, x}; }

#define HK_EACH_QUARTER(expression)                     \
  Vec result;                                           \
  for (int i = 0; i < 4; ++i) result.q[i] = expression; \
  return result

struct Vec {
  static constexpr int kLanes = 16;
  Float4 q[4];
  Vec() = default;
  HK_INLINE explicit Vec(float x) : q{splat4(x), splat4(x), splat4(x), splat4(x)} {}

  static HK_INLINE Vec load(const float* p) {
    Vec result;
    std::memcpy(result.q, p, sizeof result.q);
    return result;
  }
  template <typename T>
  static HK_INLINE Vec load(const T* p) {  // bf16 and fp16
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = to_float(p[i]);
    return load(lanes);
  }
  template <typename T>
  static HK_INLINE Vec load_partial(const T* p, int n) {
    T lanes[16] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
    return load(lanes);
  }
  HK_INLINE void store(float* p) const { std::memcpy(p, q, sizeof q); }
  template <typename T>
  HK_INLINE void store(T* p) const {  // bf16 and fp16
    float lanes[16];
    store(lanes);
    for (int i = 0; i < 16; ++i) p[i] = from_float<T>(lanes[i]);
  }
  template <typename T>
  HK_INLINE void store_partial(T* p, int n) const {
    T lanes[16];
    store(lanes);
    std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
  }
};

HK_INLINE Vec operator+(const Vec& a, const Vec& b) { HK_EACH_QUARTER(a.q[i] + b.q[i]); }
HK_INLINE Vec operator-(const Vec& a, const Vec& b) { HK_EACH_QUARTER(a.q[i] - b.q[i]); }
HK_INLINE Vec operator*(const Vec& a, const Vec& b) { HK_EACH_QUARTER(a.q[i] * b.q[i]); }
HK_INLINE Vec operator/(const Vec& a, const Vec& b) { HK_EACH_QUARTER(a.q[i] / b.q[i]); }
HK_INLINE Vec fma(const Vec& a, const Vec& b, const Vec& c) { HK_EACH_QUARTER(a.q[i] * b.q[i] + c.q[i]); }
HK_INLINE Vec max(const Vec& a, const Vec& b) { HK_EACH_QUARTER(a.q[i] > b.q[i] ? a.q[i] : b.q[i]); }
HK_INLINE Vec min(const Vec& a, const Vec& b) { HK_EACH_QUARTER(a.q[i] < b.q[i] ? a.q[i] : b.q[i]); }
HK_INLINE Vec round(const Vec& a) {  // |a| < 2^22: adding 1.5 * 2^23 leaves the nearest integer in the low bits
  HK_EACH_QUARTER((a.q[i] + splat4(12582912.0f)) - splat4(12582912.0f));
}
HK_INLINE Float4 power_of_two(Int4 n) {  // 2^n for -127 < n < 128, 0 for n = -127
  const Int4 bits = (n + 127) << 23;
  Float4 value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
HK_INLINE Float4 ldexp(Float4 a, Float4 n) {  // in two halves, so that denormal results and overflow come out right
  const Int4 exponent = __builtin_convertvector(n, Int4), half = exponent >> 1;
  return a * power_of_two(half) * power_of_two(exponent - half);
}
HK_INLINE Vec ldexp(const Vec& a, const Vec& n) { HK_EACH_QUARTER(ldexp(a.q[i], n.q[i])); }
HK_INLINE Vec times_power(const Vec& a, const Vec& n) {
  HK_EACH_QUARTER(a.q[i] * power_of_two(__builtin_convertvector(n.q[i], Int4)));
}
HK_INLINE Vec swap_pairs(const Vec& a) { HK_EACH_QUARTER((Float4{a.q[i][1], a.q[i][0], a.q[i][3], a.q[i][2]})); }
HK_INLINE Vec select_less(const Vec& a, const Vec& b, const Vec& less, const Vec& other) {
  HK_EACH_QUARTER(a.q[i] < b.q[i] ? less.q[i] : other.q[i]);
}

#undef HK_EACH_QUARTER
#endif

// max and min return b where either argument is NaN. round expects |a| < 2^22. swap_pairs exchanges lanes 2i and 2i
// + 1. times_power is ldexp for integers -126 <= n <= 127; n = -127 gives 0 or a denormal. select_less(a, b, less,
// other): `less` where a < b, else `other` (NaN included).

// Calls step(lane_count) with 16 for each full vector of [0, count) and once with what is left; step gets the offset
// too.
template <typename Full, typename Tail>
HK_INLINE void for_each_vec(int64_t count, const Full& full, const Tail& tail) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) full(i);
  if (i < count) tail(i, static_cast<int>(count - i));
}

// Sum and maximum over the 16 lanes, halves folded onto each other: the same order at every level. max_lane expects no
// NaN.
#if defined(HK_VEC_AVX512) || defined(HK_VEC_AVX2)
template <typename Fold>
HK_INLINE float fold_lanes(const Vec& a, const Fold& fold) {
#if defined(HK_VEC_AVX512)
  const __m256 low = _mm512_castps512_ps256(a.v), high = _mm512_extractf32x8_ps(a.v, 1);
#else
  const __m256 low = a.lo, high = a.hi;
#endif
  const __m256 eight = fold(low, high);
  const __m256 four = fold(eight, _mm256_permute2f128_ps(eight, eight, 1));
  const __m256 two = fold(four, _mm256_permute_ps(four, 0x4e));
  return _mm256_cvtss_f32(fold(two, _mm256_permute_ps(two, 0xb1)));
}
HK_INLINE float sum(const Vec& a) {
  return fold_lanes(a, [](__m256 x, __m256 y) { return _mm256_add_ps(x, y); });
}
HK_INLINE float max_lane(const Vec& a) {
  return fold_lanes(a, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); });
}
#else
HK_INLINE float sum(const Vec& a) {
  float lanes[16];
  a.store(lanes);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
HK_INLINE float max_lane(const Vec& a) {
  float lanes[16];
  a.store(lanes);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i + width] > lanes[i] ? lanes[i + width] : lanes[i];
  return lanes[0];
}
#endif

// e^x to about 1 ulp over the whole range: 0 below -104, infinity above 88.73, NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 in two parts, Cody & Waite), then the degree-6 polynomial of Cephes expf.
HK_INLINE Vec exp(const Vec& x) {
  const Vec clamped = min(Vec(89.0f), max(Vec(-104.0f), x));
  const Vec n = round(clamped * Vec(1.44269504088896341f));
  const Vec r = fma(n, Vec(2.12194440e-4f), fma(n, Vec(-0.693359375f), clamped));
  Vec p = Vec(1.9875691500e-4f);
  p = fma(p, r, Vec(1.3981999507e-3f));
  p = fma(p, r, Vec(8.3334519073e-3f));
  p = fma(p, r, Vec(4.1665795894e-2f));
  p = fma(p, r, Vec(1.6666665459e-1f));
  p = fma(p, r, Vec(5.0000001201e-1f));
  return ldexp(fma(p, r * r, r) + Vec(1.0f), n);
}

// 2^x to 1 ulp for x < 127: 0 below -126.5 (a denormal result may be 0), NaN for NaN. Takes half the time of exp.
// The degree-6 polynomial has a relative error of 2e-9, fitted on |r| <= 1/2.
HK_INLINE Vec exp2(const Vec& x) {
#if defined(HK_VEC_AVX512)
  const Vec clamped = max(Vec(-200.0f), x);
#else
  const Vec clamped = max(Vec(-127.0f), x);
#endif
  const Vec n = round(clamped), r = clamped - n;
  Vec p = Vec(1.5353361817e-4f);
  p = fma(p, r, Vec(1.3398874446e-3f));
  p = fma(p, r, Vec(9.6184373583e-3f));
  p = fma(p, r, Vec(5.5503324710e-2f));
  p = fma(p, r, Vec(2.4022647914e-1f));
  p = fma(p, r, Vec(6.9314720286e-1f));
  return times_power(fma(p, r, Vec(1.0f)), n);
}

// tanh x to 1.4 ulp: the odd polynomial of Cephes tanhf below 0.625, 1 - 2 / (e^2x + 1) above it.
HK_INLINE Vec tanh(const Vec& x) {
  const Vec square = x * x;
  Vec p = Vec(-5.70498872745e-3f);
  p = fma(p, square, Vec(2.06390887954e-2f));
  p = fma(p, square, Vec(-5.37397155531e-2f));
  p = fma(p, square, Vec(1.33314422036e-1f));
  p = fma(p, square, Vec(-3.33332819422e-1f));
  const Vec small = fma(p * square, x, x);
  const Vec large = Vec(1.0f) - Vec(2.0f) / (exp(x + x) + Vec(1.0f));
  return select_less(square, Vec(0.625f * 0.625f), small, large);
}

// 1 / x to 1 ulp for 1 <= x <= 2^126.
HK_INLINE Vec reciprocal(const Vec& x) {
#if defined(HK_VEC_AVX512)  // a division takes as long as ten other operations
  const Vec guess = _mm512_rcp14_ps(x.v);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(x.v, guess.v, _mm512_set1_ps(1.0f)), guess.v, guess.v);
#else
  return Vec(1.0f) / x;
#endif
}

}  // namespace HK_ISA
}  // namespace herdkern::cpu
