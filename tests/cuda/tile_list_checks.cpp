// common/tile_list.h against the mask itself, score by score. Called from test_tile_list.py by ctypes.
#include <algorithm>
#include <string>
#include <vector>

#include "common/tile_list.h"

namespace herdkern {
namespace {

std::string fault;

std::string name_of(Tile tile) { return "tile (" + std::to_string(tile.doc) + ", " + std::to_string(tile.begin) + ")"; }

// The mask as its documentation has it.
bool is_visible(const Document& d, int64_t i, int64_t j) {
  const int64_t distance = j - (i + d.k_len - d.q_len);
  return -d.window.left <= distance && distance <= d.window.right;
}

struct Checked {
  Tile tile;
  int rank;
};

// Marks the scores of one tile, and returns the rank of its work counted block by block.
int check_tile(const Document& d, TileCut cut, Tile tile, std::vector<uint8_t>& visits) {
  const int64_t length = cut.of_keys ? d.k_len : d.q_len, others = cut.of_keys ? d.q_len : d.k_len;
  const Span met = met_by(d, cut, tile.begin);
  if (met.begin < 0 || met.end > others || met.begin > met.end) fault = name_of(tile) + ": what it meets lies outside";
  std::vector<uint8_t> seen(static_cast<size_t>(others), 0);
  int64_t blocks = 0;
  for (int64_t other = met.begin; other < met.end; ++other)
    blocks += other == met.begin || other / cut.step != (other - 1) / cut.step;
  for (int64_t row = tile.begin; row < std::min<int64_t>(length, tile.begin + cut.size); ++row) {
    for (int64_t other = met.begin; other < met.end; ++other) {
      const int64_t i = cut.of_keys ? other : row, j = cut.of_keys ? row : other;
      if (!is_visible(d, i, j)) continue;
      ++visits[static_cast<size_t>(i * d.k_len + j)];
      seen[static_cast<size_t>(other)] = 1;
    }
  }
  if (met.begin < met.end && !(seen[static_cast<size_t>(met.begin)] && seen[static_cast<size_t>(met.end - 1)]))
    fault = name_of(tile) + ": it meets more than it sees";
  if (work_of(d, cut, tile.begin) != blocks) fault = name_of(tile) + ": its work is wrong";
  return work_rank(blocks);
}

}  // namespace
}  // namespace herdkern

// Checks the cut of these documents, and that `list`, if there is one, holds its tiles in their order. Returns what is
// wrong, or "".
extern "C" const char* check_tiles(const int32_t* cu_q, const int32_t* cu_k, int64_t num_docs, int64_t left,
                                   int64_t right, int32_t size, int32_t step, bool of_keys, const herdkern::Tile* list,
                                   int64_t count) {
  using namespace herdkern;
  const TileCut cut{size, step, of_keys};
  fault.clear();
  std::vector<Checked> expected;
  for (int64_t doc = 0; doc < num_docs; ++doc) {
    const Document d = document_at(cu_q, cu_k, doc, {left, right});
    std::vector<uint8_t> visits(static_cast<size_t>(d.q_len * d.k_len), 0);
    for (int64_t t = 0; t < num_tiles(d, cut); ++t) {
      const Tile tile{static_cast<int32_t>(doc), static_cast<int32_t>(t * size)};
      expected.push_back({tile, check_tile(d, cut, tile, visits)});
    }
    for (int64_t i = 0; i < d.q_len; ++i)
      for (int64_t j = 0; j < d.k_len; ++j)
        if (visits[static_cast<size_t>(i * d.k_len + j)] != is_visible(d, i, j))
          fault = "score (" + std::to_string(i) + ", " + std::to_string(j) + ") of document " + std::to_string(doc) +
                  " is not visited exactly once";
  }
  const int64_t total = of_keys ? cu_k[num_docs] : cu_q[num_docs];
  if (static_cast<int64_t>(expected.size()) > tile_capacity(total, num_docs, size)) fault = "more tiles than capacity";
  if (list == nullptr || !fault.empty()) return fault.c_str();
  std::stable_sort(expected.begin(), expected.end(),
                   [](const Checked& a, const Checked& b) { return a.rank > b.rank; });
  if (count != static_cast<int64_t>(expected.size())) fault = "the list's count is wrong";
  for (int64_t i = 0; i < count && fault.empty(); ++i)
    if (list[i].doc != expected[static_cast<size_t>(i)].tile.doc ||
        list[i].begin != expected[static_cast<size_t>(i)].tile.begin)
      fault = "entry " + std::to_string(i) + " is " + name_of(list[i]) + ", must be " +
              name_of(expected[static_cast<size_t>(i)].tile);
  return fault.c_str();
}

// Of the tile of one document that begins at `begin`: met.begin, met.end, its work, the rank of that, and how many
// tiles the document has.
extern "C" void describe_tile(int64_t q_len, int64_t k_len, int64_t left, int64_t right, int32_t size, int32_t step,
                              bool of_keys, int64_t begin, int64_t* out) {
  using namespace herdkern;
  const Document d{0, q_len, 0, k_len, {left, right}};
  const TileCut cut{size, step, of_keys};
  const Span met = met_by(d, cut, begin);
  const int64_t work = work_of(d, cut, begin);
  const int64_t all[] = {met.begin, met.end, work, work_rank(work), num_tiles(d, cut)};
  std::copy(std::begin(all), std::end(all), out);
}

extern "C" int64_t capacity_of(int64_t total, int64_t num_docs, int64_t size) {
  return herdkern::tile_capacity(total, num_docs, size);
}
