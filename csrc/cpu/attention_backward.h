// Backward pass of packed attention: one task is a chunk of keys of one document and one key-value head. It walks over
// the tiles of queries that see the chunk, for every query head of the group, in a fixed order:
//   S^T = K Q^T,  P^T = exp(scale * S^T - lse),  dP^T = V dO^T,  dS^T = P^T * (dP^T - delta),  delta = rowsum(dO * O)
//   dV += P^T dO,  dK += dS^T Q,  dQ^T += K^T dS^T
// dK and dV belong to the task. dQ of a document with several chunks is summed in chunk order: a chunk waits until the
// one before it has added to a tile (Turnstile), so no sum depends on the number of threads and no memory is spent on
// partial sums.
#pragma once
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "cpu/attention_forward.h"
#include "cpu/workspace.h"

namespace herdkern::cpu::HK_ISA {

// Lets the chunks of keys add to a tile of dQ one after the other. Tasks start in chunk order, so whoever is waited for
// runs.
class Turnstile {
 public:
  explicit Turnstile(int64_t tiles) : done_(std::make_unique<std::atomic<int32_t>[]>(static_cast<size_t>(tiles))) {
    for (int64_t i = 0; i < tiles; ++i) done_[static_cast<size_t>(i)].store(0, std::memory_order_relaxed);
  }
  void wait(int64_t tile, int64_t chunk) const {
    while (done_[static_cast<size_t>(tile)].load(std::memory_order_acquire) != chunk) sched_yield();
  }
  void pass(int64_t tile, int64_t chunk) {
    done_[static_cast<size_t>(tile)].store(static_cast<int32_t>(chunk + 1), std::memory_order_release);
  }

 private:
  std::unique_ptr<std::atomic<int32_t>[]> done_;
};

// What the tasks of one call share.
struct BackwardShared {
  const float* delta;  // (num_heads, total_q)
  float* dq_sums;      // tiles of dQ^T, (ld, kBackwardRows) fp32 each, of documents with several chunks
  Turnstile* turnstile;
};

struct KeyChunk {
  int64_t doc, index, count;  // chunk `index` of `count` of the document
  int64_t first_tile;         // of its tiles of dQ, head 0: index into dq_sums and turnstile
};

template <typename Engine>
struct BackwardBuffers {
  using Elem = typename Engine::Elem;
  TileBuffer<Elem> k, v, transposed, k_t, q, dout, q_b, dout_b, q_pairs, dout_pairs, p, ds, ds_pairs;
  TileBuffer<float> dk, dv, dq, scores, dp, lse, delta;
};

template <typename Engine, typename In>
class BackwardChunk {
  using Elem = typename Engine::Elem;
  static constexpr int64_t kRows = Engine::kBackwardRows;

 public:
  BackwardChunk(const AttentionBackward& args, const BackwardShared& shared, const KeyChunk& chunk, int64_t kv_head)
      : args_(args),
        shared_(shared),
        chunk_(chunk),
        doc_(args.shape.document(chunk.doc)),
        kv_head_(kv_head),
        key_(chunk.index * Engine::kBackwardKeys),
        keys_(std::min(Engine::kBackwardKeys, doc_.k_len - key_)),
        padded_keys_(round_up(keys_, kSlab)),
        dim_(args.shape.head_dim),
        ld_(round_up(dim_, Engine::kDimStep)) {}

  void run() {
    static thread_local BackwardBuffers<Engine> buffers;
    [[maybe_unused]] typename Engine::Session session;
    load_keys(buffers);
    const int64_t group = args_.shape.num_heads / args_.shape.num_kv_heads;
    for (int64_t h = 0; h < group; ++h)
      for (int64_t row = round_down(doc_.queries_begin(key_), kRows); row < doc_.q_len; row += kRows)
        visit(buffers, kv_head_ * group + h, row);
    store_keys(dk_, args_.shape.scale, static_cast<In*>(args_.dk));
    store_keys(dv_, 1.0f, static_cast<In*>(args_.dv));
  }

 private:
  const In* at(const AttentionInput& x, int64_t token, int64_t head) const {
    return static_cast<const In*>(x.data) + token * x.token_stride + head * x.head_stride;
  }

