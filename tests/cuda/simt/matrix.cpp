#include "matrix.h"

#include <cstring>

#include "block.h"
#include "shadow.h"
#include "types.h"

namespace simt {
namespace {

float value_of(uint32_t pair, int i, Half type) {
  const auto bits = uint16_t(pair >> (16 * i));
  return type == Half::kBfloat16 ? bf16_value(bits) : half_value(bits);
}

struct Product {
  float* c;
  const uint32_t *a, *b;
  Half type;
};

void multiply_all(void* const* brought, unsigned mask) {
  if (mask != 0xFFFFFFFFu) fail("mma: all 32 lanes of a warp must take part");
  float a[16][16], b[16][8], c[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const auto& mine = *static_cast<const Product*>(brought[l]);
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r)
        a[place_in_a(l, r, i).row][place_in_a(l, r, i).column] = value_of(mine.a[r], i, mine.type);
      for (int r = 0; r < 2; ++r)
        b[place_in_b(l, r, i).row][place_in_b(l, r, i).column] = value_of(mine.b[r], i, mine.type);
    }
    for (int e = 0; e < 4; ++e) c[place_in_c(l, e).row][place_in_c(l, e).column] = mine.c[e];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int l = 0; l < kWarp; ++l)
    for (int e = 0; e < 4; ++e)
      static_cast<const Product*>(brought[l])->c[e] = c[place_in_c(l, e).row][place_in_c(l, e).column];
}

struct Rows {
  const void* row;
  uint32_t* m;
};

// Lane l's number i of matrix j, as (row of the warp that names it, bytes from its begin).
Place byte_of(int l, int j, int i, bool transposed) {
  const int g = l / 4, t = 2 * (l % 4) + i;
  return transposed ? Place{8 * j + t, 2 * g} : Place{8 * j + g, 2 * t};
}

template <bool kTransposed, bool kStore>
void move_all(void* const* brought, unsigned mask) {
  if (mask != 0xFFFFFFFFu) fail("ldmatrix, stmatrix: all 32 lanes of a warp must take part");
  for (int l = 0; l < kWarp; ++l) {
    uint32_t* m = static_cast<const Rows*>(brought[l])->m;
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < 2; ++i) {
        const Place place = byte_of(l, j, i, kTransposed);
        const void* row = static_cast<const Rows*>(brought[place.row])->row;
        auto* at = const_cast<unsigned char*>(static_cast<const unsigned char*>(row)) + place.column;
        if (kStore) {
          const auto bits = uint16_t(m[j] >> (16 * i));
          std::memcpy(at, &bits, 2);
        } else {
          uint16_t bits;
          std::memcpy(&bits, at, 2);
          m[j] = i == 0 ? bits : m[j] | uint32_t{bits} << 16;
        }
      }
    }
  }
}

// The access of a row counts as that of the lane that names it.
void check_row(const void* row, shadow::Kind kind) {
  if (!is_shared(row)) fail("ldmatrix, stmatrix: a row must lie in shared memory");
  check_aligned(row, 16);
  shadow::access(row, 16, kind);
}

}  // namespace

void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half type) {
  Product mine{c, a, b, type};
  meet_warp(0xFFFFFFFFu, type == Half::kBfloat16 ? "mma bf16" : "mma fp16", &multiply_all, &mine);
}

void load_matrices(const void* row, uint32_t (&m)[4], bool transposed) {
  check_row(row, shadow::Kind::kBlind);
  Rows mine{row, m};
  meet_warp(0xFFFFFFFFu, "ldmatrix", transposed ? &move_all<true, false> : &move_all<false, false>, &mine);
}

void store_matrices(void* row, const uint32_t (&m)[4], bool transposed) {
  check_row(row, shadow::Kind::kWrite);
  uint32_t held[4] = {m[0], m[1], m[2], m[3]};
  Rows mine{row, held};
  meet_warp(0xFFFFFFFFu, "stmatrix", transposed ? &move_all<true, true> : &move_all<false, true>, &mine);
}

}  // namespace simt
