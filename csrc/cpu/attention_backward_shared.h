// What the tasks of one backward call share: the order in which chunks of keys add to dQ, rowsum(dO * O), and the
// gradient of the sinks.
#pragma once
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/attention.h"
#include "cpu/attention_softmax_backward.h"
#include "cpu/threads.h"

namespace herdkern::cpu::HK_ISA {

// Lets the chunks of keys add to a tile of dQ one after the other, and lets tiles follow one another in one slot of
// memory: tile t lies in slot t % slots once tile t - slots is done. Tasks start in the order of tiles and chunks, so
// whoever is waited for runs.
class Turnstile {
 public:
  explicit Turnstile(int64_t slots)
      : slots_(slots), state_(std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(slots))) {
    for (int64_t i = 0; i < slots; ++i) state_[static_cast<size_t>(i)].store(0, std::memory_order_relaxed);
  }
  int64_t slot(int64_t tile) const { return tile % slots_; }
  void wait_first(int64_t tile) const { wait_for(tile, turn(tile)); }
  void wait(int64_t tile, int64_t chunk) const { wait_for(tile, turn(tile) + chunk); }
  void pass(int64_t tile, int64_t chunk, bool last) {
    const int64_t next = last ? turn(tile + slots_) : turn(tile) + chunk + 1;
    state_[static_cast<size_t>(slot(tile))].store(next, std::memory_order_release);
  }

 private:
  int64_t turn(int64_t tile) const { return tile / slots_ << 32; }  // plus the chunk that is next, 0 before the first
  void wait_for(int64_t tile, int64_t state) const {
    const std::atomic<int64_t>& now = state_[static_cast<size_t>(slot(tile))];
    while (now.load(std::memory_order_acquire) != state) sched_yield();
  }

  const int64_t slots_;
  std::unique_ptr<std::atomic<int64_t>[]> state_;
};

struct BackwardShared {
  float* delta;    // (num_heads, total_q)
  float* dq_sums;  // slots of tiles of dQ in fp32, of documents with several chunks; null where dQ itself is fp32
  Turnstile* turnstile;
};

// delta[head, token] = sum_c dout * out for queries [begin, end) of the packed batch.
template <typename In>
void sum_delta(const AttentionBackward& args, int64_t begin, int64_t end, float* delta) {
  const AttentionShape& s = args.shape;
  for (int64_t token = begin; token < end; ++token)
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
    }
}

// dq = 0 and delta = 0 for queries [begin, end) of the packed batch, which see no key.
template <typename In>
void clear_queries(const AttentionBackward& args, int64_t begin, int64_t end, float* delta) {
  const AttentionShape& s = args.shape;
  const int64_t width = s.num_heads * s.head_dim;
  std::memset(static_cast<void*>(static_cast<In*>(args.dq) + begin * width), 0,
              static_cast<size_t>((end - begin) * width) * sizeof(In));
  for (int64_t head = 0; head < s.num_heads; ++head)
    std::fill(delta + head * s.total_q + begin, delta + head * s.total_q + end, 0.0f);
}

// Of one document and head: sum_i exp(sink - lse_i) * delta_i, in fp64 in the order of the queries.
inline double sink_sum(float sink, const float* lse, const float* delta, int64_t count) {
  double total = 0.0;
  float terms[16];
  for (int64_t i = 0; i < count; i += 16) {
    const int n = static_cast<int>(std::min(int64_t{16}, count - i));
    (exp(Vec(sink) - Vec::load_partial(lse + i, n)) * Vec::load_partial(delta + i, n)).store(terms);
    for (int lane = 0; lane < n; ++lane)
      if (lse[i + lane] != -INFINITY) total += static_cast<double>(terms[lane]);
  }
  return total;
}

// dsinks[h] = -sum_i exp(sinks[h] - lse_i) * delta_i. Documents are added by the size of what they give, so that their
// order in the batch changes no bit.
inline void sink_gradients(const AttentionBackward& args, const float* delta, int num_threads) {
  const AttentionShape& s = args.shape;
  parallel_tasks(s.num_heads, num_threads, [&](int64_t head) {
    std::vector<double> sums(static_cast<size_t>(s.num_docs));
    for (int64_t d = 0; d < s.num_docs; ++d) {
      const int64_t at = head * s.total_q + s.cu_q[d];
      sums[static_cast<size_t>(d)] = sink_sum(s.sinks[head], args.lse + at, delta + at, s.cu_q[d + 1] - s.cu_q[d]);
    }
    std::sort(sums.begin(), sums.end(), [](double a, double b) {  // by their bits: a total order, NaN included
      int64_t left, right;
      std::memcpy(&left, &a, sizeof left);
      std::memcpy(&right, &b, sizeof right);
      return left < right;
    });
    double total = 0.0;
    for (const double x : sums) total += x;
    args.dsinks[head] = static_cast<float>(-total);
  });
}

}  // namespace herdkern::cpu::HK_ISA