  void load_keys(BackwardBuffers<Engine>& b) {
    const int64_t size = Engine::kBackwardKeys * ld_;
    k_ = b.k.at_least(size);
    v_ = b.v.at_least(size);
    load_rows(at(args_.k, doc_.k_begin + key_, kv_head_), args_.k.token_stride, keys_, dim_, k_, padded_keys_, ld_);
    load_rows(at(args_.v, doc_.k_begin + key_, kv_head_), args_.v.token_stride, keys_, dim_, v_, padded_keys_, ld_);
    Elem* transposed = b.transposed.at_least(size);
    transpose_tile(k_, padded_keys_, ld_, transposed);
    k_t_ = transposed_rows(transposed, padded_keys_, ld_, Engine::kPair == 1 ? transposed : b.k_t.at_least(size));
    dk_ = b.dk.at_least(size);
    dv_ = b.dv.at_least(size);
    std::fill_n(dk_, padded_keys_ * ld_, 0.0f);
    std::fill_n(dv_, padded_keys_ * ld_, 0.0f);
  }

  // Everything between the chunk and queries [row, row + kRows) of one head.
  void visit(BackwardBuffers<Engine>& b, int64_t head, int64_t row) {
    const int64_t rows = std::min(kRows, doc_.q_len - row), cols = round_up(rows, kSlab), size = kRows * ld_;
    const int64_t token = doc_.q_begin + row;
    Elem *q = b.q.at_least(size), *dout = b.dout.at_least(size);
    load_rows(at(args_.q, token, head), args_.q.token_stride, rows, dim_, q, cols, ld_);
    load_rows(at(args_.dout, token, head), args_.dout.token_stride, rows, dim_, dout, cols, ld_);
    Elem *q_b = b.q_b.at_least(size), *dout_b = b.dout_b.at_least(size);
    transpose_tile(q, cols, ld_, q_b);
    transpose_tile(dout, cols, ld_, dout_b);
    probabilities(b, head, row, rows, cols, q_b, dout_b);

    const Elem* q_pairs = paired_rows(q, cols, ld_, b.q_pairs.at_least(size));
    const Elem* dout_pairs = paired_rows(dout, cols, ld_, b.dout_pairs.at_least(size));
    const int64_t slab = first_column(padded_keys_ - kSlab, row) == 0 ? padded_keys_ : kSlab;
    for (int64_t j = 0; j < padded_keys_; j += slab) {
      const int64_t i = first_column(j, row);
      if (i >= cols) break;
      Engine::template gemm<true>({slab, ld_, cols - i, p_ + j * cols + i, cols, dout_pairs + i * ld_,
                                   ld_ * Engine::kPair, dv_ + j * ld_, ld_});
      Engine::template gemm<true>(
          {slab, ld_, cols - i, ds_ + j * cols + i, cols, q_pairs + i * ld_, ld_ * Engine::kPair, dk_ + j * ld_, ld_});
    }
    add_dq(b, head, row, rows, cols, slab);
  }

  // First column (query - row, rounded down to a slab) that sees any key of the slab of keys at j.
  int64_t first_column(int64_t j, int64_t row) const {
    return round_down(std::max(int64_t{0}, doc_.queries_begin(key_ + j) - row), kSlab);
  }

  // p_ = P^T and ds_ = dS^T, (padded_keys, cols), from first_column of each slab of keys on.
  void probabilities(BackwardBuffers<Engine>& b, int64_t head, int64_t row, int64_t rows, int64_t cols, const Elem* q_b,
                     const Elem* dout_b) {
    const int64_t size = Engine::kBackwardKeys * kRows, token = doc_.q_begin + row;
    float *lse = b.lse.at_least(kRows), *delta = b.delta.at_least(kRows);
    std::copy_n(args_.lse + head * args_.shape.total_q + token, rows, lse);
    std::fill_n(delta, cols, 0.0f);
    if (!sees_all()) std::copy_n(shared_.delta + head * args_.shape.total_q + token, rows, delta);
    std::fill(lse + rows, lse + cols, INFINITY);  // p = 0 in the padding
    float *scores = b.scores.at_least(size), *dp = b.dp.at_least(size);
    if constexpr (Engine::kPair == 1) {
      p_ = scores;
      ds_ = ds_pairs_ = dp;
    } else {
      p_ = b.p.at_least(size);
      ds_ = b.ds.at_least(size);
      ds_pairs_ = b.ds_pairs.at_least(size);
    }
    const int64_t slab = first_column(padded_keys_ - kSlab, row) == 0 ? padded_keys_ : kSlab;
    for (int64_t j = 0; j < padded_keys_; j += slab) {
      const int64_t begin = first_column(j, row);
      if (begin >= cols) break;
      Engine::template gemm<false>({slab, cols - begin, ld_, k_ + j * ld_, ld_, q_b + begin * Engine::kPair,
                                    cols * Engine::kPair, scores + j * cols + begin, cols});
      Engine::template gemm<false>({slab, cols - begin, ld_, v_ + j * ld_, ld_, dout_b + begin * Engine::kPair,
                                    cols * Engine::kPair, dp + j * cols + begin, cols});
      for (int64_t key = j; key < j + slab; ++key) {
        probability_row(scores + key * cols, lse, args_.shape.scale, first_seeing(key, row, cols), begin, cols);
        if (sees_all()) {
          zero_unseen(dp + key * cols, first_seeing(key, row, cols), begin, cols);
          add_delta_row(scores + key * cols, dp + key * cols, delta, begin, cols);
        }
      }
    }
    for (int64_t j = 0; j < padded_keys_; j += slab) {
      const int64_t begin = first_column(j, row);
      if (begin >= cols) break;
      for (int64_t key = j; key < j + slab; ++key)
        gradient_row(scores + key * cols, dp + key * cols, delta, first_seeing(key, row, cols), begin, cols);
      if constexpr (Engine::kPair == 2) round_slab(scores, dp, j, j + slab, begin, cols);
    }
  }

