// Forward pass of packed attention: one task is a tile of queries of one document and one key-value head, the query
// heads of the group folded into its rows. The tile walks over the blocks of keys that it sees with a running softmax.
//
// Scores are computed transposed, S^T = K Q^T, one panel of 32 rows of the tile at a time: keys are the rows of the
// product, so a document computes few scores that its mask hides, K is read where it lies, the softmax never crosses
// lanes, and a panel's scores stay in the first-level cache until their product with V.
//
// Sizes, one for all levels and storage types (1 thread, Zen 4 with 32 KiB + 1 MiB of cache, head_dim 128 and 64):
//   panel of 32 rows    scores of a block and one operand fill 32 KiB; twice the vector width, a row of AMX tiles
//   block of 128 keys   256 with AMX, whose products are cheaper against the softmax.
//                       Tried 64: as fast at head_dim 128, x0.95 at 64 (acc is read and written twice as often).
//   tile of 512 rows    256 above head_dim 128, to stay in the second-level cache. Each tile packs V again.
//                       Tried 256: x0.97 (bf16 x0.98); tried 128: x0.95, on short documents x0.93.
//   chunk of 8 rows     of a panel that the mask cuts: what one micro-tile multiplies, so no finer grain pays.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/attention_tiles.h"
#include "cpu/attention.h"
#include "cpu/attention_pack.h"
#include "cpu/attention_softmax.h"
#include "cpu/huge_pages.h"
#include "cpu/threads.h"

namespace herdkern::cpu::HK_ISA {

template <typename Engine>
struct ForwardBuffers {
  TileBuffer<typename Engine::Elem> staging, q, keys, values, weights, weights_a;
  TileBuffer<float> scores, acc, rows;
};

template <typename Engine, typename In>
class ForwardTile {
  using Elem = typename Engine::Elem;
  static constexpr bool kByTiles = Engine::kRowStep > 1;  // the engine multiplies whole tiles of 32 x 32
  static constexpr int64_t kKeyStep = kByTiles ? Engine::kRowStep : Engine::kPair;
  static constexpr int64_t kRowChunk = kByTiles ? kPanel : 8;  // rows that share a depth where the mask cuts a block
  static constexpr int64_t kBlock = Engine::kForwardKeys;

 public:
  // Heads [head_begin, head_begin + num_heads) of the group of kv_head, queries [position, position + positions).
  ForwardTile(const AttentionForward& args, int64_t doc, int64_t kv_head, int64_t head_begin, int64_t num_heads,
              int64_t position, int64_t positions)
      : args_(args),
        doc_(args.shape.document(doc)),
        table_(args.pages.table == nullptr ? nullptr : args.pages.table + doc * args.pages.table_stride),
        kv_head_(kv_head),
        head_(head_begin),
        heads_(num_heads),
        position_(position),
        rows_(positions * num_heads),
        padded_rows_(round_up(rows_, kByTiles ? kPanel : 16)),
        dim_(args.shape.head_dim),
        ld_(round_up(dim_, Engine::kDimStep)) {
    const float cap = args.shape.softcap;
    inner_ = args.shape.scale / cap;
    unit_ = cap > 0.0f ? cap : args.shape.scale;
  }

  void run() {
    static thread_local ForwardBuffers<Engine> buffers;
    [[maybe_unused]] typename Engine::Session session;
    const int64_t last = position_ + rows_ / heads_ - 1, begin = doc_.keys_begin(position_), end = doc_.keys_end(last);
    q_ = buffers.q.at_least(padded_rows_ * ld_);
    acc_ = buffers.acc.at_least(padded_rows_ * ld_);
    top_ = buffers.rows.at_least(3 * padded_rows_);
    sum_ = top_ + padded_rows_;
    offset_ = sum_ + padded_rows_;
    for (int64_t key = begin; key < end; key += kBlock) {
      first_ = key == begin;
      last_ = key + kBlock >= end;
      attend(buffers, key, std::min(kBlock, end - key));
    }
    if (begin >= end) store_rows(0, rows_);
  }

 private:
  int64_t position_of(int64_t row) const { return position_ + std::min(row, rows_ - 1) / heads_; }

