// Forward pass of packed attention: one task is a tile of queries of one document and one key-value head.
// The tile walks over the blocks of keys that it can see with a running softmax; rows fold the query heads of the
// group, so a block of k and v is packed once for all of them.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/attention_tiles.h"
#include "cpu/attention.h"
#include "cpu/attention_pack.h"
#include "cpu/attention_softmax.h"
#include "cpu/threads.h"

namespace herdkern::cpu::HK_ISA {

// Rows and keys are skipped at the grain of a slab where the diagonal cuts a block.
constexpr int64_t kSlab = 32;

template <typename Engine>
struct ForwardBuffers {
  TileBuffer<typename Engine::Elem> q, keys, keys_b, values, values_b, weights;
  TileBuffer<float> scores, acc;
  std::vector<RowState> rows;
};

template <typename Engine, typename In>
class ForwardTile {
  using Elem = typename Engine::Elem;

 public:
  // Heads [head_begin, head_begin + num_heads) of the group of kv_head, queries [position, position + positions).
  ForwardTile(const AttentionForward& args, const Document& doc, int64_t kv_head, int64_t head_begin, int64_t num_heads,
              int64_t position, int64_t positions)
      : args_(args),
        doc_(doc),
        kv_head_(kv_head),
        head_(head_begin),
        heads_(num_heads),
        position_(position),
        rows_(positions * num_heads),
        padded_rows_(round_up(rows_, Engine::kRowStep)),
        dim_(args.shape.head_dim),
        ld_(round_up(dim_, Engine::kDimStep)) {}

  void run() {
    static thread_local ForwardBuffers<Engine> buffers;
    [[maybe_unused]] typename Engine::Session session;
    const int64_t last_key = doc_.keys_end(position_ + rows_ / heads_ - 1);
    load_queries(buffers);
    for (int64_t key = 0; key < last_key; key += Engine::kForwardKeys)
      attend(buffers, key, std::min(Engine::kForwardKeys, last_key - key));
    store_rows(buffers);
  }

 private:
  const In* at(const AttentionInput& x, int64_t token, int64_t head) const {
    return static_cast<const In*>(x.data) + token * x.token_stride + head * x.head_stride;
  }
  // Of the block of `keys` keys from `key` on, how many row r sees.
  int64_t visible(int64_t row, int64_t key, int64_t keys) const {
    return clamp(doc_.keys_end(position_ + row / heads_) - key, 0, keys);
  }

  void load_queries(ForwardBuffers<Engine>& b) {
    q_ = b.q.at_least(padded_rows_ * ld_);
    for (int64_t row = 0; row < rows_; ++row)
      load_row(at(args_.q, doc_.q_begin + position_ + row / heads_, head_ + row % heads_), dim_, q_ + row * ld_, ld_);
    std::memset(static_cast<void*>(q_ + rows_ * ld_), 0,
                static_cast<size_t>((padded_rows_ - rows_) * ld_) * sizeof(Elem));
    acc_ = b.acc.at_least(padded_rows_ * ld_);
    std::fill_n(acc_, padded_rows_ * ld_, 0.0f);
    b.rows.assign(static_cast<size_t>(rows_), RowState{kNegInfinity, 0.0f});
  }