  // delta = sum_c dout * out = sum_j p * dp. The second form needs all keys of the document at hand, and is exact where
  // `out` was rounded to bf16: gradients of short documents nearly cancel.
  bool sees_all() const { return chunk_.count == 1; }

  // First column that sees key `key` of the chunk; cols for a key of the padding: none.
  int64_t first_seeing(int64_t key, int64_t row, int64_t cols) const {
    return key < keys_ ? doc_.queries_begin(key_ + key) - row : cols;
  }

  // bf16 copies of P^T and dS^T, and of dS^T with pairs of keys side by side.
  void round_slab(const float* p, const float* ds, int64_t key_begin, int64_t key_end, int64_t begin, int64_t cols) {
    for (int64_t key = key_begin; key < key_end; key += 2)
      for (int64_t i = begin; i < cols; i += 16) {
        const int64_t even = key * cols + i, odd = even + cols;
        Engine::store(p_ + even, Vec::load(p + even));
        Engine::store(p_ + odd, Vec::load(p + odd));
        Engine::store(ds_ + even, Vec::load(ds + even));
        Engine::store(ds_ + odd, Vec::load(ds + odd));
        pair_vectors(ds_ + even, ds_ + odd, ds_pairs_ + key * cols + 2 * i);
      }
  }

  // dQ^T of one tile: added to what earlier chunks left, written out by the last chunk that the tile sees.
  void add_dq(BackwardBuffers<Engine>& b, int64_t head, int64_t row, int64_t rows, int64_t cols, int64_t slab) {
    const int64_t last_chunk = (doc_.keys_end(row + rows - 1) - 1) / Engine::kBackwardKeys;
    const int64_t tile = chunk_.first_tile + head * ceil_div(doc_.q_len, kRows) + row / kRows;
    float* dq = chunk_.count == 1 ? b.dq.at_least(kRows * ld_) : shared_.dq_sums + tile * kRows * ld_;
    if (chunk_.count > 1) shared_.turnstile->wait(tile, chunk_.index);
    const int64_t step = slab == kSlab ? kSlab : cols;
    for (int64_t i = 0; i < cols; i += step) {
      const int64_t last = std::min(row + i + step, doc_.q_len) - 1;
      const int64_t depth = clamp(round_up(doc_.keys_end(last) - key_, kSlab), 0, padded_keys_);
      const Gemm<Elem> product{
          ld_, step, depth, k_t_, padded_keys_, ds_pairs_ + i * Engine::kPair, cols * Engine::kPair, dq + i, cols};
      if (chunk_.index == 0) {
        Engine::template gemm<false>(product);
      } else {
        Engine::template gemm<true>(product);
      }
    }
    if (chunk_.index == last_chunk) store_dq(dq, cols, doc_.q_begin + row, rows, head);
    if (chunk_.count > 1) shared_.turnstile->pass(tile, chunk_.index);
  }

  // dq[token + i, head] = scale * (column i of dq_t).
  void store_dq(const float* dq_t, int64_t cols, int64_t token, int64_t rows, int64_t head) const {
    alignas(64) float block[16 * 16];
    const Vec scale(args_.shape.scale);
    for (int64_t i = 0; i < rows; i += 16)
      for (int64_t c = 0; c < dim_; c += 16) {
        transpose_16x16(dq_t + c * cols + i, cols, block, 16);
        const int n = static_cast<int>(std::min(int64_t{16}, dim_ - c));
        for (int64_t r = 0; r < std::min(int64_t{16}, rows - i); ++r) {
          In* dq = static_cast<In*>(args_.dq) + ((token + i + r) * args_.shape.num_heads + head) * dim_ + c;
          (Vec::load(block + 16 * r) * scale).store_partial(dq, n);
        }
      }
  }

