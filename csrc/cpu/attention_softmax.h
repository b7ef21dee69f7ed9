// The softmax between the two products of an attention tile, and its derivative. One row at a time, fp32.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/attention_gemm.h"

namespace herdkern::cpu::HK_ISA {

constexpr float kNegInfinity = -INFINITY;

// Running softmax of one query: max of scale * score so far and the sum of exp(scale * score - max).
struct RowState {
  float max, sum;
};

// One block of keys of a query, of which it sees the first `visible` (>= 1): turns scores into weights exp(scale * s -
// max), zero from `visible` up to `width`, and rescales what acc holds from earlier blocks. scores: (width,),
// overwritten; weights may be the same array. width: a multiple of 16.  scale > 0.
template <typename Engine>
inline void online_softmax(float* scores, int64_t visible, int64_t width, float scale, RowState& row,
                           typename Engine::Elem* weights, float* acc, int64_t acc_dim) {
  const int64_t used = (visible + 15) / 16 * 16;
  for (int64_t j = visible; j < used; ++j) scores[j] = kNegInfinity;
  const Vec factor(scale);
  Vec top = Vec(kNegInfinity);
  for (int64_t j = 0; j < used; j += 16) top = max(Vec::load(scores + j) * factor, top);
  const float new_max = std::fmax(row.max, max_lane(top));
  const float shift = new_max == kNegInfinity ? 0.0f : new_max;  // every score -inf: weights 0, not NaN
  Vec total(0.0f);
  const Vec minus_shift(-shift);
  for (int64_t j = 0; j < used; j += 16) {
    const Vec weight = exp(fma(Vec::load(scores + j), factor, minus_shift));
    total = total + weight;
    Engine::store(weights + j, weight);
  }
  std::memset(static_cast<void*>(weights + visible), 0, static_cast<size_t>(width - visible) * sizeof(*weights));
  if (new_max != row.max) {
    const float keep = row.max == kNegInfinity ? 0.0f : std::exp(row.max - shift);
    row.sum *= keep;
    row.max = new_max;
    const Vec keep_all(keep);
    for (int64_t c = 0; c < acc_dim; c += 16) (Vec::load(acc + c) * keep_all).store(acc + c);
  }
  row.sum += sum(total);
}

// The backward pass works on the transposed tile, keys x queries, one key at a time over queries [begin, end). Those
// before `first` do not see the key and get 0. begin and end are multiples of 16.
HK_INLINE void zero_unseen(float* row, int64_t first, int64_t begin, int64_t end) {
  const int64_t unseen = (first < end ? first : end) - begin;
  if (unseen > 0) std::memset(row + begin, 0, static_cast<size_t>(unseen) * sizeof(float));
}

// scores: overwritten with p = exp(scale * score - lse).
inline void probability_row(float* scores, const float* lse, float scale, int64_t first, int64_t begin, int64_t end) {
  const Vec factor(scale);
  for (int64_t i = begin; i < end; i += 16)
    exp(fma(Vec::load(scores + i), factor, Vec(0.0f) - Vec::load(lse + i))).store(scores + i);
  zero_unseen(scores, first, begin, end);
}

// delta += p * dp.
inline void add_delta_row(const float* p, const float* dp, float* delta, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 16)
    fma(Vec::load(p + i), Vec::load(dp + i), Vec::load(delta + i)).store(delta + i);
}

// dp: overwritten with ds = p * (dp - delta). The factor scale of ds is left to the last step of dq and dk.
inline void gradient_row(const float* p, float* dp, const float* delta, int64_t first, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 16)
    (Vec::load(p + i) * (Vec::load(dp + i) - Vec::load(delta + i))).store(dp + i);
  zero_unseen(dp, first, begin, end);
}

}  // namespace herdkern::cpu::HK_ISA
