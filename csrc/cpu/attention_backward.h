// Backward pass of packed attention: one task is a chunk of keys of one document and one key-value head. It walks over
// the tiles of queries that see the chunk, for every query head of the group, in a fixed order:
//   S = Q K^T,  P = exp(cap(scale * S) - lse),  dP = dO V^T,  dS = scale * P * (dP - delta) * cap',
//   dV += P^T dO,  dK += dS^T Q,  dQ += dS K,  delta = rowsum(dO * O)
// A sink changes lse and nothing else here: p sums to less than 1, and delta = sum_j p * dp stays true.
//
// K, V and their transposes are packed once per chunk, Q and dO once per visit for the products that need them as right
// operand; as left operand they are read where they lie. dK and dV belong to the task. dQ of a document with several
// chunks is summed in chunk order: a chunk waits until the one before it has added to a tile (Turnstile), so no sum
// depends on the number of threads and no memory is spent on partial sums. Where dQ is not fp32 its sums lie in a ring
// of tiles as large as the longest document needs for one key-value head (plan_backward).
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/attention_backward_pack.h"
#include "cpu/attention_backward_plan.h"
#include "cpu/attention_backward_shared.h"
#include "cpu/attention_forward.h"
#include "cpu/huge_pages.h"
#include "cpu/workspace.h"

namespace herdkern::cpu::HK_ISA {

template <typename Engine>
struct BackwardBuffers {
  using Elem = typename Engine::Elem;
  TileBuffer<Elem> k, k_t, v_t, q, dout, q_rows, dout_rows, p_pairs, ds_pairs, ds_rows, p_t, ds_t;
  TileBuffer<float> dk, dv, dq, scores, dp, slope;
};

template <typename Engine, typename In>
class BackwardChunk {
  using Elem = typename Engine::Elem;
  using G = Grain<Engine>;
  using Buffers = BackwardBuffers<Engine>;
  static constexpr int64_t kMaxBlocks = std::max(kTileQueries, kChunkKeys) / G::kRows + 1;
  static constexpr int64_t kWide = 16 * G::kPair;           // pad of the head dimension
  static constexpr int64_t kScoreStride = kChunkKeys + 16;  // not a power of two: neighbours fall in other cache sets
  static constexpr int64_t kPairStride = 2 * kScoreStride, kRowStride = kChunkKeys + 32;
  static constexpr int64_t kTurnedStride = kTileQueries + 32;
  static constexpr bool kSameType = std::is_same_v<Elem, In>;

 public:
  BackwardChunk(const AttentionBackward& args, const BackwardShared& shared, const KeyChunk& chunk,
                const BackwardTask& task, Buffers& buffers)
      : args_(args),
        shared_(shared),
        chunk_(chunk),
        b_(buffers),
        doc_(args.shape.document(chunk.doc)),
        kv_head_(task.kv_head),
        first_tile_(task.first_tile),
        key_(chunk.index * kChunkKeys),
        keys_(std::min(kChunkKeys, doc_.k_len - key_)),
        dim_(args.shape.head_dim),
        ld_(round_up(dim_, kWide)),
        depth_(round_up(dim_, G::kDepth)),
        cols_(round_up(dim_, G::kCols)) {}

  static int64_t tile_size(int64_t head_dim) { return kTileQueries * round_up(head_dim, G::kCols); }
  static bool sums_in_place(int64_t head_dim) { return std::is_same_v<In, float> && head_dim % G::kCols == 0; }

  void run() {
    load_keys();
    const int64_t group = args_.shape.num_heads / args_.shape.num_kv_heads;
    const int64_t begin = doc_.queries_begin(key_), end = doc_.queries_end(key_ + keys_ - 1);
    // Heads inside: their rows lie side by side, so that one page of memory serves them all.
    for (int64_t row = round_down(begin, kTileQueries); row < end; row += kTileQueries)
      for (int64_t h = 0; h < group; ++h) visit(kv_head_ * group + h, row);
    store_rows(dk_, cols_, keys_, output(args_.dk), args_.shape.num_kv_heads * dim_);
    store_rows(dv_, cols_, keys_, output(args_.dv), args_.shape.num_kv_heads * dim_);
  }

 private:
  const In* at(const AttentionInput& x, int64_t token, int64_t head) const {
    return static_cast<const In*>(x.data) + token * x.token_stride + head * x.head_stride;
  }
  In* output(void* grad) const {
    return static_cast<In*>(grad) + ((doc_.k_begin + key_) * args_.shape.num_kv_heads + kv_head_) * dim_;
  }