  void store_keys(const float* sums, float factor, In* out) const {
    const Vec scale(factor);
    for (int64_t j = 0; j < keys_; ++j) {
      const float* row = sums + j * ld_;
      In* dst = out + ((doc_.k_begin + key_ + j) * args_.shape.num_kv_heads + kv_head_) * dim_;
      for_each_vec(
          dim_, [&](int64_t c) { (Vec::load(row + c) * scale).store(dst + c); },
          [&](int64_t c, int n) { (Vec::load(row + c) * scale).store_partial(dst + c, n); });
    }
  }

  const AttentionBackward& args_;
  const BackwardShared& shared_;
  const KeyChunk chunk_;
  const Document doc_;
  const int64_t kv_head_, key_, keys_, padded_keys_, dim_, ld_;
  Elem *k_ = nullptr, *v_ = nullptr, *p_ = nullptr, *ds_ = nullptr, *ds_pairs_ = nullptr;
  const Elem* k_t_ = nullptr;
  float *dk_ = nullptr, *dv_ = nullptr;
};

// delta[head, token] = sum_c dout * out; and dq = 0 for the queries of tiles that see no key, which no chunk visits.
template <typename Engine, typename In>
void prepare_queries(const AttentionBackward& args, const Document& doc, float* delta) {
  const AttentionShape& s = args.shape;
  for (int64_t i = 0; i < doc.q_len; ++i) {
    const int64_t token = doc.q_begin + i,
                  tile_end = std::min(doc.q_len, round_down(i, Engine::kBackwardRows) + Engine::kBackwardRows);
    const bool visited = doc.keys_end(tile_end - 1) > 0;
    for (int64_t head = 0; head < s.num_heads; ++head) {
      const In* out =
          static_cast<const In*>(args.out.data) + token * args.out.token_stride + head * args.out.head_stride;
      const In* dout =
          static_cast<const In*>(args.dout.data) + token * args.dout.token_stride + head * args.dout.head_stride;
      Vec total(0.0f);
      for_each_vec(
          s.head_dim, [&](int64_t c) { total = fma(Vec::load(out + c), Vec::load(dout + c), total); },
          [&](int64_t c, int n) { total = fma(Vec::load_partial(out + c, n), Vec::load_partial(dout + c, n), total); });
      delta[head * s.total_q + token] = sum(total);
      if (!visited)
        std::fill_n(static_cast<In*>(args.dq) + (token * s.num_heads + head) * s.head_dim, s.head_dim, In{});
    }
  }
}

template <typename Engine, typename In>
void run_backward(const AttentionBackward& args) {
  const AttentionShape& s = args.shape;
  std::vector<KeyChunk> chunks;
  std::vector<int64_t> order(static_cast<size_t>(s.num_docs));
  for (int64_t d = 0; d < s.num_docs; ++d) order[static_cast<size_t>(d)] = d;
  const auto cost = [&](int64_t d) {
    const Document doc = s.document(d);
    return doc.q_len * doc.k_len;
  };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
  int64_t tiles = 0;
  for (const int64_t d : order) {
    const Document doc = s.document(d);
    const int64_t count = ceil_div(doc.k_len, Engine::kBackwardKeys);
    for (int64_t c = 0; c < count; ++c) chunks.push_back({d, c, count, tiles});
    if (count > 1) tiles += s.num_heads * ceil_div(doc.q_len, Engine::kBackwardRows);
  }
  const int num_threads = threads_for(attention_work(s) * 5 / 2, s.num_threads);
  Workspace<float> delta(s.num_heads * s.total_q);
  Workspace<float> dq_sums(tiles * Engine::kBackwardRows * round_up(s.head_dim, Engine::kDimStep));
  Turnstile turnstile(tiles);
  const BackwardShared shared{delta.data(), dq_sums.data(), &turnstile};
  parallel_tasks(s.num_docs, num_threads,
                 [&](int64_t d) { prepare_queries<Engine, In>(args, s.document(d), delta.data()); });
  std::atomic<int64_t> next{0};  // tasks start in this order whatever order OpenMP hands them out in
  parallel_tasks(static_cast<int64_t>(chunks.size()) * s.num_kv_heads, num_threads, [&](int64_t) {
    const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
    BackwardChunk<Engine, In>(args, shared, chunks[static_cast<size_t>(task / s.num_kv_heads)], task % s.num_kv_heads)
        .run();
  });
}

}  // namespace herdkern::cpu::HK_ISA
