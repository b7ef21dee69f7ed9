// Which rows of q, k and v a block of threads works on, and which of them meet.
#pragma once
#include "cuda/attention.h"
#include "cuda/attention_tile.cuh"

namespace herdkern::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f, kNegInfinity = -INFINITY;

// A document and its mask, Document of attention_tiles.h in 32 bits: `back` is how many queries are left from query i
// on, so that no sum leaves the range even where a side of the window has no limit.
struct Rows {
  int q_begin, q_len, k_begin, k_len, left, right;

  HK_DEVICE static Rows of(const AttentionShape& shape, const SoftmaxConstants& softmax, int doc) {
    const int q_begin = shape.cu_q[doc], k_begin = shape.cu_k[doc];
    return {q_begin,      shape.cu_q[doc + 1] - q_begin, k_begin, shape.cu_k[doc + 1] - k_begin, softmax.left,
            softmax.right};
  }
  HK_DEVICE int keys_begin(int i) const {
    const int stands = k_len - (q_len - i);  // the key that query i stands at
    return left >= stands ? 0 : stands - left;
  }
  HK_DEVICE int keys_end(int i) const {
    const int back = q_len - i;
    return right >= back ? k_len : max(k_len - back + right + 1, 0);
  }
  HK_DEVICE int queries_begin(int j) const {
    const int ahead = k_len - j;
    return right >= q_len - ahead ? 0 : q_len - ahead - right;
  }
  HK_DEVICE int queries_end(int j) const {
    const int ahead = k_len - j;
    return left >= ahead ? q_len : max(q_len - ahead + left + 1, 0);
  }
};

// A block of queries of a document: see QueryFold.
struct QueryBlock {
  QueryFold fold;
  int position, queries;  // the first query and how many there are
  int head, head_end;     // heads [head, head_end) of q

  HK_DEVICE static QueryBlock of(const AttentionShape& shape, const QueryFold& fold, const Rows& doc, int position,
                                 int kv_head, int index) {
    const int group = static_cast<int>(shape.group()), head = kv_head * group + index * fold.heads;
    return {fold, position, min(fold.positions, doc.q_len - position), head,
            min(head + fold.heads, (kv_head + 1) * group)};
  }
  HK_DEVICE int last() const { return position + queries - 1; }

  // Row `row` of the block: its query, counted from the first, and its head. False if the block has no such row.
  HK_DEVICE bool find(int row, int* query, int* head_of_row) const {
    *query = fold.query(row);
    *head_of_row = head + row - *query * fold.heads;
    return *query < queries && *head_of_row < head_end;
  }
};

// Row `row` of a block in an operand, null if there is none.
template <typename T>
HK_DEVICE const T* input_row(const AttentionInput& x, const Rows& doc, const QueryBlock& block, int row) {
  int query, head;
  if (!block.find(row, &query, &head)) return nullptr;
  return static_cast<const T*>(x.data) + (int64_t{doc.q_begin} + block.position + query) * x.token_stride +
         head * x.head_stride;
}

// The same in a contiguous (total_q, num_heads, width).
template <typename T>
HK_DEVICE T* output_row(void* x, const AttentionShape& shape, int64_t width, const Rows& doc, const QueryBlock& block,
                        int row) {
  int query, head;
  if (!block.find(row, &query, &head)) return nullptr;
  return static_cast<T*>(x) + ((int64_t{doc.q_begin} + block.position + query) * shape.num_heads + head) * width;
}

template <typename T>
HK_DEVICE const T* key_rows(const AttentionInput& x, const Rows& doc, int kv_head) {
  return static_cast<const T*>(x.data) + int64_t{doc.k_begin} * x.token_stride + kv_head * x.head_stride;
}

// Keys [key, key + kKeys) of a document, as a tile.
template <int kDim, int kKeys, int kThreads, typename T>
HK_DEVICE void copy_keys(Shared tile, int head_dim, const T* rows, int64_t stride, int key, int k_len) {
  copy_tile<kDim, kKeys, kThreads>(tile, head_dim, rows, [&](int row) -> const T* {
    return key + row < k_len ? rows + (key + row) * stride : nullptr;
  });
}

// The slots of a ring.
HK_DEVICE int after(int slot, int num_slots) { return slot + 1 == num_slots ? 0 : slot + 1; }
HK_DEVICE int before(int slot, int num_slots) { return slot == 0 ? num_slots - 1 : slot - 1; }

// Waits until at most `groups` groups of copies are under way, 0 to 2.
HK_DEVICE void wait_pending(int groups) {
  if (groups <= 0) {
    wait_copies<0>();
  } else if (groups == 1) {
    wait_copies<1>();
  } else {
    wait_copies<2>();
  }
}

// tanh to a few units of 2^-24, where the instruction for it has 2^-11: softcap multiplies the error.
HK_DEVICE float tanh_by_exp2(float x) {
  return fmaf(-2.0f, reciprocal_approx(1.0f + exp2_approx(x * (2.0f * kLog2E))), 1.0f);
}

template <int kM, int kN>
HK_DEVICE void cap_scores(float inner, float (&scores)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[m][n][e] = tanh_by_exp2(scores[m][n][e] * inner);
}

// Scores of a warp's rows (from `row` of the block on) and keys [key, key + 8 kN): -inf where the query sees no key.
template <int kM, int kN>
HK_DEVICE void mask_scores(const Rows& doc, const QueryBlock& block, int row, int key, int lane,
                           float (&scores)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = block.position + block.fold.query(row + 16 * m + 8 * half + lane / 4);
      const int begin = doc.keys_begin(i) - key - lane % 4 * 2, end = doc.keys_end(i) - key - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * n + e < begin || 8 * n + e >= end) scores[m][n][2 * half + e] = kNegInfinity;
    }
}

// Scores become p = exp2(factor * score - lse), dp becomes dS / scale = p * (dp - delta) * cap'.
// values(m, n, e): lse in units of log 2, and delta.
template <int kM, int kN, typename Values>
HK_DEVICE void score_gradients(const SoftmaxConstants& softmax, float (&scores)[kM][kN][4], float (&dp)[kM][kN][4],
                               const Values& values) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 v = values(m, n, e);
        const float score = scores[m][n][e], p = exp2_approx(fmaf(score, softmax.factor, -v.x));
        float ds = p * (dp[m][n][e] - v.y);
        if (softmax.capped) ds *= fmaxf(fmaf(-score, score, 1.0f), 0.0f);  // masked: 1 - inf
        scores[m][n][e] = p;
        dp[m][n][e] = ds;
      }
}

}  // namespace herdkern::cuda
