// bf16 products for attention by vdpbf16ps (AVX512_BF16): 32 products a instruction, twice the rate of fp32.
// Included only where the compiler may use that instruction (attention_bf16.cpp).
#pragma once
#include <cstring>

#include "cpu/attention_gemm.h"

namespace herdkern::cpu::HK_ISA {

struct DotEngine {
  using Elem = bf16;
  static constexpr int kPair = 2;
  static constexpr int64_t kDimStep = 32, kRowStep = 1;
  static constexpr int64_t kForwardKeys = 128;
  struct Session {};

  template <bool kAccumulate, bool kTransposedA = false>
  static void gemm(const Gemm<bf16>& g) {
    vector_gemm<DotMath, kAccumulate, kTransposedA>(g);
  }
  static HK_INLINE void store(bf16* p, const Vec& x) {
    const auto rounded = _mm512_cvtneps_pbh(x.v);
    std::memcpy(p, &rounded, sizeof rounded);
  }
  static HK_INLINE void store_pairs(bf16* p, const Vec& even, const Vec& odd) {  // 16 pairs (even, odd)
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v)));
  }
};

}  // namespace herdkern::cpu::HK_ISA
