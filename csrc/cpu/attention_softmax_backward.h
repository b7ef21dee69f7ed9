// The softmax of an attention tile in the backward pass: scores become probabilities p, dp becomes dS. Tiles are
// (queries, keys), one row at a time.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/attention_backward_gemm.h"

namespace herdkern::cpu::HK_ISA {

struct SoftmaxGradient {
  float scale, softcap;  // softcap: 0 for none
};

// e^x. Where p is rounded to bf16 (kCoarse) to 3e-6: 2^r on |r| <= 1/2 by a polynomial of degree 4, half the work.
template <bool kCoarse>
HK_INLINE Vec weight(const Vec& x) {
  if constexpr (!kCoarse) return exp(x);
  const Vec y = max(Vec(-160.0f), x * Vec(1.44269504088896341f));
  const Vec n = round(y), r = y - n;
  Vec p = Vec(9.570091344e-3f);
  p = fma(p, r, Vec(5.591785949e-2f));
  p = fma(p, r, Vec(2.402474509e-1f));
  p = fma(p, r, Vec(6.931218149e-1f));
  return ldexp(fma(p, r, Vec(9.999992614e-1f)), n);
}

HK_INLINE void zero_outside(float* row, Span inner, Span outer) {
  if (inner.empty()) inner = {outer.end, outer.end};
  std::memset(row + outer.begin, 0, static_cast<size_t>(inner.begin - outer.begin) * sizeof(float));
  std::memset(row + inner.end, 0, static_cast<size_t>(outer.end - inner.end) * sizeof(float));
}

// scores -> p = exp(cap(scale * score) - lse) where the query sees the key (`seen`), 0 elsewhere in `span` (multiples
// of 16). slope: 1 - (cap / softcap)^2, the derivative of cap; written if there is a softcap.
template <bool kCoarse>
inline void probability_row(const SoftmaxGradient& s, float lse, Span seen, Span span, float* scores, float* slope) {
  const int64_t begin = round_down(seen.begin, 16);
  const Vec minus_lse(-lse);
  if (s.softcap == 0.0f) {
    const Vec factor(s.scale);
    for (int64_t j = begin; j < seen.end; j += 16)
      weight<kCoarse>(Vec::load(scores + j) * factor + minus_lse).store(scores + j);
  } else {
    const Vec factor(s.scale / s.softcap), cap(s.softcap);
    for (int64_t j = span.begin; j < span.end; j += 16) {
      const Vec t = tanh(Vec::load(scores + j) * factor);
      (Vec(1.0f) - t * t).store(slope + j);
      weight<kCoarse>(t * cap + minus_lse).store(scores + j);
    }
  }
  zero_outside(scores, seen, span);
}

// sum_j p * dp. Where p sums to 1 (no sink) the sum is divided by that of p: what lse is off by cancels.
inline float delta_of_row(const float* p, const float* dp, Span span, bool sums_to_one) {
  Vec delta(0.0f), total(0.0f);
  for (int64_t j = span.begin; j < span.end; j += 16) {
    const Vec weight = Vec::load(p + j);
    delta = fma(weight, Vec::load(dp + j), delta);
    total = total + weight;
  }
  const float weights = sum(total);
  return sums_to_one && weights > 0.5f ? sum(delta) / weights : sum(delta);
}

// Makes p sum to 1: of few keys, what lse is off by would show.
inline void normalize_row(float* p, Span span) {
  Vec total(0.0f);
  for (int64_t j = span.begin; j < span.end; j += 16) total = total + Vec::load(p + j);
  const float weights = sum(total);
  if (!(weights > 0.5f)) return;
  const Vec factor(1.0f / weights);
  for (int64_t j = span.begin; j < span.end; j += 16) (Vec::load(p + j) * factor).store(p + j);
}

// dS = scale * p * (dp - delta) * slope; slope may be null.
HK_INLINE Vec score_gradient(const Vec& p, const float* dp, const Vec& delta, const Vec& scale, const float* slope,
                             int64_t j) {
  const Vec ds = p * scale * (Vec::load(dp + j) - delta);
  return slope == nullptr ? ds : ds * Vec::load(slope + j);
}

inline void gradient_row(const float* p, float* dp, float delta, float scale, const float* slope, Span span) {
  const Vec all_delta(delta), all_scale(scale);
  for (int64_t j = span.begin; j < span.end; j += 16)
    score_gradient(Vec::load(p + j), dp, all_delta, all_scale, slope, j).store(dp + j);
}

// Two neighbouring queries, rows ld apart, as bf16: p and dS in pairs of queries, dS also as rows ds_ld apart.
template <bool kSlope>
void gradient_pair(const float* p, const float* dp, int64_t ld, const float* delta, float scale, const float* slope,
                   Span span, bf16* p_pairs, bf16* ds_pairs, bf16* ds_rows, int64_t ds_ld);

#ifdef HK_VEC_AVX512  // for sources that may use AVX512_BF16
template <bool kSlope>
void gradient_pair(const float* p, const float* dp, int64_t ld, const float* delta, float scale, const float* slope,
                   Span span, bf16* p_pairs, bf16* ds_pairs, bf16* ds_rows, int64_t ds_ld) {
  const Vec delta0(delta[0]), delta1(delta[1]), all_scale(scale);
  alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  const auto rounded = [](const Vec& low, const Vec& high) { return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v); };
  for (int64_t j = span.begin; j < span.end; j += 16) {
    const Vec p0 = Vec::load(p + j), p1 = Vec::load(p + ld + j);
    const Vec ds0 = score_gradient(p0, dp, delta0, all_scale, kSlope ? slope : nullptr, j);
    const Vec ds1 = score_gradient(p1, dp + ld, delta1, all_scale, kSlope ? slope + ld : nullptr, j);
    const __m512i both_p = rounded(p0, p1), both_ds = rounded(ds0, ds1);
    _mm512_storeu_si512(p_pairs + 2 * j, _mm512_permutexvar_epi16(interleave, both_p));
    _mm512_storeu_si512(ds_pairs + 2 * j, _mm512_permutexvar_epi16(interleave, both_ds));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_rows + j), _mm512_castsi512_si256(both_ds));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_rows + ds_ld + j), _mm512_extracti64x4_epi64(both_ds, 1));
  }
}
#endif

}  // namespace herdkern::cpu::HK_ISA
