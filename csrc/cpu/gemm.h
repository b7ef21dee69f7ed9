// Matrix product in register tiles: C (rows, columns) (+)= A (rows, depth) B (depth, columns), C fp32.
// B is packed in panels of kPanel columns, [depth][kPanel]; A is read where it lies, one broadcast word at a time.
// Every element of C is one chain of additions in the order of depth, so a result does not depend on how work is cut.
// Kinds of word: Fp32, one float; Bf16Pair, two neighbours along depth in 32 bits, multiplied exactly and added in fp32
// by vdpbf16ps (caller asks has_avx512_bf16() first). Single-threaded, no edge checks beyond those named.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace herdkern::cpu::HK_ISA {

#if defined(HK_VEC_AVX512)  // 24 accumulators + 2 of B in 32 registers
constexpr int kTileRows = 12, kPanelVecs = 2;
#elif defined(HK_VEC_AVX2)  // a Vec is two registers: 12 accumulators + 2 of B in 16
constexpr int kTileRows = 6, kPanelVecs = 1;
#else                       // a Vec is four registers: 8 accumulators + 4 of B in 16
constexpr int kTileRows = 2, kPanelVecs = 1;
#endif
constexpr int kPanel = kPanelVecs * Vec::kLanes;

HK_INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Fp32 {
  using Word = float;
  static constexpr int kDepthPerWord = 1;
  static HK_INLINE Vec load(const float* b) { return Vec::load(b); }
  static HK_INLINE void multiply_add(Vec& acc, const float& a, const Vec& b) { acc = fma(Vec(a), b, acc); }
};

#if defined(HK_VEC_AVX512)
struct Bf16Pair {
  using Word = uint32_t;
  static constexpr int kDepthPerWord = 2;
  static HK_INLINE Vec load(const uint32_t* b) { return Vec::load(reinterpret_cast<const float*>(b)); }
  // Assembly, because level avx512 is compiled without AVX512_BF16: its intrinsic would not be accepted there.
  static HK_INLINE void multiply_add(Vec& acc, const uint32_t& a, const Vec& b) {
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(b.v), "m"(a));
  }
};
#endif

// One register tile. Element (i, k) of A is a[i * a_row + k * a_depth] with one of the two strides 1: kUnitDepth says
// which. depth counts words. c: rows c_row apart, kPanel columns.
template <typename Kind, int kRows, bool kUnitDepth>
HK_INLINE void multiply_tile(const typename Kind::Word* a, int64_t a_stride, const typename Kind::Word* panel,
                             int64_t depth, float* c, int64_t c_row, bool accumulate) {
  Vec acc[kRows][kPanelVecs];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kPanelVecs; ++j) acc[i][j] = Vec(0.0f);
  const int64_t row_step = kUnitDepth ? a_stride : 1, depth_step = kUnitDepth ? 1 : a_stride;
  for (int64_t k = 0; k < depth; ++k, a += depth_step, panel += kPanel) {
    Vec b[kPanelVecs];
    for (int j = 0; j < kPanelVecs; ++j) b[j] = Kind::load(panel + Vec::kLanes * j);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kPanelVecs; ++j) Kind::multiply_add(acc[i][j], a[i * row_step], b[j]);
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kPanelVecs; ++j) {
      float* at = c + i * c_row + Vec::kLanes * j;
      (accumulate ? Vec::load(at) + acc[i][j] : acc[i][j]).store(at);
    }
}

// All rows of A times one panel of B; see multiply_tile.
template <typename Kind, bool kUnitDepth>
void multiply_panel(const typename Kind::Word* a, int64_t a_stride, int64_t rows, const typename Kind::Word* panel,
                    int64_t depth, float* c, int64_t c_row, bool accumulate) {
  const int64_t row_step = kUnitDepth ? a_stride : 1;
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows)
    multiply_tile<Kind, kTileRows, kUnitDepth>(a + i * row_step, a_stride, panel, depth, c + i * c_row, c_row,
                                               accumulate);
  if constexpr (kTileRows > 4)
    for (; i + 4 <= rows; i += 4)
      multiply_tile<Kind, 4, kUnitDepth>(a + i * row_step, a_stride, panel, depth, c + i * c_row, c_row, accumulate);
  for (; i < rows; ++i)
    multiply_tile<Kind, 1, kUnitDepth>(a + i * row_step, a_stride, panel, depth, c + i * c_row, c_row, accumulate);
}

// Packs one panel of B whose columns are rows of `source`: word (k, j) of the panel comes from source row j, element k.
// source: columns rows, source_row elements apart, depth elements each.  Columns past `columns` and depth past the end
// of the last word become zero.
template <typename Kind, typename T>
void pack_transposed(const T* source, int64_t source_row, int64_t columns, int64_t depth, typename Kind::Word* panel) {
  const int64_t words = (depth + Kind::kDepthPerWord - 1) / Kind::kDepthPerWord;
  if (columns < kPanel) std::memset(panel, 0, static_cast<size_t>(words) * kPanel * sizeof(typename Kind::Word));
  for (int64_t j = 0; j < columns; ++j) {
    const T* row = source + j * source_row;
    if constexpr (Kind::kDepthPerWord == 1) {
      for (int64_t k = 0; k < depth; ++k) panel[k * kPanel + j] = to_float(row[k]);
    } else {
      for (int64_t k = 0; k + 1 < depth; k += 2)
        panel[k / 2 * kPanel + j] = row[k].bits | static_cast<uint32_t>(row[k + 1].bits) << 16;
      if (depth % 2) panel[depth / 2 * kPanel + j] = row[depth - 1].bits;
    }
  }
}

// Packs one panel of B that lies in `source` as it is: word (k, j) comes from row k, element j, of rows source_row
// apart. Columns past `columns` and depth past the end of the last word become zero.
template <typename Kind, typename T>
void pack_straight(const T* source, int64_t source_row, int64_t columns, int64_t depth, typename Kind::Word* panel) {
  using Word = typename Kind::Word;
  const int64_t words = (depth + Kind::kDepthPerWord - 1) / Kind::kDepthPerWord;
  for (int64_t k = 0; k < words; ++k) {
    const T* row = source + k * Kind::kDepthPerWord * source_row;
    Word* out = panel + k * kPanel;
    if (columns < kPanel) std::memset(out, 0, kPanel * sizeof(Word));
    if constexpr (Kind::kDepthPerWord == 1) {
      if (columns >= kPanel) {
        for (int j = 0; j < kPanel; j += Vec::kLanes) Vec::load(row + j).store(out + j);
      } else {
        for (int64_t j = 0; j < columns; ++j) out[j] = to_float(row[j]);
      }
    } else {
      const T* next = row + source_row;
      const bool has_next = 2 * k + 1 < depth;
      if (columns >= kPanel && has_next) {
        for (int j = 0; j < kPanel; ++j) out[j] = row[j].bits | static_cast<uint32_t>(next[j].bits) << 16;
      } else {
        for (int64_t j = 0; j < columns && j < kPanel; ++j)
          out[j] = row[j].bits | (has_next ? static_cast<uint32_t>(next[j].bits) << 16 : 0u);
      }
    }
  }
}

}  // namespace herdkern::cpu::HK_ISA
