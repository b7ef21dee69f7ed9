// The kernels of paged_attention.h. Decoding reads each key and value once for a handful of queries, so memory is the
// bound and the products are plain multiply-adds: kLanes neighbouring lanes hold one key, 8 numbers each, for all kRows
// queries of a block; each such group of lanes keeps a softmax of its own over every 128 / kLanes-th key, and the
// groups are put together at the end. Rows are the query heads of one key-value head, then queries of the document.
// Scores are in units of log2, so that the softmax is a power of two.
#pragma once
#include "cuda/device.cuh"
#include "cuda/paged_attention.h"

namespace herdkern::cuda {

constexpr int kPagedThreads = 128, kPagedWarps = kPagedThreads / kWarp;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// What a softmax has come to: its sum in units of 2^top. top is -inf where nothing was seen.
struct Softmax {
  float top, sum;
  // What sums in units of 2^other are worth in those of 2^top.
  HK_DEVICE static float factor(float other, float top) { return other == -INFINITY ? 0.0f : exp2_approx(other - top); }
};

// The split and where its partial results lie: for each (token, split, head) head_dim sums, their top and sum.
struct Partials {
  float* data;
  int64_t max_splits;
  HK_DEVICE float* at(const PagedAttention& a, int64_t token, int64_t split, int64_t head) const {
    return data + ((token * max_splits + split) * a.num_heads + head) * (a.head_dim + 2);
  }
};

struct PagedSplits {
  const Tile* tiles;  // of keys, kSplitKeys each
  const int32_t* count;
  Partials partials;
};

// The keys that query i sees lie in splits [begin, end).
HK_DEVICE Span splits_of(const Document& document, int64_t i) {
  const int64_t begin = document.keys_begin(i), end = document.keys_end(i);
  if (begin >= end) return {0, 0};
  return {begin / kSplitKeys, (end - 1) / kSplitKeys + 1};
}

// Weights of the softmax with the sink's logit in its sum: what the sums are multiplied by; stores the lse.
HK_DEVICE float finish_row(const PagedAttention& a, Softmax s, int64_t token, int64_t head, bool stores) {
  float top = s.top, sum = s.sum;
  if (a.sinks != nullptr) {
    const float sink = a.sinks[head] * kLog2e, higher = fmaxf(top, sink);
    sum = sum * Softmax::factor(top, higher) + Softmax::factor(sink, higher);
    top = higher;
  }
  if (stores) a.lse[head * a.total_q + token] = top == -INFINITY ? -INFINITY : (top + log2f(sum)) * kLn2;
  return s.top == -INFINITY ? 0.0f : Softmax::factor(s.top, top) / sum;
}

template <typename T, int kLanes, int kRows>
struct PagedBlock {
  static constexpr int kDim = 8 * kLanes, kGroups = kWarp / kLanes, kUnroll = kRows > 4 ? 2 : 4;

  const PagedAttention& a;
  const PagedSplits& splits;
  Tile tile;
  Document document;
  int64_t kv_head;
  int lane, warp, group, part;  // group: which keys; part: which numbers of them

  struct Shared {
    float sums[kPagedWarps][kRows][kDim];
    float tops[kPagedWarps][kRows], totals[kPagedWarps][kRows];
  };

  // Rows of the document's queries from `position` on and heads from `head` (within the key-value head's) on.
  int64_t position, head;
  int heads, num_group;

  HK_DEVICE int64_t query_of(int row) const { return position + row / heads; }
  HK_DEVICE int64_t head_of(int row) const { return kv_head * num_group + head + row % heads; }
  HK_DEVICE bool is_row(int row) const {
    return row < heads * (kRows / heads) && query_of(row) < document.q_len && head + row % heads < num_group;
  }
  HK_DEVICE Span keys_of(int row) const {
    const int64_t i = query_of(row), begin = document.keys_begin(i), end = document.keys_end(i);
    const int64_t last = tile.begin + int64_t{kSplitKeys};
    return {begin > tile.begin ? begin : tile.begin, end < last ? end : last};
  }

  HK_DEVICE bool row_of_key(int64_t key, int64_t& k_offset, int64_t& v_offset) const {
    const auto number = static_cast<uint32_t>(key), size = static_cast<uint32_t>(a.page_size);
    const uint32_t entry = (size & (size - 1)) == 0 ? number >> (__ffs(static_cast<int>(size)) - 1) : number / size;
    const int32_t page = a.table[tile.doc * a.table_stride + entry];
    const int64_t in_page = number - entry * size;
    k_offset = page * a.k_page + in_page * a.k_token + kv_head * a.k_head + 8 * part;
    v_offset = page * a.v_page + in_page * a.v_token + kv_head * a.v_head + 8 * part;
    return page >= 0 && page < a.num_pages;
  }