  // What rows [row, row_end) see of the block of `keys` keys from `key` on: all of them together, and each of them.
  KeyRange seen_by_any(int64_t row, int64_t row_end, int64_t key, int64_t keys) const {
    return {clamp(doc_.keys_begin(position_of(row)) - key, 0, keys),
            clamp(doc_.keys_end(position_of(row_end - 1)) - key, 0, keys)};
  }
  KeyRange seen_by_all(int64_t row, int64_t row_end, int64_t key, int64_t keys) const {
    return {clamp(doc_.keys_begin(position_of(row_end - 1)) - key, 0, keys),
            clamp(doc_.keys_end(position_of(row)) - key, 0, keys)};
  }

  const In* query(int64_t row) const {
    return static_cast<const In*>(args_.q.data) + (doc_.q_begin + position_ + row / heads_) * args_.q.token_stride +
           (head_ + row % heads_) * args_.q.head_stride;
  }

  // Q^T and the state of a panel. What the next panel will need comes in from memory meanwhile.
  void load_queries(ForwardBuffers<Engine>& b, int64_t panel) {
    const int64_t width = std::min(kPanel, padded_rows_ - panel), used = std::min(width, rows_ - panel);
    Elem* staged = b.staging.at_least(kPanel * ld_);
    const float* sinks = args_.shape.sinks;
    for (int64_t r = 0; r < width; ++r) {
      const int64_t row = std::min(panel + r, rows_ - 1);  // padding stands where the last row stands
      top_[panel + r] = sinks != nullptr ? sinks[head_ + row % heads_] / unit_ : kNegInfinity;
      sum_[panel + r] = sinks != nullptr ? 1.0f : 0.0f;
      offset_[panel + r] = static_cast<float>(row / heads_);
      if (r < used) load_row(query(row), dim_, staged + r * ld_, ld_);
    }
    std::memset(static_cast<void*>(staged + used * ld_), 0, static_cast<size_t>((width - used) * ld_) * sizeof(Elem));
    transpose_tile(staged, width, ld_, q_ + panel * ld_);
    for (int64_t row = panel + kPanel; row < std::min(panel + 2 * kPanel, rows_); ++row) fetch(query(row));
  }

  void fetch(const In* row) const {
    for (int64_t c = 0; c < dim_; c += 64 / static_cast<int64_t>(sizeof(In))) __builtin_prefetch(row + c);
  }

  // Where the rows of x lie that belong to keys [key, key + keys). Returns their common distance, 0 if there is none.
  int64_t find_rows(const AttentionInput& x, int64_t page_stride, int64_t key, int64_t keys, const In** rows) const {
    const In* base = static_cast<const In*>(x.data) + kv_head_ * x.head_stride;
    if (table_ == nullptr) {
      for (int64_t j = 0; j < keys; ++j) rows[j] = base + (doc_.k_begin + key + j) * x.token_stride;
      return x.token_stride;
    }
    const int64_t size = args_.pages.size;
    for (int64_t j = 0; j < keys;) {
      const int64_t slot = (key + j) % size, count = std::min(size - slot, keys - j);
      const In* page = base + table_[(key + j) / size] * page_stride;
      for (int64_t i = 0; i < count; ++i) rows[j + i] = page + (slot + i) * x.token_stride;
      j += count;
    }
    return key / size == (key + keys - 1) / size ? x.token_stride : 0;
  }

