// The softmax between the two products of an attention tile, in fp32.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/attention_gemm.h"

namespace herdkern::cpu::HK_ISA {

constexpr float kNegInfinity = -INFINITY;

// [begin, end) of the keys of a block.
struct KeyRange {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// The forward pass works on the transposed tile, keys x queries, 16 queries at a time: no step crosses lanes.
//
// softcap: scores of 16 queries become tanh(score * inner); the cap itself goes into the factor.
inline void cap_scores(float* scores, int64_t ld, KeyRange keys, float inner) {
  for (int64_t j = keys.begin; j < keys.end; ++j) tanh(Vec::load(scores + j * ld) * Vec(inner)).store(scores + j * ld);
}

// Running softmax of 16 queries over one block of keys: scores (keys, ld) of those queries become weights 2^(factor *
// (score - max)), (keys / kPair, 16, kPair) with rows ld * kPair apart, in place where kPair is 1. top and sum: (16,),
// the running max of the scores and the denominator. keep: (16,), what earlier sums are worth now. Returns whether any
// max has moved. Where every score is -inf so far weights are 0, not NaN. keys: borders are multiples of kPair.
// The difference comes before the factor so that a row of one key has the weight 1 and its lse is its logit, exactly.
template <typename Engine>
inline bool online_softmax(float* scores, int64_t ld, KeyRange keys, float factor, float* top, float* sum,
                           typename Engine::Elem* weights, float* keep) {
  const Vec scale(factor), old_top = Vec::load(top);
  Vec tops[2] = {Vec(kNegInfinity), Vec(kNegInfinity)};
  int64_t j = keys.begin;
  for (; j + 2 <= keys.end; j += 2) {
    tops[0] = max(Vec::load(scores + j * ld), tops[0]);
    tops[1] = max(Vec::load(scores + (j + 1) * ld), tops[1]);
  }
  if (j < keys.end) tops[0] = max(Vec::load(scores + j * ld), tops[0]);
  const Vec new_top = max(max(tops[0], tops[1]), old_top);
  const Vec finite_top = select_less(Vec(kNegInfinity), new_top, new_top, Vec(0.0f));
  const auto weight = [&](int64_t i) { return exp2((Vec::load(scores + i * ld) - finite_top) * scale); };

  Vec totals[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  const auto store = [&](int64_t i, const Vec& even, const Vec& odd) {
    if constexpr (Engine::kPair == 1) {
      even.store(weights + i * ld);
      odd.store(weights + (i + 1) * ld);
    } else {
      Engine::store_pairs(weights + i * ld, even, odd);
    }
  };
  j = keys.begin;
  for (; j + 4 <= keys.end; j += 4) {
    const Vec a = weight(j), b = weight(j + 1), c = weight(j + 2), d = weight(j + 3);
    totals[0] = totals[0] + a;
    totals[1] = totals[1] + b;
    totals[2] = totals[2] + c;
    totals[3] = totals[3] + d;
    store(j, a, b);
    store(j + 2, c, d);
  }
  for (; j + 2 <= keys.end; j += 2) {
    const Vec a = weight(j), b = weight(j + 1);
    totals[0] = totals[0] + a;
    totals[1] = totals[1] + b;
    store(j, a, b);
  }
  if constexpr (Engine::kPair == 1) {
    if (j < keys.end) {
      const Vec a = weight(j);
      totals[0] = totals[0] + a;
      a.store(weights + j * ld);
    }
  }
  const Vec total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
  const Vec kept = exp2((old_top - finite_top) * scale);
  fma(Vec::load(sum), kept, total).store(sum);
  kept.store(keep);
  new_top.store(top);
  return max_lane(select_less(old_top, new_top, Vec(1.0f), Vec(0.0f))) > 0.0f;
}

}  // namespace herdkern::cpu::HK_ISA
