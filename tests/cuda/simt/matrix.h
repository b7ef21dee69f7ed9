// The tensor-core instructions that act on fragments spread over a warp: mma.sync m16n8k16 and ldmatrix / stmatrix.
//
// Where lane l keeps what, with g = l / 4 and t = l % 4; a register holds two 16-bit numbers, the lower column (of b:
// the lower row) in its lower half:
//   a[0] (row g, columns 2t 2t+1)    a[1] (row g+8, the same)   a[2] (row g, columns 2t+8 2t+9)   a[3] (row g+8, the
//   same) b[0] (rows 2t 2t+1, column g)    b[1] (rows 2t+8 2t+9, column g) c[0] c[1] (row g, columns 2t 2t+1)    c[2]
//   c[3] (row g+8, the same)
// Source: PTX ISA 8.0, 9.7.13.4.8 and 9.7.13.4.15.
#pragma once
#include <cstdint>

namespace simt {

struct Place {
  int row, column;
};
// Of number i (0 or 1) of register r of lane l.
constexpr Place place_in_a(int l, int r, int i) { return {l / 4 + 8 * (r % 2), 2 * (l % 4) + i + 8 * (r / 2)}; }
constexpr Place place_in_b(int l, int r, int i) { return {2 * (l % 4) + i + 8 * r, l / 4}; }
// Of number e (0 to 3).
constexpr Place place_in_c(int l, int e) { return {l / 4 + 8 * (e / 2), 2 * (l % 4) + e % 2}; }

enum class Half { kBfloat16, kFloat16 };

// c += a b, 16 x 8 += 16 x 16 times 16 x 8; products exact, summed in fp32 in the order of k. All lanes of the warp.
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half type);

// Four 8 x 8 matrices of 16-bit numbers in shared memory: lane l names row l % 8 of matrix l / 8, 16 aligned bytes.
// Lane l gets columns 2t and 2t + 1 of row g of each, or of its transpose. All lanes of the warp.
void load_matrices(const void* row, uint32_t (&m)[4], bool transposed);
void store_matrices(void* row, const uint32_t (&m)[4], bool transposed);

}  // namespace simt