  // Adds what the rows get from keys [key, key + keys).
  void attend(ForwardBuffers<Engine>& b, int64_t key, int64_t keys) {
    const In *k_rows[kBlock], *v_rows[kBlock];
    const int64_t padded_keys = round_up(keys, kKeyStep);
    const int64_t stride = find_rows(args_.k, args_.pages.k_page_stride, key, keys, k_rows);
    find_rows(args_.v, args_.pages.v_page_stride, key, keys, v_rows);
    if (first_)
      for (int64_t row = 0; row < std::min(kPanel, rows_); ++row) fetch(query(row));
    for (int64_t j = 0; j < keys; ++j) {
      fetch(v_rows[j]);
      fetch(k_rows[j]);
    }
    load_keys(b, k_rows, stride, keys, padded_keys);
    Elem* v = b.values.at_least(kBlock * ld_);
    pack_panels(v_rows, keys, padded_keys, dim_, ld_, v);
    float* scores = b.scores.at_least(kBlock * kPanel);
    Elem* weights;
    if constexpr (Engine::kPair == 1) {
      weights = scores;
    } else {
      weights = b.weights.at_least(kBlock * kPanel);
    }
    for (int64_t panel = 0; panel < padded_rows_; panel += kPanel) {
      const int64_t width = std::min(kPanel, padded_rows_ - panel);
      if (first_) load_queries(b, panel);
      KeyRange ranges[2];
      for (int64_t half = 0; half < 2; ++half)
        ranges[half] = kByTiles ? seen_by_any(panel, panel + width, key, keys)
                                : seen_by_any(panel + 16 * half, panel + 16 * half + 16, key, keys);
      const bool sees = !ranges[0].empty() || (width > 16 && !ranges[1].empty());
      if (sees) {
        score(panel, width, ranges, scores);
        for (int64_t half = 0; 16 * half < width; ++half)
          if (!ranges[half].empty()) weigh(panel, half, key, keys, ranges[half], scores, weights);
      }
      const Elem* a = weights;
      if constexpr (kByTiles) {  // rows of A instead of columns
        Elem* rows = b.weights_a.at_least(kBlock * kPanel);
        if (sees)
          transpose_16x16_tiles(reinterpret_cast<const float*>(weights), padded_keys / 2,
                                reinterpret_cast<float*>(rows), kBlock / 2);
        a = rows;
      }
      add_values(panel, key, keys, padded_keys, a, v);
      if (last_) store_rows(panel, std::min(panel + kPanel, rows_));
    }
  }

  // The block's keys as an operand: where they lie if they can be read there. Rows 2 KiB apart or a multiple of it fall
  // into the same few sets of the first-level cache and drive each other out (a query against 8k keys: x0.3).
  void load_keys(ForwardBuffers<Engine>& b, const In* const* rows, int64_t stride, int64_t keys, int64_t padded_keys) {
    if constexpr (sizeof(In) == sizeof(Elem)) {
      const bool whole = kByTiles ? keys == padded_keys && dim_ == ld_ : dim_ % Engine::kPair == 0;
      if (whole && stride * static_cast<int64_t>(sizeof(In)) % 2048 != 0) {
        k_ = reinterpret_cast<const Elem*>(rows[0]);
        k_ld_ = stride;
        depth_ = dim_;
        return;
      }
    }
    Elem* k = b.keys.at_least(kBlock * ld_);
    for (int64_t j = 0; j < keys; ++j) load_row(rows[j], dim_, k + j * ld_, ld_);
    std::memset(static_cast<void*>(k + keys * ld_), 0, static_cast<size_t>((padded_keys - keys) * ld_) * sizeof(Elem));
    k_ = k;
    k_ld_ = depth_ = ld_;
  }

  // scores = K Q^T of a panel, for the keys that its halves see.
  void score(int64_t panel, int64_t width, const KeyRange* ranges, float* scores) {
    const auto multiply = [&](KeyRange keys, int64_t col, int64_t cols) {
      if (keys.empty()) return;
      const int64_t begin = round_down(keys.begin, kByTiles ? kKeyStep : 1);
      const int64_t rows = round_up(keys.end - begin, kByTiles ? kKeyStep : 1);
      Engine::template gemm<false>({rows, cols, depth_, k_ + begin * k_ld_, k_ld_,
                                    q_ + panel * ld_ + col * Engine::kPair, width * Engine::kPair,
                                    scores + begin * kPanel + col, kPanel});
    };
    if (width <= 16) return multiply(ranges[0], 0, width);
    const KeyRange both = {std::max(ranges[0].begin, ranges[1].begin), std::min(ranges[0].end, ranges[1].end)};
    if (both.empty()) {
      multiply(ranges[0], 0, 16);
      return multiply(ranges[1], 16, 16);
    }
    multiply(both, 0, width);
    for (int64_t half = 0; half < 2; ++half) {
      multiply({ranges[half].begin, both.begin}, 16 * half, 16);
      multiply({both.end, ranges[half].end}, 16 * half, 16);
    }
  }

