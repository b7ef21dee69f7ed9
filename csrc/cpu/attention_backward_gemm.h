// The products of the backward pass: C (+)= A B in fp32 sums, where blocks of rows of C take part in a range of its
// columns or of the depth only, so that nothing is multiplied beyond the diagonal or the window.
//   A: row-major; or transposed, (depth / kPair, rows, kPair).
//   B: panels of kPanel columns, each (depth / kPair, kPanel, kPair): a panel stays in the first-level cache.
//   C: row-major.
// Tried 12 x 2 and 6 x 4 registers of sums: 4 to 7 % and 1 % slower than 8 x 2 on Zen 4.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/attention_tiles.h"
#include "cpu/attention_gemm.h"

namespace herdkern::cpu::HK_ISA {

#if defined(HK_VEC_AVX512)
constexpr int kGradRows = 8, kGradVecs = 2;
#elif defined(HK_VEC_AVX2)
constexpr int kGradRows = 6, kGradVecs = 1;
#else
constexpr int kGradRows = 2, kGradVecs = 1;
#endif

template <typename Elem>
struct GradMath;

template <>
struct GradMath<float> : FloatMath {};

#ifdef HK_VEC_AVX512
template <>
struct GradMath<bf16> : DotMath {};
#endif

// Steps in which an engine cuts: an engine with a row step multiplies whole tiles only.
template <typename Engine>
struct Grain {
  static constexpr bool kTiles = Engine::kRowStep > 1;
  static constexpr int64_t kPair = Engine::kPair;
  static constexpr int64_t kRows = kTiles ? 32 : kGradRows;           // a block of rows
  static constexpr int64_t kCols = kTiles ? 32 : 16;                  // ranges of columns
  static constexpr int64_t kDepth = kTiles ? 32 : kPair;              // ranges of the depth
  static constexpr int64_t kPanel = kTiles ? 32 : 16 * kGradVecs;     // columns of a panel of B
  static constexpr int64_t kDepthBlock = 128 * (kTiles ? 4 : kPair);  // a longer depth is cut
};

struct Span {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

inline Span intersect(Span a, Span b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

// C is added last, not taken as the start: sums of partial sums lose fewer digits.
template <typename Elem, int kRows, int kVecs, bool kTransposedA, bool kAccumulate>
HK_INLINE void grad_tile(const Elem* a, int64_t a_stride, const Elem* b, int64_t steps, float* c, int64_t ldc) {
  using Math = GradMath<Elem>;
  constexpr int kPair = Math::kPair;
  Vec sums[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) sums[i][j] = Vec(0.0f);
  for (int64_t k = 0; k < steps; ++k, b += 16 * kGradVecs * kPair) {
    Vec right[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) right[j] = Math::load(b + 16 * j * kPair);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec left = Math::broadcast(kTransposedA ? a + k * a_stride + i * kPair : a + i * a_stride + k * kPair);
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) sums[i][j] = Math::multiply_add(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) {
      float* at = c + i * ldc + 16 * j;
      (kAccumulate ? Vec::load(at) + sums[i][j] : sums[i][j]).store(at);
    }
}

// A block of at most kGradRows rows.
template <typename Elem, int kVecs, bool kTransposedA, bool kAccumulate>
__attribute__((noinline)) void grad_rows(int64_t rows, const Elem* a, int64_t a_stride, const Elem* b, int64_t steps,
                                         float* c, int64_t ldc) {
  if (rows == kGradRows)
    return grad_tile<Elem, kGradRows, kVecs, kTransposedA, kAccumulate>(a, a_stride, b, steps, c, ldc);
  const int64_t a_row = kTransposedA ? int64_t{GradMath<Elem>::kPair} : a_stride;
  if constexpr (kGradRows > 4) {
    if ((rows & 4) != 0) {
      grad_tile<Elem, 4, kVecs, kTransposedA, kAccumulate>(a, a_stride, b, steps, c, ldc);
      a += 4 * a_row;
      c += 4 * ldc;
    }
  }
  if constexpr (kGradRows > 2) {
    if ((rows & 2) != 0) {
      grad_tile<Elem, 2, kVecs, kTransposedA, kAccumulate>(a, a_stride, b, steps, c, ldc);
      a += 2 * a_row;
      c += 2 * ldc;
    }
  }
  if ((rows & 1) != 0) grad_tile<Elem, 1, kVecs, kTransposedA, kAccumulate>(a, a_stride, b, steps, c, ldc);
}

// One block of rows, columns [begin, end) of one panel of B; begin and end count from the panel's first column.
template <typename Engine, bool kTransposedA, bool kAccumulate>
HK_INLINE void grad_block(int64_t rows, const typename Engine::Elem* a, int64_t a_stride,
                          const typename Engine::Elem* b, int64_t depth, Span cols, float* c, int64_t ldc) {
  using Elem = typename Engine::Elem;
  constexpr int64_t kPair = Engine::kPair;
  if constexpr (Grain<Engine>::kTiles) {
    static_assert(!kTransposedA);
    Engine::template gemm<kAccumulate>({32, 32, depth, a, a_stride, b, 32 * kPair, c, ldc});
  } else {
    b += cols.begin * kPair;
    c += cols.begin;
    const int64_t steps = depth / kPair;
    if (kGradVecs == 1 || cols.end - cols.begin == 16) {
      grad_rows<Elem, 1, kTransposedA, kAccumulate>(rows, a, a_stride, b, steps, c, ldc);
    } else {
      grad_rows<Elem, kGradVecs, kTransposedA, kAccumulate>(rows, a, a_stride, b, steps, c, ldc);
    }
  }
}

// C = A B, rows of block i in columns seen[i] only (multiples of kCols). A is row-major; panel_stride is in elements.
// The depth is cut as in the forward pass (vector_gemm): a score that differs from the one in lse is an error of p.
template <typename Engine>
void score_product(const typename Engine::Elem* a, int64_t lda, int64_t rows, const typename Engine::Elem* b,
                   int64_t panel_stride, int64_t depth, float* c, int64_t ldc, const Span* seen) {
  using G = Grain<Engine>;
  const int64_t blocks = ceil_div(rows, G::kRows);
  Span all{INT64_MAX, 0};
  for (int64_t i = 0; i < blocks; ++i)
    if (!seen[i].empty()) all = {std::min(all.begin, seen[i].begin), std::max(all.end, seen[i].end)};
  constexpr int64_t kBlock = G::kTiles ? G::kDepthBlock : kPanelDepthBlock;
  for (int64_t d = 0; d < depth; d += kBlock) {
    const int64_t part = std::min(kBlock, depth - d);
    for (int64_t col = all.empty() ? all.end : round_down(all.begin, G::kPanel); col < all.end; col += G::kPanel) {
      const auto* panel = b + col / G::kPanel * panel_stride + d * G::kPanel;
      for (int64_t i = 0; i < blocks; ++i) {
        const Span cols = intersect({seen[i].begin - col, seen[i].end - col}, {0, G::kPanel});
        if (cols.empty()) continue;
        const int64_t row = i * G::kRows, n = std::min(G::kRows, rows - row);
        if (d == 0) {
          grad_block<Engine, false, false>(n, a + row * lda, lda, panel, part, cols, c + row * ldc + col, ldc);
        } else {
          grad_block<Engine, false, true>(n, a + row * lda + d, lda, panel, part, cols, c + row * ldc + col, ldc);
        }
      }
    }
  }
}

// C (+)= A B in all columns (a multiple of kCols), rows of block i over the depths of used[i] only (multiples of
// kDepth).
template <typename Engine, bool kTransposedA>
void gradient_product(const typename Engine::Elem* a, int64_t a_stride, int64_t rows, const typename Engine::Elem* b,
                      int64_t panel_stride, int64_t cols, float* c, int64_t ldc, const Span* used, bool accumulate) {
  using G = Grain<Engine>;
  const int64_t blocks = ceil_div(rows, G::kRows);
  Span all{INT64_MAX, 0};
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t row = i * G::kRows, end = std::min(row + G::kRows, rows);
    if (!used[i].empty()) {
      all = {std::min(all.begin, used[i].begin), std::max(all.end, used[i].end)};
    } else if (!accumulate) {
      for (int64_t r = row; r < end; ++r) std::fill_n(c + r * ldc, cols, 0.0f);
    }
  }
  for (int64_t d = all.begin; d < all.end; d += G::kDepthBlock)
    for (int64_t col = 0; col < cols; col += G::kPanel) {
      const Span width{0, std::min(G::kPanel, cols - col)};
      const auto* panel = b + col / G::kPanel * panel_stride;
      for (int64_t i = 0; i < blocks; ++i) {
        const Span depth = intersect(used[i], {d, d + G::kDepthBlock});
        if (depth.empty()) continue;
        const int64_t row = i * G::kRows, n = std::min(G::kRows, rows - row), length = depth.end - depth.begin;
        const auto* left =
            kTransposedA ? a + depth.begin / G::kPair * a_stride + row * G::kPair : a + row * a_stride + depth.begin;
        const auto* right = panel + depth.begin * G::kPanel;
        float* at = c + row * ldc + col;
        if (accumulate || depth.begin > used[i].begin) {
          grad_block<Engine, kTransposedA, true>(n, left, a_stride, right, length, width, at, ldc);
        } else {
          grad_block<Engine, kTransposedA, false>(n, left, a_stride, right, length, width, at, ldc);
        }
      }
    }
}

}  // namespace herdkern::cpu::HK_ISA
