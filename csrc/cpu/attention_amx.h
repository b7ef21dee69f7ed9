// bf16 products for attention on the AMX tile unit: tdpbf16ps multiplies 16 x 32 by 32 x 16 into a 16 x 16 fp32 tile.
// Four accumulator tiles (32 x 32 of C), two of A and two of B use all eight registers: each load feeds two products.
#pragma once
#include <cstring>

#include "cpu/amx_session.h"
#include "cpu/attention_dot.h"

namespace herdkern::cpu::HK_ISA {

// C (32 x 32) (+)= A (32 x depth) B.
template <bool kAccumulate>
inline void amx_block(const Gemm<bf16>& g, int64_t row, int64_t col) {
  const bf16 *a0 = g.a + row * g.lda, *a1 = a0 + 16 * g.lda, *b = g.b + col * 2;
  float *c0 = g.c + row * g.ldc + col, *c1 = c0 + 16 * g.ldc;
  const int64_t a_bytes = g.lda * 2, b_bytes = g.ldb * 2, c_bytes = g.ldc * 4;
  if constexpr (kAccumulate) {
    _tile_loadd(0, c0, c_bytes);
    _tile_loadd(1, c0 + 16, c_bytes);
    _tile_loadd(2, c1, c_bytes);
    _tile_loadd(3, c1 + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < g.depth; k += 32, b += 16 * g.ldb) {
    _tile_loadd(4, a0 + k, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(7, b + 32, b_bytes);
    _tile_loadd(5, a1 + k, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c0, c_bytes);
  _tile_stored(1, c0 + 16, c_bytes);
  _tile_stored(2, c1, c_bytes);
  _tile_stored(3, c1 + 16, c_bytes);
}

// rows, cols and depth are multiples of 32.
struct AmxEngine {
  using Elem = bf16;
  static constexpr int kPair = 2;
  static constexpr int64_t kDimStep = 32, kRowStep = 32;
  static constexpr int64_t kForwardKeys = 256;
  using Session = AmxSession;

  template <bool kAccumulate, bool kTransposedA = false>
  static void gemm(const Gemm<bf16>& g) {
    static_assert(!kTransposedA, "a tile of A is read by rows");
    for (int64_t col = 0; col < g.cols; col += 32)
      for (int64_t row = 0; row < g.rows; row += 32) amx_block<kAccumulate>(g, row, col);
  }
  static HK_INLINE void store(bf16* p, const Vec& x) { DotEngine::store(p, x); }
  static HK_INLINE void store_pairs(bf16* p, const Vec& even, const Vec& odd) { DotEngine::store_pairs(p, even, odd); }
};

}  // namespace herdkern::cpu::HK_ISA
