// Matrix product in register tiles: C (rows, columns) (+)= A (rows, depth) B (depth, columns), C fp32.
// B is packed in panels of kPanel columns, [depth][kPanel]; A is read where it lies, one broadcast word at a time.
// Every element of C is one chain of additions in the order of depth, so a result does not depend on how work is cut.
// Kinds of word: Fp32, one float; Bf16Pair, two neighbours along depth in 32 bits, multiplied exactly and added in fp32
// by vdpbf16ps (caller asks has_avx512_bf16() first). Single-threaded, no edge checks beyond those named.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/simd.h"
#include "cpu/amx_session.h"
#include "cpu/workspace.h"

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
  struct Session {};  // what a thread holds while it multiplies
  static constexpr int kDepthPerWord = 1;
  static constexpr bool kTiles = false;
  static HK_INLINE Vec load(const float* b) { return Vec::load(b); }
  static HK_INLINE void multiply_add(Vec& acc, const float& a, const Vec& b) { acc = fma(Vec(a), b, acc); }
};

#if defined(HK_VEC_AVX512)
struct Bf16Pair {
  using Word = uint32_t;
  struct Session {};
  static constexpr int kDepthPerWord = 2;
  static constexpr bool kTiles = false;
  static HK_INLINE Vec load(const uint32_t* b) { return Vec::load(reinterpret_cast<const float*>(b)); }
  // Assembly, because level avx512 is compiled without AVX512_BF16: its intrinsic would not be accepted there.
  static HK_INLINE void multiply_add(Vec& acc, const uint32_t& a, const Vec& b) {
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(b.v), "m"(a));
  }
};
#endif

// Lines of memory that a later product reads, asked for while this one computes: rows `stride` bytes apart, the first
// `lines` lines of 64 bytes of each. Where a matrix is too large for the caches and each of its elements meets few
// others, waiting for it costs as much as the product (vocab_size 128k, chunks of 96 tokens).
struct Ahead {
  const char* row = nullptr;
  int64_t stride = 0, lines = 0, rows_left = 0, line = 0;
  int64_t per_tile = 0;  // lines to ask for before each register tile

  HK_INLINE void step() {
    for (int64_t i = 0; i < per_tile && rows_left > 0; ++i) {
      __builtin_prefetch(row + 64 * line, 0, 2);
      if (++line < lines) continue;
      line = 0;
      row += stride;
      --rows_left;
    }
  }
};

// One register tile. Element (i, k) of A is a[i * a_row + k * a_depth] with one of the two strides 1: kUnitDepth says
// which. depth counts words. c: rows c_row apart, kPanel columns.
template <typename Kind, int kRows, bool kUnitDepth>
HK_INLINE void multiply_tile(const typename Kind::Word* a, int64_t a_stride, const typename Kind::Word* panel,
                             int64_t depth, float* c, int64_t c_row, bool accumulate) {
  Vec acc[kRows][kPanelVecs];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kPanelVecs; ++j) acc[i][j] = Vec(0.0f);
  if (accumulate)  // C may have to come from memory, and is not needed before the end
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kPanelVecs; ++j) __builtin_prefetch(c + i * c_row + Vec::kLanes * j, 1);
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

template <typename Kind, bool kUnitDepth>
void multiply_rows(const typename Kind::Word* a, int64_t a_stride, int64_t rows, const typename Kind::Word* panel,
                   int64_t depth, float* c, int64_t c_row, bool accumulate, Ahead* ahead = nullptr) {
  const int64_t row_step = kUnitDepth ? a_stride : 1;
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    if (ahead != nullptr) ahead->step();
    multiply_tile<Kind, kTileRows, kUnitDepth>(a + i * row_step, a_stride, panel, depth, c + i * c_row, c_row,
                                               accumulate);
  }
  if constexpr (kTileRows > 4)
    for (; i + 4 <= rows; i += 4)
      multiply_tile<Kind, 4, kUnitDepth>(a + i * row_step, a_stride, panel, depth, c + i * c_row, c_row, accumulate);
  for (; i < rows; ++i)
    multiply_tile<Kind, 1, kUnitDepth>(a + i * row_step, a_stride, panel, depth, c + i * c_row, c_row, accumulate);
}

