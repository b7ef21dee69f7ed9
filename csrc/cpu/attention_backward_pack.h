// Operands B of the backward products: strided rows of a tensor, zero-padded, in panels of Grain::kPanel columns.
// Zero padding matters: a NaN in a neighbouring document must not reach a product by way of 0 * NaN.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/attention_backward_gemm.h"
#include "cpu/attention_pack.h"

namespace herdkern::cpu::HK_ISA {

// Columns are the head dimension and the depth is the rows: panel (row / kPair, kPanel, kPair). Columns are padded to
// kCols, rows to `padded_rows`, a multiple of kDepth.
template <typename Engine, typename In>
void pack_rows(const In* src, int64_t stride, int64_t rows, int64_t dim, int64_t padded_rows,
               typename Engine::Elem* dst, int64_t panel_stride) {
  using Elem = typename Engine::Elem;
  using G = Grain<Engine>;
  const int64_t cols = round_up(dim, G::kCols);
  for (int64_t r = 0; r < padded_rows; r += G::kPair)
    for (int64_t c = 0; c < cols; c += 16) {
      Elem* out = dst + c / G::kPanel * panel_stride + r * G::kPanel + c % G::kPanel * G::kPair;
      const int n = static_cast<int>(clamp(dim - c, 0, 16));
      const In* row = src + r * stride + c;
      if constexpr (G::kPair == 1) {
        if (r >= rows) {
          Vec(0.0f).store(out);
        } else if (n == 16) {
          Vec::load(row).store(out);
        } else {
          Vec::load_partial(row, n).store(out);
        }
      } else if (r + 1 < rows && n == 16) {
        pair_vectors(row, row + stride, out);
      } else {
        Elem edge[2][16] = {};
        for (int64_t k = 0; k < 2 && r + k < rows; ++k)
          std::memcpy(edge[k], row + k * stride, static_cast<size_t>(n) * sizeof(Elem));
        pair_vectors(edge[0], edge[1], out);
      }
    }
}

// Columns are the rows and the depth is the head dimension: panel (dim / kPair, kPanel, kPair). Rows are padded to
// kCols, the head dimension to 16 * kPair.
template <typename Engine, typename In>
void pack_transposed(const In* src, int64_t stride, int64_t rows, int64_t dim, typename Engine::Elem* dst,
                     int64_t panel_stride) {
  using Elem = typename Engine::Elem;
  using G = Grain<Engine>;
  constexpr int64_t kWide = 16 * G::kPair;  // elements of a row that make 16 words
  alignas(64) Elem edge[16 * kWide];
  for (int64_t r = 0; r < round_up(rows, G::kCols); r += 16)
    for (int64_t c = 0; c < dim; c += kWide) {
      Elem* out = dst + r / G::kPanel * panel_stride + c * G::kPanel + r % G::kPanel * G::kPair;
      const Elem* block = edge;
      int64_t ld = kWide;
      if constexpr (sizeof(In) == sizeof(Elem))
        if (rows - r >= 16 && dim - c >= kWide && stride % G::kPair == 0) {
          block = reinterpret_cast<const Elem*>(src + r * stride + c);
          ld = stride;
        }
      if (block == edge)
        load_rows(src + r * stride + c, stride, clamp(rows - r, 0, 16), std::min(kWide, dim - c), edge, 16, kWide);
      transpose_16x16(reinterpret_cast<const float*>(block), ld / G::kPair, reinterpret_cast<float*>(out), G::kPanel);
    }
}

}  // namespace herdkern::cpu::HK_ISA