  // The weights of half a panel, 16 rows, from its scores.
  void weigh(int64_t panel, int64_t half, int64_t key, int64_t keys, KeyRange range, float* scores, Elem* weights) {
    const int64_t row = panel + 16 * half;
    scores += 16 * half;
    if (args_.shape.softcap > 0.0f) cap_scores(scores, kPanel, range, inner_);
    const KeyRange all = seen_by_all(row, row + 16, key, keys);
    const KeyRange padded = {round_down(range.begin, kKeyStep), round_up(range.end, kKeyStep)};
    fill(scores, {padded.begin, range.begin});
    hide(scores, row, key, {range.begin, std::min(range.end, all.begin)});
    hide(scores, row, key, {std::max(range.begin, all.end), range.end});
    fill(scores, {range.end, padded.end});
    float keep[16];
    const bool moved = online_softmax<Engine>(scores, kPanel, padded, unit_ * kLog2E, top_ + row, sum_ + row,
                                              weights + 16 * half * Engine::kPair, keep);
    if (!moved || first_) return;
    for (int64_t r = row; r < std::min(row + 16, rows_); ++r) {
      if (keep[r - row] == 1.0f) continue;
      const Vec kept(keep[r - row]);
      float* acc = acc_ + r * ld_;
      for (int64_t c = 0; c < ld_; c += 16) (Vec::load(acc + c) * kept).store(acc + c);
    }
  }

  static void fill(float* scores, KeyRange keys) {
    for (int64_t j = keys.begin; j < keys.end; ++j) Vec(kNegInfinity).store(scores + j * kPanel);
  }

  // -inf where one of 16 rows does not see one of these keys.
  void hide(float* scores, int64_t row, int64_t block, KeyRange keys) const {
    const Vec offsets = Vec::load(offset_ + row), hidden(kNegInfinity);
    const int64_t positions = rows_ / heads_;
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      const Vec begin(static_cast<float>(clamp(doc_.queries_begin(block + j) - position_, 0, positions)));
      const Vec end(static_cast<float>(clamp(doc_.queries_end(block + j) - position_, 0, positions)));
      const Vec late = select_less(offsets, begin, hidden, Vec::load(scores + j * kPanel));
      select_less(offsets, end, late, hidden).store(scores + j * kPanel);
    }
  }

  // acc += weights * V for the rows of a panel.
  void add_values(int64_t panel, int64_t key, int64_t keys, int64_t padded_keys, const Elem* weights, const Elem* v) {
    const int64_t panel_end = kByTiles ? panel + kPanel : std::min(panel + kPanel, rows_);
    const KeyRange any = seen_by_any(panel, panel_end, key, keys), all = seen_by_all(panel, panel_end, key, keys);
    const bool cut = any.begin != all.begin || any.end != all.end;
    const int64_t chunk = cut ? kRowChunk : kPanel;
    for (int64_t col = 0; col < ld_; col += kPanel) {
      const int64_t cols = std::min(kPanel, ld_ - col);
      for (int64_t row = panel; row < panel_end; row += chunk) {
        const int64_t row_end = std::min(row + chunk, panel_end);
        const KeyRange seen = cut ? seen_by_any(row, row_end, key, keys) : any;
        const int64_t begin = round_down(seen.begin, kKeyStep), depth = round_up(seen.end, kKeyStep) - begin;
        float* acc = acc_ + row * ld_ + col;
        if (seen.empty()) {
          if (first_)
            for (int64_t r = 0; r < row_end - row; ++r) std::fill_n(acc + r * ld_, cols, 0.0f);
          continue;
        }
        const Elem* b = v + col * padded_keys + begin * cols;
        Gemm<Elem> g{row_end - row, cols, depth, nullptr, 0, b, cols * Engine::kPair, acc, ld_};
        if constexpr (kByTiles) {
          g.a = weights + begin;
          g.lda = kBlock;
        } else {
          g.a = weights + begin * kPanel + (row - panel) * Engine::kPair;
          g.lda = kPanel * Engine::kPair;
        }
        if (first_) {
          Engine::template gemm<false, !kByTiles>(g);
        } else {
          Engine::template gemm<true, !kByTiles>(g);
        }
      }
    }
  }

  // 32 columns of words, `depth` rows -> 32 rows. depth: a multiple of 16.
  static void transpose_16x16_tiles(const float* words, int64_t depth, float* rows, int64_t ld) {
    for (int64_t j = 0; j < depth; j += 16)
      for (int64_t r = 0; r < kPanel; r += 16) transpose_16x16(words + j * kPanel + r, kPanel, rows + r * ld + j, ld);
  }