  void load_keys() {
    const int64_t size = round_up(kChunkKeys, G::kPanel) * round_up(ld_, G::kPanel);
    k_ = b_.k.at_least(size);
    k_t_ = b_.k_t.at_least(size);
    v_t_ = b_.v_t.at_least(size);
    const In *k = at(args_.k, doc_.k_begin + key_, kv_head_), *v = at(args_.v, doc_.k_begin + key_, kv_head_);
    pack_rows<Engine>(k, args_.k.token_stride, keys_, dim_, round_up(keys_, G::kDepth), k_, kChunkKeys * G::kPanel);
    pack_transposed<Engine>(k, args_.k.token_stride, keys_, dim_, k_t_, ld_ * G::kPanel);
    pack_transposed<Engine>(v, args_.v.token_stride, keys_, dim_, v_t_, ld_ * G::kPanel);
    dk_ = b_.dk.at_least(kChunkKeys * cols_);
    dv_ = b_.dv.at_least(kChunkKeys * cols_);
    std::fill_n(dk_, padded(keys_) * cols_, 0.0f);
    std::fill_n(dv_, padded(keys_) * cols_, 0.0f);
    scores_ = b_.scores.at_least(kTileQueries * kScoreStride);
    dp_ = b_.dp.at_least(kTileQueries * kScoreStride);
    if (args_.shape.softcap > 0.0f) slope_ = b_.slope.at_least(G::kRows * kScoreStride);
    if constexpr (G::kPair == 2) {
      p_pairs_ = b_.p_pairs.at_least(kTileQueries / 2 * kPairStride);
      ds_pairs_ = b_.ds_pairs.at_least(kTileQueries / 2 * kPairStride);
      ds_rows_ = b_.ds_rows.at_least(kTileQueries * kRowStride);
    }
  }

  // Rows that a product must find: whole tiles where the engine multiplies tiles.
  static int64_t padded(int64_t rows) { return G::kTiles ? round_up(rows, G::kRows) : rows; }

  struct Rows {
    const Elem* data;
    int64_t stride;
  };
  // Rows of q or dout as left operand: where they lie, or copied where type or padding asks for it.
  Rows left_rows(const AttentionInput& x, int64_t token, int64_t head, int64_t rows, TileBuffer<Elem>& copy) {
    if constexpr (kSameType)
      if (dim_ == depth_ && rows == padded(rows)) return {at(x, token, head), x.token_stride};
    Elem* tile = copy.at_least(kTileQueries * ld_);
    load_rows(at(x, token, head), x.token_stride, rows, dim_, tile, padded(rows), ld_);
    return {tile, ld_};
  }

  // Everything between the chunk and queries [row, row + kTileQueries) of one head.
  void visit(int64_t head, int64_t row) {
    const int64_t rows = std::min(kTileQueries, doc_.q_len - row), token = doc_.q_begin + row;
    const int64_t size = kTileQueries * round_up(ld_, G::kPanel), stride = kTileQueries * G::kPanel;
    Elem *q = b_.q.at_least(size), *dout = b_.dout.at_least(size);
    const int64_t depth = round_up(rows, G::kDepth);
    pack_rows<Engine>(at(args_.q, token, head), args_.q.token_stride, rows, dim_, depth, q, stride);
    pack_rows<Engine>(at(args_.dout, token, head), args_.dout.token_stride, rows, dim_, depth, dout, stride);
    find_ranges(row, rows);

    const Rows q_rows = left_rows(args_.q, token, head, rows, b_.q_rows),
               dout_rows = left_rows(args_.dout, token, head, rows, b_.dout_rows);
    score_product<Engine>(q_rows.data, q_rows.stride, rows, k_t_, ld_ * G::kPanel, depth_, scores_, kScoreStride,
                          seen_);
    score_product<Engine>(dout_rows.data, dout_rows.stride, rows, v_t_, ld_ * G::kPanel, depth_, dp_, kScoreStride,
                          seen_);
    for (int64_t i = 0, begin = 0; begin < rows; ++i, begin += G::kRows) {
      const int64_t count = std::min(G::kRows, rows - begin);
      fetch_ahead(head, row + begin, count);
      if (!seen_[i].empty()) {
        softmax_block(head, row, begin, count, seen_[i]);
      } else if (chunk_.count == 1) {
        std::fill_n(shared_.delta + head * args_.shape.total_q + token + begin, count, 0.0f);
      }
    }

    if constexpr (G::kTiles) {
      turn(p_pairs_, b_.p_t.at_least(kChunkKeys * kTurnedStride));
      turn(ds_pairs_, b_.ds_t.at_least(kChunkKeys * kTurnedStride));
      key_product<false>(b_.p_t.at_least(0), kTurnedStride, dout, stride, dv_);
      key_product<false>(b_.ds_t.at_least(0), kTurnedStride, q, stride, dk_);
    } else if constexpr (G::kPair == 2) {
      key_product<true>(p_pairs_, kPairStride, dout, stride, dv_);
      key_product<true>(ds_pairs_, kPairStride, q, stride, dk_);
    } else {
      key_product<true>(scores_, kScoreStride, dout, stride, dv_);
      key_product<true>(dp_, kScoreStride, q, stride, dk_);
    }
    add_dq(head, row, rows);
  }