#if defined(HK_ISA_AMX)
// The tile unit's form of Bf16Pair: tdpbf16ps multiplies 16 rows by 16 words of A with 16 words by 16 columns of B.
struct Bf16Tiles {
  using Word = uint32_t;
  static constexpr int kDepthPerWord = 2;
  static constexpr bool kTiles = true;

  using Session = AmxSession;

  static void multiply(const uint32_t* a, int64_t a_row, int64_t rows, const uint32_t* panel, int64_t depth, float* c,
                       int64_t c_row, bool accumulate);
};

// 32 rows (kTwo) or 16 by one panel in tiles 0 to 3; depth: a multiple of 16 words.
template <bool kTwo>
HK_INLINE void amx_block(const uint32_t* a, int64_t a_row, const uint32_t* panel, int64_t depth, float* c,
                         int64_t c_row, bool accumulate) {
  static_assert(kPanel == 32, "two tiles of columns");
  const int64_t a_bytes = a_row * 4, c_bytes = c_row * 4;
  const uint32_t* low = a + 16 * a_row;
  float* c_low = c + 16 * c_row;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kTwo) {
      _tile_loadd(2, c_low, c_bytes);
      _tile_loadd(3, c_low + 16, c_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 16) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, panel + k * kPanel, kPanel * 4);
    _tile_loadd(7, panel + k * kPanel + 16, kPanel * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, low + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  if constexpr (kTwo) {
    _tile_stored(2, c_low, c_bytes);
    _tile_stored(3, c_low + 16, c_bytes);
  }
}

// What does not fill tiles, the last rows and the end of depth, goes through vdpbf16ps.
inline void Bf16Tiles::multiply(const uint32_t* a, int64_t a_row, int64_t rows, const uint32_t* panel, int64_t depth,
                                float* c, int64_t c_row, bool accumulate) {
  const int64_t tiled_rows = rows / 16 * 16, tiled_depth = depth / 16 * 16;
  if (tiled_depth > 0) {
    int64_t i = 0;
    for (; i + 32 <= tiled_rows; i += 32)
      amx_block<true>(a + i * a_row, a_row, panel, tiled_depth, c + i * c_row, c_row, accumulate);
    if (i < tiled_rows) amx_block<false>(a + i * a_row, a_row, panel, tiled_depth, c + i * c_row, c_row, accumulate);
  }
  if (tiled_depth < depth)
    multiply_rows<Bf16Pair, true>(a + tiled_depth, a_row, tiled_rows, panel + tiled_depth * kPanel, depth - tiled_depth,
                                  c, c_row, accumulate || tiled_depth > 0);
  multiply_rows<Bf16Pair, true>(a + tiled_rows * a_row, a_row, rows - tiled_rows, panel, depth, c + tiled_rows * c_row,
                                c_row, accumulate);
}

// Sixteen rows of sixteen words, exchanged with their columns.
HK_INLINE void transpose_16x16(const uint32_t* source, int64_t source_row, uint32_t* out, int64_t out_row) {
  __m512i r[16], s[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(source + i * source_row);
  for (int i = 0; i < 16; i += 2) {  // pairs of rows, then of pairs: 4 x 4 words within each 128-bit lane
    s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
  }
  for (int i = 0; i < 4;
       ++i) {  // then the lanes: r[4 g + i] holds columns i, i + 4, i + 8, i + 12 of rows 4 g ... 4 g + 3
    const __m512i low = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), high = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    _mm512_storeu_si512(out + i * out_row, _mm512_shuffle_i32x4(low, low2, 0x88));
    _mm512_storeu_si512(out + (i + 4) * out_row, _mm512_shuffle_i32x4(high, high2, 0x88));
    _mm512_storeu_si512(out + (i + 8) * out_row, _mm512_shuffle_i32x4(low, low2, 0xdd));
    _mm512_storeu_si512(out + (i + 12) * out_row, _mm512_shuffle_i32x4(high, high2, 0xdd));
  }
}

// Rows of A out of a matrix that holds them as columns: out[i * out_row + k] = source[k * source_row + i].
inline void transpose_words(const uint32_t* source, int64_t source_row, int64_t rows, int64_t depth, uint32_t* out,
                            int64_t out_row) {
  for (int64_t k = 0; k < depth; k += 16)
    for (int64_t i = 0; i < rows; i += 16) {
      if (k + 16 <= depth && i + 16 <= rows) {
        transpose_16x16(source + k * source_row + i, source_row, out + i * out_row + k, out_row);
        continue;
      }
      for (int64_t j = i; j < rows && j < i + 16; ++j)
        for (int64_t l = k; l < depth && l < k + 16; ++l) out[j * out_row + l] = source[l * source_row + j];
    }
}
#endif