  HK_DEVICE void run(Shared& shared) {
    float q[kRows][8], sums[kRows][8], tops[kRows], totals[kRows];
    Span seen[kRows], all{INT64_MAX, 0};
    const bool is_part = 8 * part < a.head_dim;
    const float cap = a.softcap, unit = cap > 0.0f ? a.scale / cap : a.scale * kLog2e;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      seen[r] = is_row(r) ? keys_of(r) : Span{0, 0};
      tops[r] = -INFINITY, totals[r] = 0.0f;
      if (seen[r].begin < seen[r].end) {
        all.begin = seen[r].begin < all.begin ? seen[r].begin : all.begin;
        all.end = seen[r].end > all.end ? seen[r].end : all.end;
      }
      Pack<T, 8> pack{};
      if (is_row(r) && is_part)
        pack = load<8>(static_cast<const T*>(a.q) + (document.q_begin + query_of(r)) * a.q_token +
                       head_of(r) * a.q_head + 8 * part);
#pragma unroll
      for (int e = 0; e < 8; ++e) q[r][e] = pack[e] * unit, sums[r][e] = 0.0f;
    }
    for (int64_t first = all.begin; first < all.end; first += kUnroll * kPagedWarps * kGroups) {
      Pack<T, 8> keys[kUnroll], values[kUnroll];
      bool broken[kUnroll];
      const int64_t mine = first + warp * kGroups + group;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t key = mine + u * kPagedWarps * kGroups;
        int64_t k_offset = 0, v_offset = 0;
        const bool is_key = key < all.end, is_page = is_key && row_of_key(key, k_offset, v_offset);
        broken[u] = is_key && !is_page;
        keys[u] = values[u] = Pack<T, 8>{};
        if (is_page && is_part) {
          keys[u] = load<8>(static_cast<const T*>(a.k) + k_offset);
          values[u] = load<8>(static_cast<const T*>(a.v) + v_offset);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float scores[kUnroll], top = tops[r];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t key = mine + u * kPagedWarps * kGroups;
          float dot = 0.0f;
#pragma unroll
          for (int e = 0; e < 8; ++e) dot = fmaf(q[r][e], keys[u][e], dot);
          dot = warp_sum(dot, kLanes);
          if (cap > 0.0f) dot = tanhf(dot) * (cap * kLog2e);
          if (broken[u]) dot = NAN;
          scores[u] = key >= seen[r].begin && key < seen[r].end ? dot : -INFINITY;
          top = fmaxf(top, scores[u]);
        }
        const float finite = top == -INFINITY ? 0.0f : top, kept = exp2_approx(tops[r] - finite);
        tops[r] = top;
        totals[r] *= kept;
#pragma unroll
        for (int e = 0; e < 8; ++e) sums[r][e] *= kept;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const float weight = exp2_approx(scores[u] - finite);
          totals[r] += weight;
#pragma unroll
          for (int e = 0; e < 8; ++e) sums[r][e] = fmaf(weight, values[u][e], sums[r][e]);
        }
      }
    }
    join_groups(sums, tops, totals);
    write(shared, sums, tops, totals);
  }

  // Puts the groups of a warp together; every group ends with the same.
  HK_DEVICE void join_groups(float (&sums)[kRows][8], float (&tops)[kRows], float (&totals)[kRows]) const {
#pragma unroll
    for (int offset = kLanes; offset < kWarp; offset *= 2) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float other = __shfl_xor_sync(kAllLanes, tops[r], offset), top = fmaxf(tops[r], other);
        const float mine = Softmax::factor(tops[r], top), theirs = Softmax::factor(other, top);
        totals[r] = totals[r] * mine + __shfl_xor_sync(kAllLanes, totals[r], offset) * theirs;
#pragma unroll
        for (int e = 0; e < 8; ++e)
          sums[r][e] = sums[r][e] * mine + __shfl_xor_sync(kAllLanes, sums[r][e], offset) * theirs;
        tops[r] = top;
      }
    }
  }

  // Puts the warps together: a row that lies in this split alone is finished, any other is left as a partial result.
  HK_DEVICE void write(Shared& shared, float (&sums)[kRows][8], float (&tops)[kRows], float (&totals)[kRows]) const {
    __syncthreads();  // what the last rows left has been read
    if (group == 0) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int e = 0; e < 8; ++e) shared.sums[warp][r][8 * part + e] = sums[r][e];
        if (part == 0) shared.tops[warp][r] = tops[r], shared.totals[warp][r] = totals[r];
      }
    }
    __syncthreads();
    const int64_t split = tile.begin / kSplitKeys;
    for (int r = 0; r < kRows; ++r) {
      if (!is_row(r)) continue;
      const Span in = splits_of(document, query_of(r));
      if (split < in.begin || split >= in.end) continue;
      Softmax all{-INFINITY, 0.0f};
      float factors[kPagedWarps];
      for (int w = 0; w < kPagedWarps; ++w) all.top = fmaxf(all.top, shared.tops[w][r]);
      for (int w = 0; w < kPagedWarps; ++w) {
        factors[w] = Softmax::factor(shared.tops[w][r], all.top);
        all.sum += factors[w] * shared.totals[w][r];
      }
      const int64_t token = document.q_begin + query_of(r), row_head = head_of(r);
      const bool is_whole = in.end - in.begin == 1;
      float* partial = splits.partials.at(a, token, split, row_head);
      const float scale = is_whole ? finish_row(a, all, token, row_head, threadIdx.x == 0) : 1.0f;
      if (!is_whole && threadIdx.x == 0) partial[a.head_dim] = all.top, partial[a.head_dim + 1] = all.sum;
      for (int e = static_cast<int>(threadIdx.x); e < a.head_dim; e += kPagedThreads) {
        float sum = 0.0f;
        for (int w = 0; w < kPagedWarps; ++w) sum += factors[w] * shared.sums[w][r][e];
        if (is_whole) {
          static_cast<T*>(a.out)[(token * a.num_heads + row_head) * a.head_dim + e] = from_float<T>(sum * scale);
        } else {
          partial[e] = sum;
        }
      }
    }
  }
};