  // Rows that are needed soon and lie at strides no hardware prefetch follows: q and dout of the next visit, and dQ.
  void fetch_ahead(int64_t head, int64_t row, int64_t rows) const {
    const auto fetch = [&](const In* x) {
      for (int64_t c = 0; c < dim_; c += 64 / static_cast<int64_t>(sizeof(In))) __builtin_prefetch(x + c, 0, 2);
    };
    const int64_t group = args_.shape.num_heads / args_.shape.num_kv_heads, head_begin = kv_head_ * group;
    const int64_t next_head = head + 1 < head_begin + group ? head + 1 : head_begin;
    for (int64_t query = row; query < row + rows; ++query) {
      if (sums_in_place(dim_) && chunk_.count > 1)
        fetch(static_cast<const In*>(args_.dq) + ((doc_.q_begin + query) * args_.shape.num_heads + head) * dim_);
      const int64_t next = next_head == head_begin ? query + kTileQueries : query;
      if (next >= doc_.q_len) continue;
      fetch(at(args_.q, doc_.q_begin + next, next_head));
      fetch(at(args_.dout, doc_.q_begin + next, next_head));
    }
  }

  template <bool kTransposedA>
  void key_product(const Elem* a, int64_t a_stride, const Elem* b, int64_t panel_stride, float* sums) {
    gradient_product<Engine, kTransposedA>(a, a_stride, padded(keys_), b, panel_stride, cols_, sums, cols_, used_rows_,
                                           true);
  }

  Span seen_by(int64_t first, int64_t last) const {  // of the chunk's keys, by queries first to last
    const Span keys{clamp(doc_.keys_begin(first) - key_, 0, keys_), clamp(doc_.keys_end(last) - key_, 0, keys_)};
    return keys.empty() ? Span{0, 0} : keys;
  }
  static Span rounded(Span span, int64_t step) { return {round_down(span.begin, step), round_up(span.end, step)}; }

  // Which columns and depths each block of rows takes part in. A block of keys that straddles two vectors needs zeros
  // in both of them, so ranges of scores grow by kSlack where kRows does not divide 16.
  void find_ranges(int64_t row, int64_t rows) {
    constexpr int64_t kSlack = G::kCols % G::kRows == 0 ? 0 : G::kRows - 1;
    for (int64_t r = 0, i = 0; r < rows; r += G::kRows, ++i) {
      const Span keys = seen_by(row + r, row + std::min(r + G::kRows, rows) - 1);
      used_keys_[i] = rounded(keys, G::kDepth);
      seen_[i] = keys.empty() ? keys
                              : rounded({std::max(int64_t{0}, keys.begin - kSlack), std::min(keys_, keys.end + kSlack)},
                                        G::kCols);
    }
    for (int64_t j = 0, i = 0; j < keys_; j += G::kRows, ++i) {
      const int64_t last = std::min(j + G::kRows, keys_) - 1;
      const Span queries{clamp(doc_.queries_begin(key_ + j) - row, 0, rows),
                         clamp(doc_.queries_end(key_ + last) - row, 0, rows)};
      used_rows_[i] = queries.empty() ? Span{0, 0} : rounded(queries, G::kDepth);
    }
  }

