// The tasks of a backward call: how documents are cut, in which order the pieces run, and where their sums of dQ lie.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/attention.h"

#ifndef HK_ISA
#error "attention_backward_plan.h belongs in a kernel source, which setup.py compiles once per level"
#endif

namespace herdkern::cpu::HK_ISA {

// Tile sizes of the backward pass, multiples of 32. A visit passes over 0.3 to 0.4 MB per product at head_dim 128 in
// fp32. Tried 128 keys: 2 to 5 % slower on long documents and, in bf16, 10 % on short ones, whose dQ then needs a sum
// over chunks; 64 queries: 2 to 4 % slower; copying q and dout as left operands: 6 % slower in fp32.
constexpr int64_t kTileQueries = 128, kChunkKeys = 256;

// Tiles of queries that see no key come first and nothing visits them; how many there are, and how many others.
inline int64_t skipped_tiles(const Document& doc) { return doc.queries_begin(0) / kTileQueries; }
inline int64_t visited_tiles(const Document& doc) { return ceil_div(doc.q_len, kTileQueries) - skipped_tiles(doc); }

struct KeyChunk {
  int64_t doc, index, count;  // chunk `index` of `count` of the document
};

struct BackwardTask {
  int64_t begin, end;  // chunks; several are single chunks of small documents
  int64_t kv_head;
  int64_t first_tile;  // of dQ, of a document with several chunks: the group's first head, first tile that sees a key
};

struct BackwardPlan {
  std::vector<KeyChunk> chunks;
  std::vector<BackwardTask> tasks;
  int64_t slots;  // for tiles of dQ
};

// Which tasks run, in order, costly documents first. A document with several chunks takes its tiles of dQ for as many
// key-value heads at a time as fit into the slots: those run side by side and never wait for one another. `scarce`: a
// slot costs memory, so there are enough for one head of the longest document or a quarter of all tiles.
inline BackwardPlan plan_backward(const AttentionShape& s, bool scarce) {
  constexpr int64_t kTaskPairs = 64 * 64;  // documents smaller than this share a task
  const int64_t group = s.num_heads / s.num_kv_heads;
  const auto cost = [&](int64_t d) {
    const Document doc = s.document(d);
    return doc.q_len * doc.k_len;
  };
  const auto chunks_of = [&](int64_t d) { return ceil_div(s.document(d).k_len, kChunkKeys); };
  const auto tiles_of_group = [&](int64_t d) { return chunks_of(d) > 1 ? group * visited_tiles(s.document(d)) : 0; };
  std::vector<int64_t> order;
  int64_t all = 0, most = 0;
  for (int64_t d = 0; d < s.num_docs; ++d) {
    if (chunks_of(d) == 0) continue;
    order.push_back(d);
    all += tiles_of_group(d) * s.num_kv_heads;
    most = std::max(most, tiles_of_group(d));
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost(a) > cost(b); });

  BackwardPlan plan;
  plan.slots = scarce ? std::max(most, ceil_div(all, 4)) : all;
  int64_t tile = 0;
  for (size_t i = 0; i < order.size();) {
    const int64_t d = order[i++], begin = static_cast<int64_t>(plan.chunks.size()), count = chunks_of(d);
    for (int64_t c = 0; c < count; ++c) plan.chunks.push_back({d, c, count});
    if (count == 1)
      for (int64_t pairs = cost(d); pairs < kTaskPairs && i < order.size() && chunks_of(order[i]) == 1; ++i) {
        plan.chunks.push_back({order[i], 0, 1});
        pairs += cost(order[i]);
      }
    const int64_t end = static_cast<int64_t>(plan.chunks.size()), step = count == 1 ? end - begin : 1;
    const int64_t tiles = tiles_of_group(d);
    const int64_t abreast = tiles == 0 ? s.num_kv_heads : clamp(plan.slots / tiles, 1, s.num_kv_heads);
    for (int64_t first = 0; first < s.num_kv_heads; first += abreast) {
      const int64_t heads = std::min(abreast, s.num_kv_heads - first);
      for (int64_t c = begin; c < end; c += step)
        for (int64_t h = 0; h < heads; ++h) plan.tasks.push_back({c, c + step, first + h, tile + h * tiles});
      tile += heads * tiles;
    }
  }
  return plan;
}

}  // namespace herdkern::cpu::HK_ISA