// One row: one block is enough, else ptxas aims at seven and spills four bytes on sm_100a. More rows spill with it.
template <typename T, int kLanes, int kRows>
__global__ void __launch_bounds__(kPagedThreads, kRows == 1 ? 1 : 0)
    paged_attention_kernel(const PagedAttention a, const PagedSplits splits) {
  using Block = PagedBlock<T, kLanes, kRows>;
  __shared__ typename Block::Shared shared;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int group = a.num_heads / a.num_kv_heads, heads = group < kRows ? group : kRows;
  const int64_t num_items = int64_t{*splits.count} * a.num_kv_heads;
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const Tile tile = splits.tiles[item / a.num_kv_heads];
    const Document document = document_at(a.cu_q, a.cu_k, tile.doc, a.window);
    for (int head = 0; head < group; head += heads)
      for (int64_t position = 0; position < document.q_len; position += kRows / heads) {
        Block block{a,        splits, tile,  document, item % a.num_kv_heads, lane, warp, lane / kLanes, lane % kLanes,
                    position, head,   heads, group};
        block.run(shared);
      }
  }
}

// One warp for each row: puts its splits together; a row that sees no key gets its zeros here.
template <typename T>
__global__ void __launch_bounds__(kPagedThreads) join_splits_kernel(const PagedAttention a, const Partials partials) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = int64_t{blockIdx.x} * kPagedWarps + static_cast<int>(threadIdx.x) / kWarp;
  const int64_t token = row / a.num_heads, head = row % a.num_heads;
  if (token >= a.total_q) return;
  int32_t low = 0, high = a.num_docs;  // cu_q[low] <= token < cu_q[high]
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    (a.cu_q[middle] <= token ? low : high) = middle;
  }
  const Document document = document_at(a.cu_q, a.cu_k, low, a.window);
  const Span in = splits_of(document, token - document.q_begin);
  if (in.end - in.begin == 1) return;  // finished by the block of its only split
  Softmax all{-INFINITY, 0.0f};
  for (int64_t split = in.begin; split < in.end; ++split)
    all.top = fmaxf(all.top, partials.at(a, token, split, head)[a.head_dim]);
  float sums[8] = {};
  for (int64_t split = in.begin; split < in.end; ++split) {
    const float* partial = partials.at(a, token, split, head);
    const float factor = Softmax::factor(partial[a.head_dim], all.top);
    all.sum += factor * partial[a.head_dim + 1];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (lane + kWarp * i < a.head_dim) sums[i] += factor * partial[lane + kWarp * i];
  }
  const float scale = finish_row(a, all, token, head, lane == 0);
  T* out = static_cast<T*>(a.out) + (token * a.num_heads + head) * a.head_dim;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (lane + kWarp * i < a.head_dim) out[lane + kWarp * i] = from_float<T>(sums[i] * scale);
}

}  // namespace herdkern::cuda