  void store_rows(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t position = position_ + row / heads_, head = head_ + row % heads_;
      const int64_t token = doc_.q_begin + position;
      In* out = static_cast<In*>(args_.out) + (token * args_.shape.num_heads + head) * dim_;
      float& lse = args_.lse[head * args_.shape.total_q + token];
      if (doc_.sees_none(position)) {
        std::memset(static_cast<void*>(out), 0, static_cast<size_t>(dim_) * sizeof(In));
        lse = args_.shape.sinks != nullptr ? args_.shape.sinks[head] : kNegInfinity;
      } else {
        const Vec inverse(1.0f / sum_[row]);
        const float* acc = acc_ + row * ld_;
        for_each_vec(
            dim_, [&](int64_t c) { (Vec::load(acc + c) * inverse).store(out + c); },
            [&](int64_t c, int n) { (Vec::load(acc + c) * inverse).store_partial(out + c, n); });
        lse = top_[row] * unit_ + std::log(sum_[row]);
      }
    }
  }

  static constexpr float kLog2E = 1.44269504088896341f;

  const AttentionForward& args_;
  const Document doc_;
  const int32_t* const table_;
  const int64_t kv_head_, head_, heads_, position_, rows_, padded_rows_, dim_, ld_;
  float inner_, unit_;       // a logit is unit_ * score, or unit_ * tanh(inner_ * score)
  Elem* q_ = nullptr;        // panels of Q^T
  const Elem* k_ = nullptr;  // rows of the block's keys, k_ld_ apart, of which depth_ elements are multiplied
  int64_t k_ld_ = 0, depth_ = 0;
  float *acc_ = nullptr, *top_ = nullptr, *sum_ = nullptr;  // of each row
  float* offset_ = nullptr;                                 // the row's query, counted from position_
  bool first_ = true, last_ = true;                         // is this the first block of keys, the last?
};

// Floating-point work in units of threads_for: both products of all visible pairs.
inline int64_t attention_work(const AttentionShape& s) {
  int64_t pairs = 0;
  for (int64_t d = 0; d < s.num_docs; ++d) {
    const Document doc = s.document(d);
    pairs += doc.q_len * doc.k_len;
  }
  return pairs * s.num_heads * (s.head_dim + 8) / (s.window.right == 0 ? 4 : 2);
}

template <typename Engine, typename In>
void run_forward(const AttentionForward& args) {
  const AttentionShape& s = args.shape;
  const int64_t group = s.num_heads / s.num_kv_heads;
  const RowFold fold = RowFold::of(group, s.head_dim <= 128 ? 512 : 256);
  struct Tile {
    int64_t cost;
    int32_t doc, position;
  };
  std::vector<Tile> tiles;
  for (int64_t d = 0; d < s.num_docs; ++d) {
    const Document doc = s.document(d);
    for (int64_t i = 0; i < doc.q_len; i += fold.positions) {
      const int64_t positions = std::min(fold.positions, doc.q_len - i);
      const int64_t keys = std::max(int64_t{0}, doc.keys_end(i + positions - 1) - doc.keys_begin(i));
      tiles.push_back({positions * keys, static_cast<int32_t>(d), static_cast<int32_t>(i)});
    }
  }
  prefer_huge_pages(args.out, s.total_q * s.num_heads * s.head_dim * static_cast<int64_t>(sizeof(In)));
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.cost > b.cost; });
  const int64_t folds = ceil_div(group, fold.heads), tasks_per_tile = s.num_kv_heads * folds;
  parallel_tasks(static_cast<int64_t>(tiles.size()) * tasks_per_tile, threads_for(attention_work(s), s.num_threads),
                 [&](int64_t task) {
                   const Tile& tile = tiles[static_cast<size_t>(task / tasks_per_tile)];
                   const int64_t kv_head = task % tasks_per_tile / folds, head = task % folds * fold.heads;
                   const int64_t positions = std::min(fold.positions, s.document(tile.doc).q_len - tile.position);
                   ForwardTile<Engine, In>(args, tile.doc, kv_head, kv_head * group + head,
                                           std::min(fold.heads, group - head), tile.position, positions)
                       .run();
                 });
}

}  // namespace herdkern::cpu::HK_ISA