  // Adds what the rows get from keys [key, key + keys).
  void attend(ForwardBuffers<Engine>& b, int64_t key, int64_t keys) {
    const int64_t width = round_up(keys, kSlab);
    Elem* k = b.keys.at_least(Engine::kForwardKeys * ld_);
    Elem* v = b.values.at_least(Engine::kForwardKeys * ld_);
    load_rows(at(args_.k, doc_.k_begin + key, kv_head_), args_.k.token_stride, keys, dim_, k, width, ld_);
    load_rows(at(args_.v, doc_.k_begin + key, kv_head_), args_.v.token_stride, keys, dim_, v, width, ld_);
    Elem* k_b = b.keys_b.at_least(Engine::kForwardKeys * ld_);
    transpose_tile(k, width, ld_, k_b);
    const Elem* v_b = paired_rows(v, width, ld_, b.values_b.at_least(Engine::kForwardKeys * ld_));
    float* scores = b.scores.at_least(padded_rows_ * Engine::kForwardKeys);
    Elem* weights;
    if constexpr (Engine::kPair == 1) {
      weights = scores;
    } else {
      weights = b.weights.at_least(padded_rows_ * Engine::kForwardKeys);
    }
    const bool all_visible = visible(0, key, keys) == keys;
    const int64_t slab = all_visible ? std::max(width, padded_rows_) : kSlab;

    for (int64_t c = 0; c < width;
         c += slab) {  // scores of a slab of keys: the rows before the diagonal see none of it
      const int64_t row = round_down(std::max(int64_t{0}, doc_.queries_begin(key + c) - position_) * heads_, kSlab);
      if (row >= rows_) break;
      Engine::template gemm<false>({padded_rows_ - row, std::min(slab, width - c), ld_, q_ + row * ld_, ld_,
                                    k_b + c * Engine::kPair, width * Engine::kPair, scores + row * width + c, width});
    }
    for (int64_t row = 0; row < rows_; row += slab) {
      const int64_t end = std::min(rows_, row + slab), depth = round_up(visible(end - 1, key, keys), kSlab);
      if (depth == 0) continue;
      for (int64_t r = row; r < end; ++r) {
        const int64_t seen = visible(r, key, keys);
        Elem* w = weights + r * width;
        if (seen == 0) {
          std::fill_n(w, depth, Elem{});
        } else {
          online_softmax<Engine>(scores + r * width, seen, depth, args_.shape.scale, b.rows[static_cast<size_t>(r)], w,
                                 acc_ + r * ld_, ld_);
        }
      }
      const int64_t padded_end = end == rows_ ? padded_rows_ : end;
      Engine::template gemm<true>({padded_end - row, ld_, depth, weights + row * width, width, v_b, ld_ * Engine::kPair,
                                   acc_ + row * ld_, ld_});
    }
  }

  void store_rows(const ForwardBuffers<Engine>& b) {
    for (int64_t row = 0; row < rows_; ++row) {
      const RowState state = b.rows[static_cast<size_t>(row)];
      const int64_t position = position_ + row / heads_, token = doc_.q_begin + position, head = head_ + row % heads_;
      const bool sees_none = doc_.keys_end(position) == 0;
      const Vec inverse(sees_none ? 0.0f : 1.0f / state.sum);
      const float* acc = acc_ + row * ld_;
      In* out = static_cast<In*>(args_.out) + (token * args_.shape.num_heads + head) * dim_;
      for_each_vec(
          dim_, [&](int64_t c) { (Vec::load(acc + c) * inverse).store(out + c); },
          [&](int64_t c, int n) { (Vec::load(acc + c) * inverse).store_partial(out + c, n); });
      args_.lse[head * args_.shape.total_q + token] = sees_none ? kNegInfinity : state.max + std::log(state.sum);
    }
  }

  const AttentionForward& args_;
  const Document doc_;
  const int64_t kv_head_, head_, heads_, position_, rows_, padded_rows_, dim_, ld_;
  Elem* q_ = nullptr;
  float* acc_ = nullptr;
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
  const RowFold fold = RowFold::of(group, Engine::kForwardRows);
  struct Tile {
    int64_t cost;
    int32_t doc, position;
  };
  std::vector<Tile> tiles;
  for (int64_t d = 0; d < s.num_docs; ++d) {
    const Document doc = s.document(d);
    for (int64_t i = 0; i < doc.q_len; i += fold.positions) {
      const int64_t positions = std::min(fold.positions, doc.q_len - i);
      tiles.push_back({positions * doc.keys_end(i + positions - 1), static_cast<int32_t>(d), static_cast<int32_t>(i)});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.cost > b.cost; });
  const int64_t folds = ceil_div(group, fold.heads), tasks_per_tile = s.num_kv_heads * folds;
  parallel_tasks(static_cast<int64_t>(tiles.size()) * tasks_per_tile, threads_for(attention_work(s), s.num_threads),
                 [&](int64_t task) {
                   const Tile& tile = tiles[static_cast<size_t>(task / tasks_per_tile)];
                   const Document doc = s.document(tile.doc);
                   const int64_t kv_head = task % tasks_per_tile / folds, head = task % folds * fold.heads;
                   ForwardTile<Engine, In>(args, doc, kv_head, kv_head * group + head,
                                           std::min(fold.heads, group - head), tile.position,
                                           std::min(fold.positions, doc.q_len - tile.position))
                       .run();
                 });
}

}  // namespace herdkern::cpu::HK_ISA
