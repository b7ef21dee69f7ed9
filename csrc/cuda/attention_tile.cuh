// Tiles of 16-bit numbers in shared memory and the products of fragments from them; see mma.cuh for fragments.
#pragma once
#include "cuda/mma.cuh"

namespace herdkern::cuda {

// Rows of kDim numbers, in chunks of 16 bytes. A chunk's place in its row is turned by the row, so that the eight rows
// an ldmatrix reads lie in different banks.
template <int kDim>
struct TileLayout {
  static constexpr bool kWide = kDim % 64 == 0;
  static constexpr int kRowBytes = 2 * kDim, kChunks = kDim / 8;
  static constexpr int kLanes = kWide ? 8 : 4;  // threads that copy one row

  HK_DEVICE static int offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (kWide ? row & 7 : row >> 1 & 3)) << 4);
  }
};

// Begins to copy rows [0, kRows) of a tile; row_of(row) is where row's head_dim elements lie, null for a row of zeros.
template <int kDim, int kRows, int kThreads, typename T, typename RowOf>
HK_DEVICE void copy_tile(Shared tile, int head_dim, const T* anywhere, const RowOf& row_of) {
  using Layout = TileLayout<kDim>;
  constexpr int kStep = kThreads / Layout::kLanes;
  const int lane = static_cast<int>(threadIdx.x) % Layout::kLanes;
  const int first = static_cast<int>(threadIdx.x) / Layout::kLanes;
#pragma unroll
  for (int i = 0; i < (kRows + kStep - 1) / kStep; ++i) {
    const int row = first + i * kStep;
    if (kRows % kStep != 0 && row >= kRows) break;
    const T* from = row_of(row);
#pragma unroll
    for (int c = 0; c < Layout::kChunks / Layout::kLanes; ++c) {
      const int chunk = lane + c * Layout::kLanes;
      const bool valid = from != nullptr && 8 * chunk < head_dim;
      copy_16_bytes(tile + Layout::offset(row, chunk), valid ? from + 8 * chunk : anywhere, valid);
    }
  }
}

// Left operand: rows [row, row + 16), columns [16 k, 16 k + 16).
template <int kDim>
HK_DEVICE void load_left(Shared tile, int row, int k, int lane, uint32_t (&a)[4]) {
  load_matrices(tile + TileLayout<kDim>::offset(row + (lane & 15), 2 * k + (lane >> 4)), a);
}
// Right operand B^T of two neighbouring products: rows [row, row + 16) are their columns.
template <int kDim>
HK_DEVICE void load_right_rows(Shared tile, int row, int k, int lane, uint32_t (&b)[4]) {
  const int r = row + (lane & 7) + (lane >> 4 << 3);
  load_matrices(tile + TileLayout<kDim>::offset(r, 2 * k + (lane >> 3 & 1)), b);
}
// Right operand B of two neighbouring products: rows [row, row + 16), columns [8 chunk, 8 chunk + 16).
template <int kDim>
HK_DEVICE void load_right_columns(Shared tile, int row, int chunk, int lane, uint32_t (&b)[4]) {
  load_matrices_transposed(tile + TileLayout<kDim>::offset(row + (lane & 15), chunk + (lane >> 4)), b);
}

// scores = A B^T: rows [a_row, a_row + 16 kM) of tile a times rows [b_row, b_row + 8 kN) of tile b.
template <typename T, int kDim, int kM, int kN>
HK_DEVICE void score_product(Shared a, int a_row, Shared b, int b_row, int lane, float (&scores)[kM][kN][4]) {
  static_assert(kN % 2 == 0);
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[m][n][e] = 0.0f;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_left<kDim>(a, a_row + 16 * m, k, lane, left[m]);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t right[4];
      load_right_rows<kDim>(b, b_row + 8 * n, k, lane, right);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_add<T>(scores[m][n], left[m], right[0], right[1]);
        multiply_add<T>(scores[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// Scores rounded to T, as left operand: kN / 2 blocks of 16 columns.
template <typename T, int kM, int kN>
HK_DEVICE void round_scores(const float (&scores)[kM][kN][4], uint32_t (&left)[kM][kN / 2][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      left[m][n / 2][n % 2 * 2] = pack_pair<T>(scores[m][n][0], scores[m][n][1]);
      left[m][n / 2][n % 2 * 2 + 1] = pack_pair<T>(scores[m][n][2], scores[m][n][3]);
    }
}

// sums += left B: rows [0, 16 kK) of tile b, columns [8 chunk, 8 chunk + 8 kN).
template <typename T, int kDim, int kM, int kK, int kN>
HK_DEVICE void sum_product(const uint32_t (&left)[kM][kK][4], Shared b, int chunk, int lane, float (&sums)[kM][kN][4]) {
  static_assert(kN % 2 == 0);
#pragma unroll
  for (int k = 0; k < kK; ++k)
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t right[4];
      load_right_columns<kDim>(b, 16 * k, chunk + n, lane, right);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_add<T>(sums[m][n], left[m][k], right[0], right[1]);
        multiply_add<T>(sums[m][n + 1], left[m][k], right[2], right[3]);
      }
    }
}

template <int kM, int kN>
HK_DEVICE void set_zero(float (&sums)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[m][n][e] = 0.0f;
}

// Writes a warp's sums, columns [8 chunk, 8 chunk + 8 kN), times factor(m, half), to rows [row, row + 16 kM) of a tile.
template <typename T, int kDim, int kM, int kN, typename Factor>
HK_DEVICE void put_rows(unsigned char* tile, int row, int chunk, int lane, const float (&sums)[kM][kN][4],
                        const Factor& factor) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float f = factor(m, half);
      const int r = row + 16 * m + 8 * half + lane / 4;
#pragma unroll
      for (int n = 0; n < kN; ++n)
        *reinterpret_cast<uint32_t*>(tile + TileLayout<kDim>::offset(r, chunk + n) + lane % 4 * 4) =
            pack_pair<T>(sums[m][n][2 * half] * f, sums[m][n][2 * half + 1] * f);
    }
}

// One warp writes rows [row, row + rows) of a tile out, 16 bytes at a time; row_of as in copy_tile, null is left out.
template <int kDim, typename T, typename RowOf>
HK_DEVICE void write_rows(const unsigned char* tile, int row, int rows, int lane, int head_dim, const RowOf& row_of) {
  using Layout = TileLayout<kDim>;
  for (int r = row + lane / Layout::kLanes; r < row + rows; r += kWarp / Layout::kLanes) {
    T* to = row_of(r);
    if (to == nullptr) continue;
#pragma unroll
    for (int c = 0; c < Layout::kChunks / Layout::kLanes; ++c) {
      const int chunk = lane % Layout::kLanes + c * Layout::kLanes;
      if (8 * chunk < head_dim)
        store(to + 8 * chunk, load<8>(reinterpret_cast<const T*>(tile + Layout::offset(r, chunk))));
    }
  }
}

}  // namespace herdkern::cuda
