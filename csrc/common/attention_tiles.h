// Which queries meet which keys in packed attention, and how documents are cut into tiles.
// Plain index arithmetic on cu_seqlens that g++ and nvcc both compile, so that what the CPU tests prove is what a GPU
// runs. A cut depends on the document alone, never on its neighbours or on the number of threads.
#pragma once
#include <cstdint>

#ifndef HK_HOST_DEVICE
#ifdef __CUDACC__
#define HK_HOST_DEVICE __host__ __device__
#else
#define HK_HOST_DEVICE
#endif
#endif

namespace herdkern {

HK_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
HK_HOST_DEVICE inline int64_t round_up(int64_t a, int64_t step) { return ceil_div(a, step) * step; }
HK_HOST_DEVICE inline int64_t round_down(int64_t a, int64_t step) { return a / step * step; }  // a >= 0
HK_HOST_DEVICE inline int64_t clamp(int64_t a, int64_t low, int64_t high) {
  return a < low ? low : a > high ? high : a;
}

// Which keys a query sees, counted from the key that the last query is aligned with: `left` keys before it and `right`
// after it. Causal attention is right = 0; kUnbounded is no limit.
struct Window {
  int64_t left, right;
};
constexpr int64_t kUnbounded = int64_t{1} << 40;

// One document: its rows of q and of k, v, and the mask between them, which is aligned at the bottom right: the last
// query stands at the last key. i counts the document's queries from 0, j its keys. Both ends of what a query sees only
// move forward from one query to the next.
struct Document {
  int64_t q_begin, q_len, k_begin, k_len;
  Window window;

  HK_HOST_DEVICE int64_t shift() const { return k_len - q_len; }  // query i stands at key i + shift

  // Query i sees keys [keys_begin(i), keys_end(i)); an empty range where keys_begin >= keys_end.
  HK_HOST_DEVICE int64_t keys_begin(int64_t i) const { return clamp(i + shift() - window.left, 0, k_len); }
  HK_HOST_DEVICE int64_t keys_end(int64_t i) const { return clamp(i + shift() + window.right + 1, 0, k_len); }

  // Queries [queries_begin(j), queries_end(j)) see key j.
  HK_HOST_DEVICE int64_t queries_begin(int64_t j) const { return clamp(j - shift() - window.right, 0, q_len); }
  HK_HOST_DEVICE int64_t queries_end(int64_t j) const { return clamp(j - shift() + window.left + 1, 0, q_len); }

  HK_HOST_DEVICE bool sees_none(int64_t i) const { return keys_begin(i) >= keys_end(i); }
};

// cu_q, cu_k: (num_docs + 1,).
HK_HOST_DEVICE inline Document document_at(const int32_t* cu_q, const int32_t* cu_k, int64_t doc, Window window) {
  return {cu_q[doc], int64_t{cu_q[doc + 1]} - cu_q[doc], cu_k[doc], int64_t{cu_k[doc + 1]} - cu_k[doc], window};
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
