// The matrix products inside an attention tile: C (+)= A B on operands that lie in cache, in 32-bit accumulators.
//   A: (rows, depth) row-major, leading dimension lda; or transposed like B: (depth / kPair, rows, kPair).
//   B: (depth / kPair, cols, kPair), rows ldb apart: kPair neighbours in depth lie side by side.
//   C: (rows, cols) fp32 row-major.
// An engine is a way to multiply: FloatEngine anywhere; for bf16 those of attention_dot.h and attention_amx.h.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace herdkern::cpu::HK_ISA {

template <typename Elem>
struct Gemm {
  int64_t rows, cols, depth;
  const Elem* a;
  int64_t lda;
  const Elem* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
};

// Registers of one micro-tile: as many accumulators as fit beside a row of B and one broadcast element of A.
#if defined(HK_VEC_AVX512)
constexpr int kMicroRows = 8, kMicroVecs = 2;
#elif defined(HK_VEC_AVX2)
constexpr int kMicroRows = 6, kMicroVecs = 1;
#else
constexpr int kMicroRows = 2, kMicroVecs = 1;
#endif

// C is added last, not taken as the start, and a long depth is cut (vector_gemm): sums of partial sums lose fewer
// digits.
template <typename Math, int kRows, int kVecs, bool kAccumulate, bool kTransposedA>
HK_INLINE void micro_tile(const Gemm<typename Math::Elem>& g, int64_t row, int64_t col) {
  const auto* a = g.a + row * (kTransposedA ? Math::kPair : g.lda);
  const auto* b = g.b + col * Math::kPair;
  float* c = g.c + row * g.ldc + col;
  Vec sums[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) sums[i][j] = Vec(0.0f);
  for (int64_t k = 0; k < g.depth; k += Math::kPair, b += g.ldb) {
    Vec right[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) right[j] = Math::load(b + 16 * j * Math::kPair);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec left = Math::broadcast(kTransposedA ? a + i * Math::kPair : a + i * g.lda + k);
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) sums[i][j] = Math::multiply_add(left, right[j], sums[i][j]);
    }
    if constexpr (kTransposedA) a += g.lda;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) {
      float* at = c + i * g.ldc + 16 * j;
      (kAccumulate ? Vec::load(at) + sums[i][j] : sums[i][j]).store(at);
    }
}

// All rows of one panel of 16 * kVecs columns: the panel of B stays in the first-level cache. Eight rows are two tiles
// of four where six fit: one of two would run at half the rate.
template <typename Math, int kVecs, bool kAccumulate, bool kTransposedA>
inline void gemm_panel(const Gemm<typename Math::Elem>& g, int64_t col) {
  int64_t row = 0;
  for (; row + kMicroRows <= g.rows && !(kMicroRows == 6 && g.rows - row == 8); row += kMicroRows)
    micro_tile<Math, kMicroRows, kVecs, kAccumulate, kTransposedA>(g, row, col);
  if constexpr (kMicroRows > 4)
    for (; row + 4 <= g.rows; row += 4) micro_tile<Math, 4, kVecs, kAccumulate, kTransposedA>(g, row, col);
  if constexpr (kMicroRows > 2) {
    if (row + 2 <= g.rows) {
      micro_tile<Math, 2, kVecs, kAccumulate, kTransposedA>(g, row, col);
      row += 2;
    }
  }
  if (row < g.rows) micro_tile<Math, 1, kVecs, kAccumulate, kTransposedA>(g, row, col);
}

// How much of the depth a product takes at once. A panel packed on its own fills the first-level cache evenly, so twice
// as much of it stays there (x1.02 fp32, x1.06 bf16; at AVX2, where a panel takes two passes, x0.97).
constexpr int64_t kPanel = 32, kDepthBlock = 64, kPanelDepthBlock = kMicroVecs > 1 ? 128 : 64;

// cols: a multiple of 16.  depth: a multiple of kPair.
template <typename Math, bool kAccumulate, bool kTransposedA = false>
inline void vector_gemm(const Gemm<typename Math::Elem>& g) {
  const int64_t block = g.ldb <= kPanel * Math::kPair ? kPanelDepthBlock : kDepthBlock;
  if (g.depth > block) {
    auto head = g, tail = g;
    head.depth = block;
    tail.depth -= block;
    tail.a += kTransposedA ? block / Math::kPair * g.lda : block;
    tail.b += block / Math::kPair * g.ldb;
    vector_gemm<Math, kAccumulate, kTransposedA>(head);
    return vector_gemm<Math, true, kTransposedA>(tail);
  }
  int64_t col = 0;
  for (; col + 16 * kMicroVecs <= g.cols; col += 16 * kMicroVecs)
    gemm_panel<Math, kMicroVecs, kAccumulate, kTransposedA>(g, col);
  if constexpr (kMicroVecs > 1) {
    if (col < g.cols) gemm_panel<Math, 1, kAccumulate, kTransposedA>(g, col);
  }
}

struct FloatMath {
  using Elem = float;
  static constexpr int kPair = 1;
  static HK_INLINE Vec load(const float* p) { return Vec::load(p); }
  static HK_INLINE Vec broadcast(const float* p) { return Vec(*p); }
  static HK_INLINE Vec multiply_add(const Vec& a, const Vec& b, const Vec& c) { return fma(a, b, c); }
};

#if defined(HK_VEC_AVX512)
// bf16 by vdpbf16ps: 32 products an instruction. Only for sources that may use AVX512_BF16.
struct DotMath {
  using Elem = bf16;
  static constexpr int kPair = 2;
  static HK_INLINE Vec load(const bf16* p) { return _mm512_loadu_ps(p); }
  static HK_INLINE Vec broadcast(const bf16* p) {  // two neighbours in depth
    float pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm512_set1_ps(pair);
  }
  static HK_INLINE Vec multiply_add(const Vec& a, const Vec& b, const Vec& c) {
    return _mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v);
  }
};
#endif

// fp32 products at every level; bf16 storage is widened when a tile is loaded.
struct FloatEngine {
  using Elem = float;
  static constexpr int kPair = 1;
  static constexpr int64_t kDimStep = 16;       // head_dim is padded to a multiple
  static constexpr int64_t kRowStep = 1;        // and the rows of A
  static constexpr int64_t kForwardKeys = 128;  // keys of a block of the forward pass
  struct Session {};                            // what a thread must hold while it multiplies: nothing

  template <bool kAccumulate, bool kTransposedA = false>
  static void gemm(const Gemm<float>& g) {
    vector_gemm<FloatMath, kAccumulate, kTransposedA>(g);
  }
  static HK_INLINE void store(float* p, const Vec& x) { x.store(p); }
};

}  // namespace herdkern::cpu::HK_ISA