  // Scores and dp of queries [begin, begin + count) of the tile become P and dS, zero where unseen in `span`.
  void softmax_block(int64_t head, int64_t row, int64_t begin, int64_t count, Span span) {
    const AttentionShape& s = args_.shape;
    const SoftmaxGradient softmax{s.scale, s.softcap};
    const int64_t first = head * s.total_q + doc_.q_begin + row + begin;
    const int64_t filled = round_up(count, G::kDepth);
    float delta[G::kRows + 1] = {};
    for (int64_t r = 0; r < filled; ++r) {
      float *p = scores_ + (begin + r) * kScoreStride, *dp = dp_ + (begin + r) * kScoreStride;
      if (r >= count) {
        zero_outside(p, {0, 0}, span);
        zero_outside(dp, {0, 0}, span);
        if (slope_ != nullptr) zero_outside(slope(r), {0, 0}, span);
        continue;
      }
      const Span seen = seen_by(row + begin + r, row + begin + r);
      probability_row<G::kPair == 2>(softmax, args_.lse[first + r], seen, span, p, slope(r));
      zero_outside(dp, seen, span);
      if (sees_all(row + begin + r)) {
        if (s.sinks == nullptr && seen.end - seen.begin <= 16) normalize_row(p, span);
        delta[r] = delta_of_row(p, dp, span, s.sinks == nullptr);
        shared_.delta[first + r] = delta[r];
      } else if (seen.begin < seen.end) {  // who sees none may see all of another chunk, which writes its delta now
        delta[r] = shared_.delta[first + r];
      }
    }
    if constexpr (G::kPair == 1) {
      for (int64_t r = 0; r < count; ++r)
        gradient_row(scores_ + (begin + r) * kScoreStride, dp_ + (begin + r) * kScoreStride, delta[r], s.scale,
                     slope(r), span);
    } else {
      for (int64_t r = 0; r < filled; r += 2) {
        const int64_t at = (begin + r) * kScoreStride, pair = (begin + r) / 2 * kPairStride;
        const auto convert = slope_ == nullptr ? gradient_pair<false> : gradient_pair<true>;
        convert(scores_ + at, dp_ + at, kScoreStride, delta + r, s.scale, slope(r), span, p_pairs_ + pair,
                ds_pairs_ + pair, ds_rows_ + (begin + r) * kRowStride, kRowStride);
      }
    }
  }
  float* slope(int64_t r) const { return slope_ == nullptr ? nullptr : slope_ + r * kScoreStride; }

  // delta = sum_c dout * out = sum_j p * dp. The second form needs all keys of the query at hand, and is exact where
  // gradients nearly cancel: few keys, or `out` rounded to bf16.
  bool sees_all(int64_t query) const { return doc_.keys_begin(query) >= key_ && doc_.keys_end(query) <= key_ + keys_; }

  // Pairs of queries side by side -> (keys, queries), of what used_rows_ names.
  void turn(const Elem* pairs, Elem* turned) {
    for (int64_t j = 0; j < keys_; j += 16)
      for (int64_t i = used_rows_[j / G::kRows].begin; i < used_rows_[j / G::kRows].end; i += 32)
        transpose_16x16(reinterpret_cast<const float*>(pairs + i / 2 * kPairStride + 2 * j), kPairStride / 2,
                        reinterpret_cast<float*>(turned + j * kTurnedStride + i), kTurnedStride / 2);
  }

  // dQ of one tile: added to what earlier chunks left, written out by the last chunk that the tile sees.
  void add_dq(int64_t head, int64_t row, int64_t rows) {
    const int64_t first_chunk = doc_.keys_begin(row) / kChunkKeys,
                  last_chunk = (doc_.keys_end(row + rows - 1) - 1) / kChunkKeys;
    const int64_t tile = first_tile_ +
                         (head - kv_head_ * (args_.shape.num_heads / args_.shape.num_kv_heads)) * visited_tiles(doc_) +
                         row / kTileQueries - skipped_tiles(doc_);
    In* out = static_cast<In*>(args_.dq) + ((doc_.q_begin + row) * args_.shape.num_heads + head) * dim_;
    const int64_t out_stride = args_.shape.num_heads * dim_;
    float* dq;
    int64_t dq_stride = cols_;
    if constexpr (std::is_same_v<In, float>) {
      dq = out;
      dq_stride = out_stride;
    }
    const bool in_place = sums_in_place(dim_);
    if (!in_place) {
      dq = chunk_.count == 1 ? b_.dq.at_least(kTileQueries * cols_)
                             : shared_.dq_sums + shared_.turnstile->slot(tile) * tile_size(dim_);
      dq_stride = cols_;
    }
    if (chunk_.index > first_chunk) {
      shared_.turnstile->wait(tile, chunk_.index);
    } else if (chunk_.count > 1) {
      shared_.turnstile->wait_first(tile);
    }
    const Elem* ds = ds_rows_;
    int64_t ds_stride = kRowStride;
    if constexpr (G::kPair == 1) {
      ds = dp_;
      ds_stride = kScoreStride;
    }
    gradient_product<Engine, false>(ds, ds_stride, padded(rows), k_, kChunkKeys * G::kPanel, cols_, dq, dq_stride,
                                    used_keys_, chunk_.index > first_chunk);
    if (chunk_.index == last_chunk && !in_place) store_rows(dq, cols_, rows, out, out_stride);
    if (chunk_.count > 1) shared_.turnstile->pass(tile, chunk_.index, chunk_.index == last_chunk);
  }