// All rows of A times one panel of B; see multiply_tile. Kind::Session must live in the calling thread.
template <typename Kind, bool kUnitDepth>
void multiply_panel(const typename Kind::Word* a, int64_t a_stride, int64_t rows, const typename Kind::Word* panel,
                    int64_t depth, float* c, int64_t c_row, bool accumulate, [[maybe_unused]] Ahead* ahead = nullptr) {
  if constexpr (!Kind::kTiles) {
    multiply_rows<Kind, kUnitDepth>(a, a_stride, rows, panel, depth, c, c_row, accumulate, ahead);
  } else {
    static_assert(kUnitDepth, "the tile unit loads rows of A; transpose_words makes them");
    Kind::multiply(a, a_stride, rows, panel, depth, c, c_row, accumulate);
  }
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

// multiply_panel for the first `columns` of the panel's columns alone; the others of C are not touched.
template <typename Kind, bool kUnitDepth>
void multiply_columns(const typename Kind::Word* a, int64_t a_stride, int64_t rows, const typename Kind::Word* panel,
                      int64_t depth, float* c, int64_t c_row, int64_t columns, bool accumulate,
                      Ahead* ahead = nullptr) {
  if (columns >= kPanel) {
    multiply_panel<Kind, kUnitDepth>(a, a_stride, rows, panel, depth, c, c_row, accumulate, ahead);
    return;
  }
  Workspace<float> product(rows * kPanel);
  multiply_panel<Kind, kUnitDepth>(a, a_stride, rows, panel, depth, product.data(), kPanel, false);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      c[i * c_row + j] =
          accumulate ? c[i * c_row + j] + product.data()[i * kPanel + j] : product.data()[i * kPanel + j];
}

// Packs one panel of B that lies in `source` as it is: word (k, j) comes from row k, element j, of rows source_row
// apart, in the precision of As. Columns past `columns` and depth past the end of the last word become zero.
template <typename Kind, typename T, typename As = T>
void pack_straight(const T* source, int64_t source_row, int64_t columns, int64_t depth, typename Kind::Word* panel) {
  using Word = typename Kind::Word;
  constexpr bool kRounds = std::is_same_v<As, bf16> && std::is_same_v<T, float>;
  const auto value = [](T x) {
    if constexpr (kRounds)
      return from_float<bf16>(x);
    else
      return x;
  };
  const int64_t words = (depth + Kind::kDepthPerWord - 1) / Kind::kDepthPerWord;
  for (int64_t k = 0; k < words; ++k) {
    const T* row = source + k * Kind::kDepthPerWord * source_row;
    Word* out = panel + k * kPanel;
    if (columns < kPanel) std::memset(out, 0, kPanel * sizeof(Word));
    if constexpr (Kind::kDepthPerWord == 1) {
      if (columns >= kPanel && !kRounds) {
        for (int j = 0; j < kPanel; j += Vec::kLanes) Vec::load(row + j).store(out + j);
      } else {
        for (int64_t j = 0; j < columns && j < kPanel; ++j) out[j] = to_float(value(row[j]));
      }
    } else {
      const T* next = row + source_row;
      const bool has_next = 2 * k + 1 < depth;
      if (columns >= kPanel && has_next) {
        bf16 rounded[2][kPanel];
        const bf16 *low, *high;
        if constexpr (kRounds) {
          for (int j = 0; j < kPanel; j += Vec::kLanes) {
            Vec::load(row + j).store(rounded[0] + j);
            Vec::load(next + j).store(rounded[1] + j);
          }
          low = rounded[0];
          high = rounded[1];
        } else {
          low = row;
          high = next;
        }
        for (int j = 0; j < kPanel; ++j) out[j] = low[j].bits | static_cast<uint32_t>(high[j].bits) << 16;
      } else {
        for (int64_t j = 0; j < columns && j < kPanel; ++j)
          out[j] = value(row[j]).bits | (has_next ? static_cast<uint32_t>(value(next[j]).bits) << 16 : 0u);
      }
    }
  }
}

}  // namespace herdkern::cpu::HK_ISA
