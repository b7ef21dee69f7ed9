// Which queries meet which keys in packed attention, and how documents are cut into tiles.
// Plain index arithmetic on cu_seqlens that g++ and nvcc both compile, so that what the CPU tests prove is what a GPU
// runs. A cut depends on the document alone, never on its neighbours or on the number of threads.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define HK_HOST_DEVICE __host__ __device__
#else
#define HK_HOST_DEVICE
#endif

namespace herdkern {

HK_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
HK_HOST_DEVICE inline int64_t round_up(int64_t a, int64_t step) { return ceil_div(a, step) * step; }
HK_HOST_DEVICE inline int64_t round_down(int64_t a, int64_t step) { return a / step * step; }  // a >= 0
HK_HOST_DEVICE inline int64_t clamp(int64_t a, int64_t low, int64_t high) {
  return a < low ? low : a > high ? high : a;
}

// One document: its rows of q and of k, v, and the mask between them, which is aligned at the bottom right: the last
// query sees every key. i counts the document's queries from 0, j its keys.
struct Document {
  int64_t q_begin, q_len, k_begin, k_len;
  bool causal;

  HK_HOST_DEVICE int64_t shift() const { return k_len - q_len; }  // causal: i sees j <= i + shift

  // Number of keys, counted from the first, that query i sees.
  HK_HOST_DEVICE int64_t visible_keys(int64_t i) const { return causal ? clamp(i + shift() + 1, 0, k_len) : k_len; }

  // The first query that sees key j; may be q_len: none does.
  HK_HOST_DEVICE int64_t first_query(int64_t j) const { return causal ? clamp(j - shift(), 0, q_len) : 0; }
};

// cu_q, cu_k: (num_docs + 1,).
HK_HOST_DEVICE inline Document document_at(const int32_t* cu_q, const int32_t* cu_k, int64_t doc, bool causal) {
  return {cu_q[doc], int64_t{cu_q[doc + 1]} - cu_q[doc], cu_k[doc], int64_t{cu_k[doc + 1]} - cu_k[doc], causal};
}

// Queries of one forward tile, all heads of a group of `group` query heads folded into its rows: row r of the tile is
// query r / heads of the tile and head r % heads, so neighbours in the tile share their keys.
struct RowFold {
  int64_t heads;      // query heads folded together
  int64_t positions;  // queries of a full tile

  HK_HOST_DEVICE static RowFold of(int64_t group, int64_t max_rows) {
    const int64_t heads = group < max_rows ? group : max_rows;
    return {heads, max_rows / heads};
  }
};

}  // namespace herdkern
