// Operands of attention tiles: rows copied out of strided tensors into dense, zero-padded tiles, and the layouts that
// attention_gemm.h asks for. Zero padding matters: a NaN in a neighbouring document must not reach a product by way of
// 0 * NaN.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "common/attention_tiles.h"
#include "cpu/attention_gemm.h"

namespace herdkern::cpu::HK_ISA {

// tile[r, :dim] = src[r * stride, :dim] in the type of the tile, zero up to (padded_rows, ld).
template <typename Elem, typename In>
inline void load_row(const In* src, int64_t dim, Elem* dst, int64_t ld) {
  if constexpr (sizeof(Elem) == sizeof(In)) {
    std::memcpy(dst, src, static_cast<size_t>(dim) * sizeof(Elem));
  } else {
    for_each_vec(
        dim, [&](int64_t c) { Vec::load(src + c).store(dst + c); },
        [&](int64_t c, int n) { Vec::load_partial(src + c, n).store_partial(dst + c, n); });
  }
  if (dim < ld) std::memset(dst + dim, 0, static_cast<size_t>(ld - dim) * sizeof(Elem));
}

template <typename Elem, typename In>
inline void load_rows(const In* src, int64_t stride, int64_t rows, int64_t dim, Elem* tile, int64_t padded_rows,
                      int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) load_row(src + r * stride, dim, tile + r * ld, ld);
  std::memset(tile + rows * ld, 0, static_cast<size_t>((padded_rows - rows) * ld) * sizeof(Elem));
}

#ifdef HK_VEC_AVX512
HK_INLINE void transpose_16x16(const float* src, int64_t src_ld, float* dst, int64_t dst_ld) {  // of 32-bit words
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(src + i * src_ld);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {  // within each 128-bit lane: pairs of rows
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // fours of rows: a[i + c] holds column 4 * lane + c
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // gather the lanes
    const __m512i low02 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88),
                  low13 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
    const __m512i high02 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i high13 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_si512(dst + c * dst_ld, _mm512_shuffle_i32x4(low02, high02, 0x88));
    _mm512_storeu_si512(dst + (4 + c) * dst_ld, _mm512_shuffle_i32x4(low13, high13, 0x88));
    _mm512_storeu_si512(dst + (8 + c) * dst_ld, _mm512_shuffle_i32x4(low02, high02, 0xdd));
    _mm512_storeu_si512(dst + (12 + c) * dst_ld, _mm512_shuffle_i32x4(low13, high13, 0xdd));
  }
}
#else
HK_INLINE void transpose_16x16(const float* src, int64_t src_ld, float* dst, int64_t dst_ld) {
  for (int64_t r = 0; r < 16; ++r)
    for (int64_t c = 0; c < 16; ++c) dst[c * dst_ld + r] = src[r * src_ld + c];
}
#endif

// tile (rows, ld) row-major -> B operand for tile^T: (ld / kPair, rows, kPair). rows: a multiple of 16.
inline void transpose_tile(const float* tile, int64_t rows, int64_t ld, float* dst) {
  for (int64_t c = 0; c < ld; c += 16)
    for (int64_t r = 0; r < rows; r += 16) transpose_16x16(tile + r * ld + c, ld, dst + c * rows + r, rows);
}

#ifdef HK_VEC_AVX512
// Two neighbours of bf16 move as one word.
inline void transpose_tile(const bf16* tile, int64_t rows, int64_t ld, bf16* dst) {
  transpose_tile(reinterpret_cast<const float*>(tile), rows, ld / 2, reinterpret_cast<float*>(dst));
}

// 16 elements of two neighbouring rows -> 16 pairs.
HK_INLINE void pair_vectors(const bf16* even, const bf16* odd, bf16* dst) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
  _mm512_storeu_si512(dst, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

// B operands of the forward pass are packed in panels of kPanel columns: the rows of a panel follow each other in
// memory, so that it fills every set of the first-level cache alike. The last panel may be half as wide.

// 16 elements of a row from column c on, zero from column dim on.
template <typename In>
HK_INLINE Vec load_columns(const In* row, int64_t c, int64_t dim) {
  if (c + 16 <= dim) return Vec::load(row + c);
  return Vec::load_partial(row + c, static_cast<int>(clamp(dim - c, 0, 16)));
}

// Rows of `dim` elements, each where rows[r] points -> panels of B: (padded_rows / kPair, width, kPair) one after the
// other, zero beyond num_rows and dim. cols: a multiple of 16.
template <typename In>
inline void pack_panels(const In* const* rows, int64_t num_rows, int64_t padded_rows, int64_t dim, int64_t cols,
                        float* panels) {
  for (int64_t r = 0; r < padded_rows; ++r)
    for (int64_t c = 0; c < cols; c += 16) {
      const int64_t panel = round_down(c, kPanel), width = cols - panel < kPanel ? cols - panel : kPanel;
      const Vec x = r < num_rows ? load_columns(rows[r], c, dim) : Vec(0.0f);
      x.store(panels + panel * padded_rows + r * width + c - panel);
    }
}

#ifdef HK_VEC_AVX512
HK_INLINE __m512i load_words(const bf16* row, int64_t c, int64_t dim) {  // 16 columns as the low halves of words
  if (c + 16 <= dim) return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + c)));
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(Vec::mask(static_cast<int>(clamp(dim - c, 0, 16))), row + c));
}

// padded_rows: even.
inline void pack_panels(const bf16* const* rows, int64_t num_rows, int64_t padded_rows, int64_t dim, int64_t cols,
                        bf16* panels) {
  for (int64_t r = 0; r < padded_rows; r += 2)
    for (int64_t c = 0; c < cols; c += 16) {
      const int64_t panel = round_down(c, kPanel), width = cols - panel < kPanel ? cols - panel : kPanel;
      const __m512i even = r < num_rows ? load_words(rows[r], c, dim) : _mm512_setzero_si512();
      const __m512i odd = r + 1 < num_rows ? load_words(rows[r + 1], c, dim) : _mm512_setzero_si512();
      _mm512_storeu_si512(panels + panel * padded_rows + r * width + 2 * (c - panel),
                          _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}
#endif

// Memory of one tile operand, 64-byte aligned: grown when needed and kept, so that a task costs no page faults.
template <typename T>
class TileBuffer {
 public:
  TileBuffer() = default;
  ~TileBuffer() { std::free(data_); }
  TileBuffer(const TileBuffer&) = delete;
  TileBuffer& operator=(const TileBuffer&) = delete;

  T* at_least(int64_t count) {
    if (count > capacity_) {
      std::free(data_);
      capacity_ = 0;
      data_ = static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>(round_up(count * sizeof(T), 64))));
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = count;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace herdkern::cpu::HK_ISA
