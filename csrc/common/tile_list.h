// The tiles of packed attention: documents cut into runs of queries (forward, dq) or of keys (dk, dv), the longest work
// first. csrc/cuda/tile_list_kernel.cuh makes the list on the device from cu_seqlens; its length is bounded by shapes
// alone (tile_capacity), so a grid of that many blocks can be launched, or captured in a graph, before the borders are
// known. g++ and nvcc both compile this; the tests prove on a CPU what a GPU runs.
//
// Order: falling work_rank, then document, then row. Every row of every document lies in one tile, also one that sees
// nothing: somebody has to write its zeros.
#pragma once
#include <cstdint>

#include "common/attention_tiles.h"

namespace herdkern {

// Rows [begin, begin + TileCut::size) of document `doc`, counted in the document, as far as it has them.
struct Tile {
  int32_t doc, begin;
};

// How documents are cut: `size` queries (keys, if of_keys) a tile, which meets the other side `step` rows at a time.
struct TileCut {
  int32_t size, step;
  bool of_keys;
};

// Tiles that num_docs documents of `total` rows can have at most: a document's last tile may hold a single row.
HK_HOST_DEVICE inline int64_t tile_capacity(int64_t total, int64_t num_docs, int64_t size) {
  const int64_t cut = (total + num_docs * (size - 1)) / size;
  return cut < total ? cut : total;
}

HK_HOST_DEVICE inline int64_t num_tiles(const Document& document, TileCut cut) {
  return ceil_div(cut.of_keys ? document.k_len : document.q_len, cut.size);
}

// Rows [begin, end) of the other side that some row of the tile meets, counted in the document; empty: begin == end.
// Each row of the tile meets a run of them, and both ends of the run only move forward from row to row.
struct Span {
  int64_t begin, end;
};
HK_HOST_DEVICE inline Span met_by(const Document& document, TileCut cut, int64_t begin) {
  const int64_t length = cut.of_keys ? document.k_len : document.q_len;
  const int64_t last = begin + cut.size < length ? begin + cut.size - 1 : length - 1;
  Span met = cut.of_keys ? Span{document.queries_begin(begin), document.queries_end(last)}
                         : Span{document.keys_begin(begin), document.keys_end(last)};
  if (met.end < met.begin) met.end = met.begin;
  return met;
}

// Blocks of `step` rows, counted from the document's first, that the tile walks over.
HK_HOST_DEVICE inline int64_t work_of(const Document& document, TileCut cut, int64_t begin) {
  const Span met = met_by(document, cut, begin);
  return met.begin == met.end ? 0 : ceil_div(met.end, cut.step) - met.begin / cut.step;
}

// Work to an eighth of its power of two, below kWorkRanks for every int32_t number of blocks; exact below 16.
constexpr int kWorkRanks = 256;
HK_HOST_DEVICE inline int work_rank(int64_t work) {
  int shift = 0;
  while (work >> shift >= 16) ++shift;
  return static_cast<int>(8 * shift + (work >> shift));
}

}  // namespace herdkern