  void store_rows(const float* sums, int64_t ld, int64_t rows, In* out, int64_t stride) const {
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = sums + r * ld;
      In* dst = out + r * stride;
      for_each_vec(
          dim_, [&](int64_t c) { Vec::load(row + c).store(dst + c); },
          [&](int64_t c, int n) { Vec::load(row + c).store_partial(dst + c, n); });
    }
  }

  const AttentionBackward& args_;
  const BackwardShared& shared_;
  const KeyChunk chunk_;
  Buffers& b_;
  const Document doc_;
  const int64_t kv_head_, first_tile_, key_, keys_, dim_, ld_, depth_, cols_;
  Elem *k_ = nullptr, *k_t_ = nullptr, *v_t_ = nullptr, *p_pairs_ = nullptr, *ds_pairs_ = nullptr, *ds_rows_ = nullptr;
  float *dk_ = nullptr, *dv_ = nullptr, *scores_ = nullptr, *dp_ = nullptr, *slope_ = nullptr;
  Span seen_[kMaxBlocks], used_keys_[kMaxBlocks], used_rows_[kMaxBlocks];
};

// What to do before the chunks run: delta for documents with several chunks, zeros for tiles that see no key.
template <typename In>
void prepare_queries(const AttentionBackward& args, float* delta, int num_threads) {
  const AttentionShape& s = args.shape;
  std::vector<std::pair<int32_t, int32_t>> tiles;  // document, first query
  for (int64_t d = 0; d < s.num_docs; ++d) {
    const Document doc = s.document(d);
    for (int64_t row = 0; row < doc.q_len; row += kTileQueries)
      if (doc.k_len > kChunkKeys || doc.sees_none(std::min(row + kTileQueries, doc.q_len) - 1))
        tiles.emplace_back(static_cast<int32_t>(d), static_cast<int32_t>(row));
  }
  parallel_tasks(static_cast<int64_t>(tiles.size()), num_threads, [&](int64_t task) {
    const auto [d, row] = tiles[static_cast<size_t>(task)];
    const Document doc = s.document(d);
    const int64_t end = std::min(row + kTileQueries, doc.q_len);
    if (doc.sees_none(end - 1)) {
      clear_queries<In>(args, doc.q_begin + row, doc.q_begin + end, delta);
    } else {
      sum_delta<In>(args, doc.q_begin + row, doc.q_begin + end, delta);
    }
  });
}

template <typename Engine, typename In>
void run_backward(const AttentionBackward& args) {
  using Chunk = BackwardChunk<Engine, In>;
  const AttentionShape& s = args.shape;
  const bool in_place = Chunk::sums_in_place(s.head_dim);
  const BackwardPlan plan = plan_backward(s, !in_place);
  const int num_threads = threads_for(attention_work(s) * 5 / 2, s.num_threads);
  const int64_t row_bytes = s.head_dim * static_cast<int64_t>(sizeof(In));
  prefer_huge_pages(args.dq, s.total_q * s.num_heads * row_bytes);
  for (void* grad : {args.dk, args.dv}) prefer_huge_pages(grad, s.total_k * s.num_kv_heads * row_bytes);
  Workspace<float> delta(s.num_heads * s.total_q);
  Workspace<float> dq_sums(in_place ? 0 : plan.slots * Chunk::tile_size(s.head_dim));
  Turnstile turnstile(plan.slots);
  const BackwardShared shared{delta.data(), dq_sums.data(), &turnstile};
  prepare_queries<In>(args, delta.data(), num_threads);
  parallel_tasks(static_cast<int64_t>(plan.tasks.size()), num_threads, [&](int64_t index) {
    static thread_local BackwardBuffers<Engine> buffers;
    [[maybe_unused]] typename Engine::Session session;
    const BackwardTask& task = plan.tasks[static_cast<size_t>(index)];
    for (int64_t i = task.begin; i < task.end; ++i)
      Chunk(args, shared, plan.chunks[static_cast<size_t>(i)], task, buffers).run();
  });
  if (args.dsinks != nullptr) sink_gradients(args, delta.data(), num_threads);
}

}  // namespace herdkern::cpu::HK_ISA
